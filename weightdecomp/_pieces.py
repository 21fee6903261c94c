"""Pieces: the rank-one parts of one site and the components they belong to."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Pieces(NamedTuple):
    """The components of one site in factored form.

    Component c has the weight `sum of u_r v_r^T over the pieces r with owner[r] == c`; what the components do not
    sum to is the remainder. Only these products mean anything: scaling u_r by s and v_r by 1/s changes nothing,
    nor does a change of basis inside a component (G1).

    Attributes:
        v: What each piece reads.
        u: What each piece writes.
        owner: The component of each piece, ascending.
    """

    v: Float[Tensor, "piece d_in"]
    u: Float[Tensor, "piece d_out"]
    owner: Int[Tensor, " piece"]

    @property
    def n(self) -> int:
        """Number of components."""
        return int(self.owner[-1]) + 1 if len(self.owner) else 0

    @property
    def rank_one(self) -> bool:
        """Whether every component is a single piece."""
        return self.n == len(self.owner)

    def ranks(self) -> Int[Tensor, " component"]:
        """Number of pieces of each component."""
        return torch.bincount(self.owner, minlength=self.n)

    def total(self) -> Float[Tensor, "d_out d_in"]:
        """Sum of all components."""
        return self.u.T @ self.v

    def weight(self, index: int) -> Float[Tensor, "d_out d_in"]:
        """Weight of one component."""
        own = self.owner == index
        return self.u[own].T @ self.v[own]

    def contract(
        self, inner: Float[Tensor, "*batch piece"], mask: Float[Tensor, "*#batch component"]
    ) -> Float[Tensor, "*batch d_out"]:
        """Output rows of the masked site for given inner activations."""
        return (inner * (mask if self.rank_one else mask[..., self.owner])) @ self.u

    def activations(self, inner: Float[Tensor, "*batch piece"]) -> Float[Tensor, "*batch component"]:
        """Size of each component's contribution to the site's output: |u| (v.x) with its sign, or a norm.

        A rank-one component has a sign (that of v.x with u held); a component of higher rank has the norm of its
        contribution, which no change of basis alters (G1).
        """
        if self.rank_one:
            return inner * self.u.norm(dim=-1)
        same = self.owner[:, None] == self.owner[None, :]
        gram = (self.u @ self.u.T) * same
        squares = torch.zeros(*inner.shape[:-1], self.n, dtype=inner.dtype, device=inner.device)
        squares.index_add_(-1, self.owner, (inner @ gram) * inner)
        norms = squares.clamp_min(0).sqrt()
        single = self.ranks()[self.owner] == 1
        signed = inner[..., single] * self.u[single].norm(dim=-1)
        return norms.index_copy(-1, self.owner[single], signed)

    def balanced(self) -> "Pieces":
        """The same components with |u_r| = |v_r| and orthogonal pieces inside each component."""
        v, u = self.v.clone(), self.u.clone()
        for index in torch.nonzero(self.ranks() > 1).flatten().tolist():
            own = self.owner == index
            q_u, r_u = torch.linalg.qr(u[own].T)
            q_v, r_v = torch.linalg.qr(v[own].T)
            left, sizes, right = torch.linalg.svd(r_u @ r_v.T, full_matrices=False)
            n = int(own.sum())
            pad = n - len(sizes)
            u[own] = torch.nn.functional.pad((q_u @ left * sizes).T, (0, 0, 0, pad))
            v[own] = torch.nn.functional.pad((q_v @ right.T).T, (0, 0, 0, pad))
        sizes_u, sizes_v = u.norm(dim=1, keepdim=True), v.norm(dim=1, keepdim=True)
        live = (sizes_u > 0) & (sizes_v > 0)
        scale = torch.where(live, (sizes_v / sizes_u.clamp_min(1e-30)).sqrt(), 1)
        return Pieces(torch.where(live, v / scale, v), torch.where(live, u * scale, u), self.owner)

    def select(self, keep: Tensor) -> "Pieces":
        """Only the components with keep[c] true, renumbered."""
        pieces = keep[self.owner]
        renumber = keep.cumsum(0) - 1
        return Pieces(self.v[pieces], self.u[pieces], renumber[self.owner[pieces]])


def rank_one_pieces(v: Float[Tensor, "piece d_in"], u: Float[Tensor, "piece d_out"]) -> Pieces:
    """Every piece its own component."""
    return Pieces(v, u, torch.arange(len(v), device=v.device))
