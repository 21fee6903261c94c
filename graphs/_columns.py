"""Columns: the places that edges lead from, and how much of a gradient each of them carries."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from graphs._trace import Event, Feed, Trace, by_position
from graphs._units import Written
from weightdecomp.engine import Pieces

_MOST_FEATURES = 4096  # of one position; wider inputs are one column a position


UNITS = ("component", "circuit", "unit")
"""Kinds of nodes that are read from a site's input and have a gate."""


class Key(NamedTuple):
    """What a node stands for; its id is made from this.

    Attributes:
        kind: "input", "component", "circuit", "unit", "remainder", "bias" or "output".
        site: Module path, or the name of an input or the output.
        number: Of the component, feature, token or output; None for what a site has one of.
        call: Number of the call where a module runs several times, else None.
        position: Number of the position, or None.
    """

    kind: str
    site: str
    number: int | None
    call: int | None
    position: int | None

    @property
    def id(self) -> str:
        """`site/index@position`; a call stands before the position."""
        place = [str(x) for x in (self.call, self.position) if x is not None]
        what = self.kind if self.number is None else str(self.number)
        return f"{self.site}/{what}" + (f"@{'.'.join(place)}" if place else "")


def rounding(dtype: torch.dtype) -> float:
    """Share of a sum below which a term cannot be told from rounding."""
    return 1e-13 if dtype == torch.float64 else 1e-6


class SiteSources(NamedTuple):
    """Contributions of one call of a site.

    Attributes:
        pieces: Those that write there.
        inner: Their inner activations.
        rows: What the site writes, without its bias and what is written always.
        bias: The bias and what is written always, or None.
        open: Which components are shown where.
        chosen: The columns among (position,) component, remainder, bias.
        positions: Whether positions are kept apart.
    """

    pieces: Pieces
    inner: Float[Tensor, "input position piece"]
    rows: Float[Tensor, "input position d_out"]
    bias: Tensor | None
    open: Bool[Tensor, "input position component"]
    chosen: Int[Tensor, " column"]
    positions: bool

    def weights(self, gradient: Tensor) -> Float[Tensor, "target input column"]:
        """Effect of every column on every target."""
        own, g = self.pieces, gradient.reshape(len(gradient), *self.rows.shape)
        by_piece = (g @ own.u.T) * self.inner
        if not own.rank_one:
            shape = (*by_piece.shape[:-1], own.n)
            by_piece = by_piece.new_zeros(shape).index_add_(-1, own.owner, by_piece)
        shown = by_piece * self.open
        whole = (g * self.rows).sum(-1, keepdim=True)
        bias = whole.new_zeros(whole.shape) if self.bias is None else (g @ self.bias)[..., None]
        every = torch.cat([shown, whole - shown.sum(-1, keepdim=True), bias], -1)
        return (every.flatten(2) if self.positions else every.sum(2))[..., self.chosen]


class FeedSources(NamedTuple):
    """What one feed gives.

    Attributes:
        value: Features of every position, or what was looked up for a token.
        column: For tokens the column of every position, else None.
        feature_axis: Axis of the leaf that counts features.
        n_columns: Number of columns.
        positions: Whether positions are kept apart.
        grouped: Whether the features of a position are one column.
    """

    value: Float[Tensor, "input position feature"]
    column: Int[Tensor, "input position"] | None
    feature_axis: int
    n_columns: int
    positions: bool
    grouped: bool

    def weights(self, gradient: Tensor) -> Float[Tensor, "target input column"]:
        """Effect of every column on every target."""
        if self.column is None:
            g = gradient.movedim(self.feature_axis + 1 if self.feature_axis >= 0 else -1, -1)
            every = g.reshape(len(gradient), *self.value.shape) * self.value
            every = every.sum(-1, keepdim=True) if self.grouped else every
            return every.flatten(2) if self.positions else every.sum(2)
        return self.scattered((gradient.reshape(len(gradient), *self.value.shape) * self.value).sum(-1))

    def scattered(self, effects: Float[Tensor, "target input position"]) -> Float[Tensor, "target input column"]:
        """Effects of positions, summed into the columns of their tokens."""
        assert self.column is not None
        shape = (*effects.shape[:2], self.n_columns)
        return effects.new_zeros(shape).scatter_add_(2, self.column.expand(effects.shape), effects)


class Columns(NamedTuple):
    """Sources at one leaf, ready to be weighed by gradients there.

    Attributes:
        keys: One a column.
        values: Size of each source on every input: contribution, feature or norm.
        parts: What gradients at (position) are multiplied by and summed into: see `weights`.
    """

    keys: list[Key]
    values: Float[Tensor, "input column"]
    parts: SiteSources | FeedSources

    def weights(self, gradient: Tensor) -> Float[Tensor, "target input column"]:
        """Effect of every column on every target, from gradients (target, *leaf's shape)."""
        return self.parts.weights(gradient)


