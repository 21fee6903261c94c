"""Scene: the sources and targets of one pass, from which edges are made."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graphs._columns import Columns, Key, feed_columns, site_columns
from graphs._trace import Event, Reader, Trace, by_position, parents, traced
from graphs._units import Units, written_at
from weightdecomp.engine import Batch, Pieces, Site, tensors

FIRST_FEED = -1  # feeds are numbered downwards from here, as `Trace.leaves` does


class Targets(NamedTuple):
    """What edges lead to at one event, or at the output.

    Attributes:
        keys: One a target.
        values: Activation of each, its gate's closed positions left out.
        seeds: `seeds(start, stop)` gives the cotangents of some targets at the event's inner activations.
    """

    keys: list[Key]
    values: Float[Tensor, "input target"]
    seeds: Callable[[int, int], Tensor]


class Scene(NamedTuple):
    """Everything that the edges of one batch are made from.

    Attributes:
        model: The target.
        sites: Its sites.
        units: What is read and written at each.
        batch: The inputs.
        n: Number of inputs.
        trace: The pass at the target's own values.
        sources: Columns of every leaf, by its number.
        targets: Of every event, and last of the output.
        shown: Per site and call, which units are shown where.
        positions: Whether positions are kept apart.
        parents: Of every event, and last of the output.
    """

    model: torch.nn.Module
    sites: Sequence[Site]
    units: Mapping[str, Units]
    batch: Batch
    n: int
    trace: Trace
    sources: Mapping[int, Columns]
    targets: Sequence[Targets]
    shown: Mapping[str, Sequence[Bool[Tensor, "input position unit"]]]
    positions: bool
    parents: Sequence[set[int]]

    def again(self, held: Sequence[Tensor], scale: float = 1.0, batch: Batch | None = None) -> Trace:
        """Another pass of the cut target, with other outputs of its sites; see `traced`."""
        entering = self.batch if batch is None else batch
        return traced(self.model, self.sites, readers(self.units), entering, held, scale)

    @property
    def spanning(self) -> bool:
        """Whether some unit writes at several sites."""
        return any(len(own.writes) > 1 for own in self.units.values())


def readers(units: Mapping[str, Units]) -> dict[str, Reader]:
    """What each site's units read."""
    return {path: own.inner for path, own in units.items()}


class Choice(NamedTuple):
    """What is shown of a batch.

    Attributes:
        shown: Per site and call, which units are shown where.
        kind: "component", "circuit" or "unit".
        outputs: Output indices.
        positions: Whether positions are kept apart.
        output_positions: Positions of the output that are shown; None for all.
        input_name: What inputs are called.
        output_name: What the output is called.
    """

    shown: Mapping[str, Sequence[Bool[Tensor, "*batch unit"]]]
    kind: str
    outputs: Sequence[int]
    positions: bool
    output_positions: Sequence[int] | None
    input_name: str
    output_name: str


def staged(
    model: torch.nn.Module,
    sites: Sequence[Site],
    units: Mapping[str, Units],
    batch: Batch,
    trace: Trace,
    choice: Choice,
) -> Scene:
    """Sources and targets of one batch."""
    n = len(tensors(batch)[0])
    sources, targets = {}, []
    for i, feed in enumerate(trace.feeds):
        columns = feed_columns(feed, trace, choice.input_name, n, choice.positions)
        if columns is not None:
            sources[FIRST_FEED - i] = columns
    shown = {path: [by_position(own, n).bool() for own in calls] for path, calls in choice.shown.items()}
    for number, event in enumerate(trace.events):
        written = written_at(event, trace, units, shown)
        sources[number] = site_columns(event, written, choice.kind, choice.positions)
        own = units[event.site.path].pieces
        targets.append(_site_targets(event, own, shown[event.site.path][event.call], choice))
    targets.append(_output_targets(trace.output, n, choice))
    return Scene(model, sites, units, batch, n, trace, sources, targets, shown, choice.positions, parents(trace))


