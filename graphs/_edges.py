"""Edges: effects of all sources of a pass on all its targets, by gradients; interventions are in `_removal`."""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from graphs._columns import FeedSources, Key, token_feed
from graphs._scene import FIRST_FEED, Scene, Targets, readout, values_in
from graphs._trace import Trace
from weightdecomp import NumericalWarning

_AT_ONCE = 1 << 23  # numbers in the gradients of one call of autograd
_MISSED = 0.01  # of the change from nothing that a path may miss without a warning


class Block(NamedTuple):
    """Effects between the targets of one event and the sources of one leaf, over the inputs of a batch."""

    targets: Sequence[Key]
    sources: Sequence[Key]
    weights: Float[Tensor, "target input source"]


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

    They sum to the target's change from nothing, exactly where that is a polynomial of a degree below 2 x steps, and
    not where it jumps at nothing, as a norm does; a warning says so.
    Source: Aumann-Shapley values; integrated gradients (Sundararajan et al. 2017), taken over all sources at once.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    held, passes = [event.rows.detach() for event in scene.trace.events], []
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        trace = scene.again(held, float(node))
        # Gradients are taken at leaves that are scaled afterwards.
        passes.append(Pass(trace, _scaled_targets(scene, trace), float(weight / node)))
    yield from looked_up(scene)
    summed = [torch.zeros_like(own.values) for own in scene.targets]
    number = {key: (k, i) for k, own in enumerate(scene.targets) for i, key in enumerate(own.keys)}
    for block in _graded(scene, passes):
        k, first = number[block.targets[0]]
        summed[k][:, first : first + len(block.targets)] += block.weights.sum(-1).T
        yield block
    _check_reached(scene, summed, scene.again(held, 0.0))


def _check_reached(scene: Scene, summed: Sequence[Tensor], nothing: Trace) -> None:
    """Warn where effects along a path do not sum to the change from nothing."""
    missed, changed = [], []
    for k, own in enumerate(scene.targets):
        # A lookup does not follow its token's path.
        if k < len(scene.trace.events) and token_feed(scene.trace.events[k], scene.trace.feeds) is not None:
            continue
        change = own.values - values_in(scene, nothing, k)
        missed.append(float((change - summed[k]).abs().sum()))
        changed.append(float(change.abs().sum()))
    share = sum(missed) / max(sum(changed), 1e-300)
    if share > _MISSED:
        worst = missed.index(max(missed))
        name = scene.trace.events[worst].site.path if worst < len(scene.trace.events) else "output"
        warnings.warn(
            f"effects along a path miss {share:.0%} of the change from nothing, most of it at {name!r}: a norm jumps "
            "at nothing, or steps= are too few. There they are no estimate; use effects='gradient' or 'removal'",
            NumericalWarning,
            stacklevel=3,
        )


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
        pieces = scene.units[event.site.path].pieces
        if pieces.rank_one:
            found.append(own)
            continue
        before = readout(pieces, base.inner.detach())
        ratio = torch.where(before != 0, readout(pieces, event.inner.detach()) / before, 0)
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
            blocks = [
                Block(own.keys[start:stop], scene.sources[i].keys, torch.stack(weights).sum(0))
                for i, weights in zip(chosen, zip(*total, strict=True), strict=True)
            ]
            yield from [_joined(blocks)] if scene.spanning else blocks


def _joined(blocks: Sequence[Block]) -> Block:
    """One block of several leaves, in which a unit that writes at several of them has one effect."""
    keys = list(dict.fromkeys(key for block in blocks for key in block.sources))
    place = {key: i for i, key in enumerate(keys)}
    weights = blocks[0].weights.new_zeros(*blocks[0].weights.shape[:2], len(keys))
    for block in blocks:
        columns = torch.tensor([place[key] for key in block.sources], dtype=torch.long, device=weights.device)
        weights.index_add_(2, columns, block.weights)
    return Block(blocks[0].targets, keys, weights)


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
