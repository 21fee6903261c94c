"""What methods are fitted on: the target's own rows at every site."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, call
from weightdecomp._divergence import Divergence
from weightdecomp._forward import Operands, recorded, replaced
from weightdecomp._sites import Site

OnStep = Callable[[int, dict[str, float]], None]
_STREAM = 0x5851F42D  # any number that nobody seeds with


class Inapplicable(ValueError):
    """A method that cannot be used on a site or a model, with the reason; a row of the table, never dropped."""


@dataclass(frozen=True, eq=False)
class Data:
    """A target with sample inputs, recorded once.

    Attributes:
        model: The target.
        batches: Checked inputs.
        sites: Sites in the model's order.
        divergence: How outputs are compared.
        tolerance: Relative distortion that values are priced at.
    """

    model: nn.Module
    batches: Sequence[Batch]
    sites: Sequence[Site]
    divergence: Divergence
    tolerance: float

    def site(self, path: str) -> Site:
        """The site at a module path."""
        return next(site for site in self.sites if site.path == path)

    @cached_property
    def _rows(self) -> tuple[dict[str, Tensor], dict[str, tuple]]:
        found: dict[str, list[Tensor]] = {site.path: [] for site in self.sites}
        layouts: dict[str, tuple] = {}
        for batch in self.batches:
            operands = recorded(self.model, batch, self.sites).operands
            for site in self.sites:
                rows = [site.vectors(one) for one in operands[site.path]]
                found[site.path] += [x.flatten(0, -2) for x in rows]
                layouts.setdefault(site.path, (len(rows), rows[0].shape[:-1]))
        return {path: torch.cat(rows) for path, rows in found.items()}, layouts

    def inputs(self, path: str) -> Float[Tensor, "row d_in"]:
        """Input rows of a site, over all batches, calls and positions."""
        return self._rows[0][path]

    def outputs(self, path: str) -> Float[Tensor, "row d_out"]:
        """Output rows of a site, without its bias."""
        return self.inputs(path) @ self.site(path).matrix().T

    def layout(self, path: str) -> tuple:
        """Number of calls and leading shape of a site's rows on the first batch: equal where rows correspond."""
        return self._rows[1][path]

    def check_enough(self, path: str, needed: int, what: str) -> None:
        """Refuse a width that the rows cannot support.

        Raises:
            Inapplicable: With both numbers.
        """
        rows = len(self.inputs(path))
        if rows < needed:
            raise Inapplicable(
                f"{what} at {path!r} needs at least {needed:,} rows, got {rows:,}; pass more inputs or a smaller width"
            )

    def check_varies(self, path: str) -> None:
        """Refuse constant activations.

        Raises:
            Inapplicable: If all input rows of the site are equal.
        """
        x = self.inputs(path)
        if float((x - x[0]).abs().max()) <= 1e-7 * (float(x.abs().max()) + 1e-30):
            raise Inapplicable(f"the activations at {path!r} are constant, so that there is nothing to decompose")

    def generator(self, seed: int) -> torch.Generator:
        """A generator of random draws on the data's device.

        Not of the seed itself: a start drawn like a planted dictionary of the same seed and size would be its truth.
        """
        return torch.Generator(device=self.inputs(self.sites[0].path).device).manual_seed(_STREAM ^ seed)


def output_gradients(
    model: nn.Module,
    batch: Batch,
    sites: Sequence[Site],
    at: Sequence[str],
    scalars: Callable[[Any, Mapping[str, list[Tensor]]], Sequence[Tensor]],
) -> list[dict[str, Float[Tensor, "row d_in"]]]:
    """Gradients of some scalars with respect to the input rows of some sites.

    They are taken at the output rows y = x W^T and carried to x by W, which is exact and works for every type of
    site.

    Args:
        model: The target.
        batch: One batch.
        sites: All sites.
        at: Module paths to differentiate at; downstream of the first one the graph is whole.
        scalars: From the model's output and the input rows of every site, numbers to differentiate.

    Returns:
        For each scalar the gradients by site, flattened to rows.
    """
    read: dict[str, list[Tensor]] = {site.path: [] for site in sites}
    seen: dict[str, list[Tensor]] = {site.path: [] for site in sites}

    def forward(site: Site, index: int, operands: Operands) -> Any:
        rows = site.read(operands, site.matrix())
        if not rows.requires_grad:
            rows = rows.detach().requires_grad_()
        read[site.path].append(site.vectors(operands))
        seen[site.path].append(rows)
        return site.write(rows, operands)

    with torch.enable_grad(), replaced(sites, forward):
        output = call(model, batch)
        wanted = scalars(output, read)
        leaves = [rows for path in at for rows in seen[path]]
        by_site = {site.path: site for site in sites}
        found = []
        for k, scalar in enumerate(wanted):
            more = k + 1 < len(wanted)
            grads = iter(_slopes(scalar, leaves, more))
            found.append(
                {p: torch.cat([next(grads).flatten(0, -2) for _ in seen[p]]) @ by_site[p].matrix() for p in at}
            )
    return found


def _slopes(scalar: Tensor, leaves: Sequence[Tensor], more: bool) -> Sequence[Tensor]:
    """Gradients at the leaves; zeros where the scalar does not depend on them."""
    if not scalar.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(scalar, leaves, retain_graph=more, materialize_grads=True)
