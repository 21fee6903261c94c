"""Removal: effects as interventions, one pass of the cut target for every source that is taken away."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from graphs._columns import Columns, FeedSources, SiteSources
from graphs._edges import Block, by_gradient, looked_up
from graphs._scene import FIRST_FEED, Scene, values_in
from weightdecomp.engine import Batch


def by_removal(scene: Scene) -> Iterator[Block]:
    """Effects of taking every source away, all other sites' outputs held: one pass of the cut target a source."""
    if scene.spanning:
        raise ValueError(
            "effects='removal' takes a unit away at one site, but some of these write at several; use 'gradient'"
        )
    held = [event.rows.detach() for event in scene.trace.events]
    for i, columns in scene.sources.items():
        if i < 0:
            yield from _removed_feeds(scene, held, i, columns)
        else:
            yield from _removed_at_site(scene, held, i, columns)


def _removed_at_site(scene: Scene, held: Sequence[Tensor], i: int, columns: Columns) -> Iterator[Block]:
    parts = columns.parts
    assert isinstance(parts, SiteSources)
    affected = [k for k in range(i + 1, len(scene.targets)) if i in scene.parents[k] and scene.targets[k].keys]
    changes: dict[int, list[Tensor]] = {k: [] for k in affected}
    for column in parts.chosen.tolist():
        other = list(held)
        other[i] = (held[i].reshape(parts.rows.shape) - _contribution(parts, column)).reshape(held[i].shape)
        trace = scene.again(other)
        for k in affected:
            changes[k].append(scene.targets[k].values - values_in(scene, trace, k))
    for k in affected:
        weights = torch.stack(changes[k], -1).transpose(0, 1)
        yield Block(scene.targets[k].keys, columns.keys, weights)


def _contribution(parts: SiteSources, column: int) -> Float[Tensor, "input position d_out"]:
    """What one column adds to the site's rows; a bias counts among them."""
    own, width = parts.pieces, parts.pieces.n + 2
    position, index = divmod(column, width)
    if index < own.n:
        piece = own.owner == index
        rows = (parts.inner[..., piece] @ own.u[piece]) * parts.open[..., index, None]
    elif index == own.n:
        rows = parts.rows - (parts.inner * parts.open[..., own.owner]) @ own.u
    else:
        assert parts.bias is not None
        rows = parts.bias.expand(parts.rows.shape)
    if not parts.positions:
        return rows
    only = torch.zeros_like(rows)
    only[:, position] = rows[:, position]
    return only


def _removed_feeds(scene: Scene, held: Sequence[Tensor], i: int, columns: Columns) -> Iterator[Block]:
    """A float input's features are set to 0; tokens cannot be, and keep their gradients."""
    feed, parts = scene.trace.feeds[FIRST_FEED - i], columns.parts
    affected = [k for k, found in enumerate(scene.parents) if i in found and scene.targets[k].keys]
    if feed.ids is not None:
        if feed.leaf is not None:
            yield from (block for block in by_gradient(scene) if block.sources is columns.keys)
            return
        yield from (block for block in looked_up(scene) if block.sources is columns.keys)
        return
    assert isinstance(parts, FeedSources)
    assert feed.leaf is not None
    x = feed.leaf.detach()
    changes: dict[int, list[Tensor]] = {k: [] for k in affected}
    for c in range(len(columns.keys)):
        value = parts.value.clone()
        width = 1 if parts.grouped else value.shape[-1]
        position, feature = divmod(c, width)
        at = slice(position, position + 1) if parts.positions else slice(None)
        value[:, at, slice(None) if parts.grouped else feature] = 0
        batch = _with(scene.batch, x, _back(value, x, parts.feature_axis))
        trace = scene.again(held, batch=batch)
        for k in affected:
            changes[k].append(scene.targets[k].values - values_in(scene, trace, k))
    for k in affected:
        yield Block(scene.targets[k].keys, columns.keys, torch.stack(changes[k], -1).transpose(0, 1))


def _back(value: Tensor, like: Tensor, axis: int) -> Tensor:
    """Features of flattened positions in the layout of the model's input."""
    if like.ndim == 1 or axis == -1:
        return value.reshape(like.shape)
    return value.reshape(like.movedim(axis, -1).shape).movedim(-1, axis)


def _with(batch: Batch, before: Tensor, after: Tensor) -> Batch:
    def swap(x: object) -> object:
        return after if isinstance(x, Tensor) and x.data_ptr() == before.data_ptr() else x

    if isinstance(batch, Tensor):
        return after
    if isinstance(batch, Mapping):
        return {name: swap(x) for name, x in batch.items()}
    return tuple(swap(x) for x in batch)
