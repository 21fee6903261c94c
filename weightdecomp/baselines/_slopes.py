"""Gradients of each input's own numbers with respect to the weights, in the factored form that linear maps have."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._batches import call, select, size, tensors
from weightdecomp._forward import Operands, replaced
from weightdecomp._sites import Site
from weightdecomp.baselines._data import Data, Inapplicable

_MOST = 2048  # inputs whose gradients are kept


class Slopes(NamedTuple):
    """Gradients with respect to a site's weight: `sum over rows of g x^T` for every input and number.

    Attributes:
        x: Input rows of the site.
        g: Gradients at its output rows.
    """

    x: Float[Tensor, "input row d_in"]
    g: Float[Tensor, "number input row d_out"]

    def along(
        self, u: Float[Tensor, "piece d_out"], v: Float[Tensor, "piece d_in"]
    ) -> Float[Tensor, "number input piece"]:
        """Inner products of the gradients with rank-one matrices u v^T."""
        return torch.einsum("knrp,nrp->knp", self.g @ u.T, self.x @ v.T)

    def squares(self) -> Float[Tensor, "number input"]:
        """Squared norms of the gradients."""
        return torch.einsum("knrs,nrs->kn", self.g @ self.g.mT, self.x @ self.x.mT)

    def of(self, index: Tensor) -> "Slopes":
        """Those of some inputs."""
        return Slopes(self.x[index], self.g[:, index])


def slopes(data: Data, numbers: Callable[[Any], Sequence[Tensor]]) -> dict[str, Slopes]:
    """Record inputs and gradients of the first inputs, 2,048 at most, at every site.

    Args:
        data: The target.
        numbers: From the model's output, sums over inputs of what is differentiated, each term of one input alone.

    Raises:
        Inapplicable: Where a site's rows do not belong to single inputs.
    """
    n = min(size(data.batches[0]), _MOST)
    batch = select(data.batches[0], torch.arange(n, device=tensors(data.batches[0])[0].device))
    read: dict[str, list[Tensor]] = {site.path: [] for site in data.sites}
    seen: dict[str, list[Tensor]] = {site.path: [] for site in data.sites}

    def forward(site: Site, _: int, operands: Operands) -> Any:
        rows = site.read(operands, site.matrix())
        rows = rows if rows.requires_grad else rows.detach().requires_grad_()
        read[site.path].append(_by_input(site, site.vectors(operands).detach(), n))
        seen[site.path].append(rows)
        return site.write(rows, operands)

    with torch.enable_grad(), replaced(data.sites, forward):
        wanted = numbers(call(data.model, batch))
        leaves = [rows for site in data.sites for rows in seen[site.path]]
        found = [
            torch.autograd.grad(one, leaves, retain_graph=k + 1 < len(wanted), materialize_grads=True)
            for k, one in enumerate(wanted)
        ]
    by_leaf = iter(torch.stack(grads) for grads in zip(*found, strict=True))
    grads = {site.path: [next(by_leaf) for _ in seen[site.path]] for site in data.sites}
    return {
        site.path: Slopes(
            torch.cat(read[site.path], 1),
            torch.cat([torch.stack([_by_input(site, one, n) for one in g]) for g in grads[site.path]], 2),
        )
        for site in data.sites
    }


def _by_input(site: Site, rows: Tensor, n: int) -> Float[Tensor, "input row _"]:
    if not rows.shape[:-1] or rows.shape[0] != n:
        raise Inapplicable(
            f"the rows of {site.path!r} do not belong to single inputs: expected {n} first, got {tuple(rows.shape)}"
        )
    return rows.reshape(n, -1, rows.shape[-1])