def readout(own: Pieces, inner: Tensor) -> Tensor:
    """What each piece's inner activation counts in its component's activation.

    A rank-one component's activation is linear in v.x. That of a higher rank is a norm, whose gradient this is; where
    the norm is 0 it has none, and 0 is taken.
    """
    sizes = own.u.norm(dim=-1)
    if own.rank_one:
        return sizes.expand(inner.shape)
    gram = (own.u @ own.u.T) * (own.owner[:, None] == own.owner[None, :])
    norms = own.activations(inner).abs()[..., own.owner]
    several = (own.ranks() > 1)[own.owner]
    return torch.where(several, torch.where(norms > 0, (inner @ gram) / norms, 0), sizes)


def _site_targets(event: Event, own: Pieces, shown: Tensor, choice: Choice) -> Targets:
    n, several = len(shown), event.site.n_calls > 1
    inner = by_position(event.inner.detach(), n)
    counts = readout(own, inner) * shown[..., own.owner]
    live = shown.any(0)
    places = live.nonzero().tolist() if choice.positions else [(None, c) for c in live.any(0).nonzero()[:, 0].tolist()]
    has_positions = choice.positions and (event.rows.ndim > 2 or len(event.rows) != n)
    call = event.call if several else None
    keys = [Key(choice.kind, event.site.path, c, call, p if has_positions else None) for p, c in places]
    component = torch.tensor([c for _, c in places], dtype=torch.long, device=inner.device)
    position = torch.tensor([p or 0 for p, _ in places], dtype=torch.long, device=inner.device)

    def seeds(start: int, stop: int) -> Tensor:
        own_piece = own.owner[None, :] == component[start:stop, None]
        found = counts[None] * own_piece[:, None, None, :]
        if choice.positions:
            found = found * _at(position[start:stop], inner.shape[1], inner.dtype)[:, None, :, None]
        return found.reshape(-1, *event.inner.shape)

    by_piece = counts * inner
    by_component = by_piece.new_zeros(*by_piece.shape[:-1], own.n).index_add_(-1, own.owner, by_piece)
    values = by_component[:, position, component] if choice.positions else by_component.sum(1)[:, component]
    return Targets(keys, values, seeds)


def _at(position: Tensor, n_positions: int, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.one_hot(position, n_positions).to(dtype)


def _output_targets(output: Tensor, n: int, choice: Choice) -> Targets:
    values = by_position(output.detach(), n)
    several = output.ndim > 2
    every = range(values.shape[1]) if choice.output_positions is None else choice.output_positions
    places: list[tuple[int | None, int]]
    places = (
        [(p, o) for p in every for o in choice.outputs] if choice.positions else [(None, o) for o in choice.outputs]
    )
    kept = torch.zeros(values.shape[1], dtype=values.dtype, device=values.device)
    kept[list(every)] = 1
    keys = [Key("output", choice.output_name, o, None, p if several else None) for p, o in places]

    def seeds(start: int, stop: int) -> Tensor:
        found = values.new_zeros(stop - start, *values.shape)
        for i, (p, o) in enumerate(places[start:stop]):
            if p is None:
                found[i, :, :, o] = kept
            else:
                found[i, :, p, o] = 1
        return found.reshape(-1, *output.shape)

    shown = [values[:, p, o] if p is not None else values[:, :, o] @ kept for p, o in places]
    return Targets(keys, torch.stack(shown, 1) if shown else values.new_zeros(n, 0), seeds)


def values_in(scene: Scene, trace: Trace, k: int) -> Float[Tensor, "input target"]:
    """Activations of an event's targets in another pass."""
    own = scene.targets[k]
    if k == len(trace.events):
        now = by_position(trace.output.detach(), scene.n)
    else:
        event = trace.events[k]
        now = by_position(event.inner.detach(), scene.n)
        pieces = scene.units[event.site.path].pieces
        if not pieces.rank_one:
            return _norms(own, pieces, now, scene, k)
    seeds = own.seeds(0, len(own.keys)).reshape(len(own.keys), *now.shape)
    return (seeds * now).sum((2, 3)).T


def _norms(own: Targets, pieces: Pieces, now: Tensor, scene: Scene, k: int) -> Float[Tensor, "input target"]:
    event = scene.trace.events[k]
    sizes = pieces.activations(now) * scene.shown[event.site.path][event.call]
    component = torch.tensor([key.number for key in own.keys], dtype=torch.long)
    if not scene.positions:
        return sizes.sum(1)[:, component]
    position = torch.tensor([key.position or 0 for key in own.keys], dtype=torch.long)
    return sizes[:, position, component]
