"""Monitors: say for each input whether given components are in use, without running the model to its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, call, read_batches, size, unpadded, without_padding
from weightdecomp._edit import Selection, members_of
from weightdecomp._forward import Operands, replaced
from weightdecomp._pieces import Pieces
from weightdecomp._sites import Site

if TYPE_CHECKING:
    from weightdecomp._decomposition import Decomposition

_LEAST = 1e-12  # keeps the strength of a gate that is always open finite


class Watched(NamedTuple):
    """The watched components of one site.

    Attributes:
        pieces: These components alone.
        thresholds: Of their gates.
        columns: Which columns of the monitor's answer each of them speaks for.
    """

    pieces: Pieces
    thresholds: Float[Tensor, "arm=2 component"]
    columns: Bool[Tensor, "component selection"]


@dataclass(frozen=True, eq=False)
class Monitor:
    """Says for each input whether components are in use; see `monitor`.

    Attributes:
        target: The model that is watched.
        components: What is watched, in the order of the answer's columns.
        sites: Sites that are read, in the model's own order.
        watched: Per site, its watched components.
    """

    target: nn.Module
    components: tuple[Selection, ...]
    sites: tuple[Site, ...]
    watched: dict[str, Watched]

    def __call__(self, inputs: Batch, level: float = 1.0) -> Bool[Tensor, "input selection"]:
        """Whether each watched component, for a circuit any of its components, is in use on each input.

        Args:
            inputs: One batch, as the model takes it.
            level: Strength beyond which a component counts as in use. 1 is the gate itself: it cannot be ablated there
                within the run's tolerance. A component that serves other ends too is used a little by many inputs;
                known cases say how strongly it is used by those that matter.

        Raises:
            ValueError: As `strength`.
        """
        return self.strength(inputs) > level

    @torch.no_grad()
    def strength(self, inputs: Batch) -> Float[Tensor, "input selection"]:
        """Largest contribution of each watched component on each input, in units of its gate's threshold.

        The largest over positions, calls of its module, and the components of a circuit. Where a site's rows belong to
        no single input, they count for all of them.

        Raises:
            ValueError: For empty batches, NaN or infinity, or another device than the model's.
        """
        (batch,) = read_batches([inputs], self.target)
        reader = _Reader(self, size(batch), unpadded(batch))
        try:
            with replaced(self.sites, reader):
                call(self.target, batch)
        except _Enough:
            pass
        return torch.stack(reader.found).amax(0)


def monitor(decomposition: "Decomposition", components: Sequence[Selection]) -> Monitor:
    """A function that says for each input whether these components are in use.

    It runs the target up to the last site that holds one of them, reads only what they read, and stops there.
    Source: ours.

    Args:
        decomposition: Components with gates.
        components: Components `(site, index)` or circuits, one column of the answer each.

    Returns:
        A callable that gives one boolean an input and selection; its `.strength` gives numbers.

    Raises:
        ValueError: For no components, or unknown ones.
        TypeError: For something that is neither a circuit nor a pair.
    """
    chosen = tuple(components)
    if not chosen:
        raise ValueError("components is empty; name at least one component (site, index) or circuit to watch")
    members = [(member, column) for column, one in enumerate(chosen) for member in members_of(one)]
    for member, _ in members:
        decomposition.component(*member)
    watched = {}
    for path, parts in decomposition.parts.items():
        spoken = torch.zeros(parts.pieces.n, len(chosen), dtype=torch.bool, device=parts.pieces.v.device)
        for (place, index), column in members:
            if place == path:
                spoken[index, column] = True
        keep = spoken.any(1)
        if keep.any():
            thresholds = parts.thresholds[:, keep].clamp_min(_LEAST)
            watched[path] = Watched(parts.pieces.select(keep), thresholds, spoken[keep])
    sites = tuple(site for site in decomposition.sites if site.path in watched)
    return Monitor(decomposition.target, chosen, sites, watched)


class _Enough(BaseException):
    """All has been read; not an Exception, so that no handler in the model's own code catches it."""


class _Reader:
    """Runs sites as they are, reading the watched components, and ends the forward pass after the last reading."""

    def __init__(self, own: Monitor, inputs: int, held: Bool[Tensor, "input position"] | None) -> None:
        self.own, self.inputs, self.held = own, inputs, held
        self.left = {site.path: site.n_calls for site in own.sites}
        self.originals = {site.path: site.module.forward for site in own.sites}
        thresholds = own.watched[own.sites[0].path].thresholds
        self.found = [thresholds.new_zeros(inputs, len(own.components))]

    def __call__(self, site: Site, index: int, operands: Operands) -> Any:
        pieces, thresholds, columns = self.own.watched[site.path]
        a = pieces.activations(without_padding(site.read(operands, pieces.v), self.held))
        strength = torch.maximum(a / thresholds[0], -a / thresholds[1])
        rows = self.inputs if a.ndim > 1 and len(a) == self.inputs else 1
        by_input = strength.reshape(rows, -1, pieces.n).amax(1).expand(self.inputs, -1)
        self.found.append(by_input[:, :, None].where(columns, 0).amax(1))
        self.left[site.path] -= 1
        if all(n <= 0 for n in self.left.values()):
            raise _Enough
        return self.originals[site.path](*operands)
