"""Edges: effects of all sources of a pass on all its targets, by gradients; interventions are in `_removal`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graphs._columns import Columns, FeedSources, Key, by_position, feed_columns, site_columns, token_feed
from graphs._trace import Event, Trace, parents, traced
from weightdecomp.engine import Batch, Pieces, Site, tensors

_AT_ONCE = 1 << 23  # numbers in the gradients of one call of autograd
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


class Block(NamedTuple):
    """Effects between the targets of one event and the sources of one leaf, over the inputs of a batch."""

    targets: Sequence[Key]
    sources: Sequence[Key]
    weights: Float[Tensor, "target input source"]


class Scene(NamedTuple):
    """Everything that the edges of one batch are made from.

    Attributes:
        model: The target.
        sites: Its sites.
        pieces: Their components, or circuits.
        batch: The inputs.
        n: Number of inputs.
        trace: The pass at the target's own values.
        sources: Columns of every leaf, by its number.
        targets: Of every event, and last of the output.
        parents: Of every event, and last of the output.
    """

    model: torch.nn.Module
    sites: Sequence[Site]
    pieces: Mapping[str, Pieces]
    batch: Batch
    n: int
    trace: Trace
    sources: Mapping[int, Columns]
    targets: Sequence[Targets]
    parents: Sequence[set[int]]


class Choice(NamedTuple):
    """What is shown of a batch.

    Attributes:
        shown: Per site and call, which components are shown where.
        kind: "component" or "circuit".
        outputs: Output indices.
        positions: Whether positions are kept apart.
        output_positions: Positions of the output that are shown; None for all.
        input_name: What inputs are called.
        output_name: What the output is called.
    """

    shown: Mapping[str, Sequence[Bool[Tensor, "*batch component"]]]
    kind: str
    outputs: Sequence[int]
    positions: bool
    output_positions: Sequence[int] | None
    input_name: str
    output_name: str


def staged(
    model: torch.nn.Module,
    sites: Sequence[Site],
    pieces: Mapping[str, Pieces],
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
    for number, event in enumerate(trace.events):
        own = pieces[event.site.path]
        shown = by_position(choice.shown[event.site.path][event.call], n).bool()
        sources[number] = site_columns(event, own, shown, choice.kind, choice.positions)
        targets.append(_site_targets(event, own, shown, choice))
    targets.append(_output_targets(trace.output, n, choice))
    return Scene(model, sites, pieces, batch, n, trace, sources, targets, parents(trace))


def _readout(own: Pieces, inner: Tensor) -> Tensor:
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
    counts = _readout(own, inner) * shown[..., own.owner]
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


class Pass(NamedTuple):
    """One pass whose gradients count with a factor."""

    trace: Trace
    targets: Sequence[Targets]
    factor: float


def by_gradient(scene: Scene) -> Iterator[Block]:
    """First-order effects at the target's own values: gradient times contribution."""
    yield from looked_up(scene)
    yield from _graded(scene, [Pass(scene.trace, scene.targets, 1.0)])


def by_path(scene: Scene, steps: int) -> Iterator[Block]:
    """Effects averaged while all sources are scaled from nothing to what they are (Gauss-Legendre nodes).

    They sum to the target's change from nothing, exactly where that is a polynomial of a degree below 2 x steps.
    Source: Aumann-Shapley values; integrated gradients (Sundararajan et al. 2017), taken over all sources at once.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    held, passes = [event.rows.detach() for event in scene.trace.events], []
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        trace = traced(scene.model, scene.sites, scene.pieces, scene.batch, held, float(node))
        # Gradients are taken at leaves that are scaled afterwards.
        passes.append(Pass(trace, _scaled_targets(scene, trace), float(weight / node)))
    yield from looked_up(scene)
    yield from _graded(scene, passes)


def _products(output: Tensor, leaves: Sequence[Tensor], seeds: Tensor) -> Sequence[Tensor]:
    """Vector-Jacobian products of all seeds at once."""
    try:
        return torch.autograd.grad(
            output, leaves, seeds, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
    except RuntimeError:
        # Operations of a user's own may know no batches of gradients; one by one they give the same, or say why not.
        each = [torch.autograd.grad(output, leaves, seed, retain_graph=True, materialize_grads=True) for seed in seeds]
        return [torch.stack(found) for found in zip(*each, strict=True)]


def _scaled_targets(scene: Scene, trace: Trace) -> list[Targets]:
    """The same targets with the cotangents of another pass: the norm of a component of higher rank turns with it."""
    found = []
    for own, event, base in zip(scene.targets, trace.events, scene.trace.events, strict=False):
        pieces = scene.pieces[event.site.path]
        if pieces.rank_one:
            found.append(own)
            continue
        before = _readout(pieces, base.inner.detach())
        ratio = torch.where(before != 0, _readout(pieces, event.inner.detach()) / before, 0)
        found.append(own._replace(seeds=lambda a, b, f=own.seeds, r=ratio: f(a, b) * r))
    return [*found, scene.targets[-1]]


def _graded(scene: Scene, passes: Sequence[Pass]) -> Iterator[Block]:
    for number, own in enumerate(scene.targets):
        chosen = [i for i, _ in scene.trace.leaves(number) if i in scene.parents[number] and i in scene.sources]
        if not chosen or not own.keys:
            continue
        leaves = dict(scene.trace.leaves(number))
        most = max(1, _AT_ONCE // max(1, sum(leaves[i].numel() for i in chosen)))
        for start in range(0, len(own.keys), most):
            stop = min(start + most, len(own.keys))
            total = [_weights(scene, one, number, chosen, start, stop) for one in passes]
            for i, weights in zip(chosen, zip(*total, strict=True), strict=True):
                yield Block(own.keys[start:stop], scene.sources[i].keys, torch.stack(weights).sum(0))


def _weights(
    scene: Scene, one: Pass, number: int, chosen: Sequence[int], start: int, stop: int
) -> list[Float[Tensor, "target input column"]]:
    """Effects on some targets of one event in one pass, per leaf: all vector-Jacobian products at once."""
    trace = one.trace
    output = trace.events[number].inner if number < len(trace.events) else trace.output
    leaves = dict(trace.leaves(number))
    seeds = one.targets[number].seeds(start, stop)
    grads = _products(output, [leaves[i] for i in chosen], seeds)
    return [scene.sources[i].weights(grad) * one.factor for i, grad in zip(chosen, grads, strict=True)]


def looked_up(scene: Scene) -> Iterator[Block]:
    """A lookup has no gradient: its token is all that drives it."""
    for event, own in zip(scene.trace.events, scene.targets, strict=False):
        i = token_feed(event, scene.trace.feeds)
        if i is None or not own.keys:
            continue
        columns, inner = scene.sources[FIRST_FEED - i], event.inner.detach()
        assert isinstance(columns.parts, FeedSources)
        most = max(1, _AT_ONCE // inner.numel())
        for start in range(0, len(own.keys), most):
            stop = min(start + most, len(own.keys))
            effects = (own.seeds(start, stop) * inner).sum(-1).reshape(stop - start, scene.n, -1)
            yield Block(own.keys[start:stop], columns.keys, columns.parts.scattered(effects))