def site_columns(event: Event, written: Written, kind: str, positions: bool) -> Columns:
    """Units that are shown somewhere, the remainder and the bias of one call of a site."""
    pieces, shown, several = written.pieces, written.open, event.site.n_calls > 1
    n = len(shown)
    bias, rows = _constant(event, written.offset), by_position(event.rows.detach(), n) - written.offset
    singles = shown.new_ones(shown.shape[1], 2)
    singles[:, 1] = bias is not None
    keep = torch.cat([shown.any(0), singles], -1)
    chosen = (keep.flatten() if positions else keep.any(0)).nonzero().flatten()
    parts = SiteSources(pieces, written.inner, rows, bias, shown, chosen, positions)
    width = keep.shape[1]
    has_positions = event.rows.ndim > 2 or len(event.rows) != n
    keys = []
    for i in chosen.tolist():
        position, index = divmod(i, width)
        single = ("remainder", "bias")[index - pieces.n] if index >= pieces.n else None
        site, number = (event.site.path, None) if single else written.names[index]
        place = position if positions and has_positions else None
        keys.append(Key(single or kind, site, number, event.call if several else None, place))
    return Columns(keys, _sizes(parts), parts)


def _constant(event: Event, offset: Tensor | float) -> Tensor | None:
    """What a site adds always: its bias, and what units that replace it write always."""
    bias = getattr(event.site.module, "bias", None)
    if bias is None:
        return offset if isinstance(offset, Tensor) else None
    return bias.detach().to(event.rows.dtype) + offset


def _sizes(parts: SiteSources) -> Float[Tensor, "input column"]:
    """Contributions of components, norms of the remainder's and the bias's."""
    own = parts.pieces
    shown = own.activations(parts.inner) * parts.open
    kept = (parts.inner * parts.open[..., own.owner]) @ own.u
    remainder = (parts.rows - kept).norm(dim=-1, keepdim=True)
    # What is rounding is nothing, so that no node stands for it.
    remainder = torch.where(remainder > rounding(kept.dtype) * parts.rows.norm(dim=-1, keepdim=True), remainder, 0)
    bias = torch.zeros_like(remainder) if parts.bias is None else parts.bias.norm().expand(remainder.shape)
    every = torch.cat([shown, remainder, bias], -1)
    return (every.flatten(1) if parts.positions else every.sum(1))[:, parts.chosen]


def feed_columns(feed: Feed, trace: Trace, name: str, n: int, positions: bool) -> Columns | None:
    """The features or tokens of one feed; None for what is neither."""
    site = f"{name}.{feed.name}" if feed.name else name
    if feed.ids is not None:
        return _token_columns(feed, site, n, positions)
    assert feed.leaf is not None
    x = feed.leaf.detach()
    if not x.ndim or len(x) != n:
        return None
    axis = 1 if any(_convolves(event, x) for event in trace.events) else -1
    value = x[:, None, None] if x.ndim == 1 else x.movedim(axis, -1)
    value = by_position(value, n)
    several, grouped = x.ndim > 2, value.shape[-1] > _MOST_FEATURES
    shape = (value.shape[1] if positions else 1, 1 if grouped else value.shape[2])
    keys = [
        Key("input", site, None if grouped else f, None, p if positions and several else None)
        for p in range(shape[0])
        for f in range(shape[1])
    ]
    size = value.norm(dim=-1, keepdim=True) if grouped else value
    sizes = size.flatten(1) if positions else size.sum(1)
    return Columns(keys, sizes, FeedSources(value, None, axis, len(keys), positions, grouped))


def _convolves(event: Event, x: Tensor) -> bool:
    convolution = isinstance(event.site.module, nn.Conv1d | nn.Conv2d)
    return convolution and event.operands[0].shape[1:] == x.shape[1:]


def _token_columns(feed: Feed, site: str, n: int, positions: bool) -> Columns | None:
    assert feed.ids is not None
    if not feed.ids.ndim or len(feed.ids) != n:
        return None
    ids = feed.ids.reshape(n, -1)
    place = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    pairs = torch.stack([ids, place if positions else torch.zeros_like(ids)], -1)
    unique, column = pairs.flatten(0, 1).unique(dim=0, return_inverse=True)
    several = positions and feed.ids.ndim > 1
    keys = [Key("input", site, token, None, place if several else None) for token, place in unique.tolist()]
    column = column.reshape(ids.shape)
    leaf = torch.ones(*ids.shape, 1) if feed.leaf is None else by_position(feed.leaf.detach(), n)
    parts = FeedSources(leaf, column, -1, len(keys), positions, False)
    counts = parts.scattered(torch.ones(1, *ids.shape, dtype=leaf.dtype, device=ids.device))[0]
    return Columns(keys, counts, parts)


def token_feed(event: Event, feeds: Sequence[Feed]) -> int | None:
    """Number of the feed whose token ids a site looks up, or None."""
    ids = event.operands[0]
    if ids.is_floating_point():
        return None
    for i, feed in enumerate(feeds):
        if feed.ids is not None and feed.ids.shape == ids.shape and torch.equal(feed.ids, ids):
            return i
    return None
