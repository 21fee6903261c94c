"""Parts of the whole network's weights, of low rank at every site: what APD and L3D train, and their form as units."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Bank
from weightdecomp.baselines._data import Data
from weightdecomp.baselines._slopes import Slopes
from weightdecomp.baselines._weights import components


@dataclass(eq=False)
class Factors:
    """One site's shares of all parts: part c has `sum over r of u[c, r] v[c, r]^T` there.

    Attributes:
        v: What is read.
        u: What is written.
    """

    v: Float[Tensor, "part rank d_in"]
    u: Float[Tensor, "part rank d_out"]

    @classmethod
    def started(cls, site: Site, n: int, rank: int, rng: torch.Generator) -> "Factors":
        """Random directions, whose squares sum to about the weight's."""
        d_out, d_in = site.shape
        size = (float(site.matrix().norm()) / (n * rank) ** 0.5) ** 0.5

        def drawn(d: int) -> Tensor:
            x = torch.randn(n, rank, d, generator=rng, device=rng.device, dtype=site.dtype)
            return (size * x / d**0.5).requires_grad_()

        return cls(drawn(d_in), drawn(d_out))

    def total(self) -> Float[Tensor, "d_out d_in"]:
        """Sum of all parts."""
        return torch.einsum("cro,cri->oi", self.u, self.v)

    def gram(self) -> Float[Tensor, "part part"]:
        """Inner products of the parts."""
        u, v = self.u.flatten(0, 1), self.v.flatten(0, 1)
        n, rank = self.u.shape[:2]
        return ((u @ u.T) * (v @ v.T)).reshape(n, rank, n, rank).sum((1, 3))

    def along(self, slopes: Slopes) -> Float[Tensor, "number input part"]:
        """Inner products of gradients with the parts."""
        found = slopes.along(self.u.flatten(0, 1), self.v.flatten(0, 1))
        return found.unflatten(-1, self.u.shape[:2]).sum(-1)

    def bank(self, site: Site, data: Data, share: float) -> Bank:
        """The parts as units, a part on where its contribution is among the largest of a share."""
        n, rank = self.u.shape[:2]
        u, v = self.u.detach().flatten(0, 1), self.v.detach().flatten(0, 1)
        plain = components(site, v, u)
        gram = torch.einsum("cro,cso->crs", self.u.detach(), self.u.detach())

        def size(inner: Tensor) -> Tensor:
            own = inner.unflatten(-1, (n, rank))
            return torch.einsum("...cr,crs,...cs->...c", own, gram, own).clamp_min(0).sqrt()

        return replace(
            plain,
            numbers=torch.full((n,), float(rank * sum(site.shape))),
            values=torch.full((n,), float(rank)),
            owner=torch.arange(n).repeat_interleave(rank),
            importance=_above(size, size(plain.encode(data.inputs(site.path))), share),
        )


def _above(size: Callable[[Tensor], Tensor], sizes: Tensor, share: float) -> Callable[[Tensor], Tensor]:
    every = sizes.flatten()
    level = every.kthvalue(min(len(every), max(1, round((1 - share) * len(every))))).values
    return lambda inner: (size(inner) > level).to(inner.dtype)


def n_parts(sites: Sequence[Site], ratio: float) -> int:
    """Number of parts for a network: a multiple of its widest site's larger side."""
    return max(1, round(ratio * max(max(site.shape) for site in sites)))


def largest(sizes: Float[Tensor, "input part"], k: float) -> Float[Tensor, "input part"]:
    """One for the k largest an input on average, over the whole batch."""
    n = min(sizes.numel(), max(1, round(k * len(sizes))))
    return torch.zeros_like(sizes).flatten().scatter(0, sizes.flatten().topk(n).indices, 1.0).view_as(sizes)
