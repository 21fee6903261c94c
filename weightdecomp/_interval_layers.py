"""How intervals pass through softmax, normalisation and attention, with what their entries share."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weightdecomp._interval import SLACK, Interval, constant, widened
from weightdecomp._interval_rules import RULES as RULES
from weightdecomp._interval_rules import floating, rule

# --- softmax ---


def _others(x: Tensor) -> Tensor:
    """For every entry the logsumexp of the other entries of its row, without cancellation."""
    nothing = torch.full_like(x[..., :1], -torch.inf)

    def before(row: Tensor) -> Tensor:
        return torch.cat([nothing, row[..., :-1].logcumsumexp(-1)], -1)

    return torch.logaddexp(before(x), before(x.flip(-1)).flip(-1))


def log_odds(x: Interval, dim: int) -> Interval:
    """The log odds x_i - logsumexp(x_j, j != i), whose sigmoid is softmax; exact, since x_i occurs once."""
    lo, hi = x.lo.movedim(dim, -1), x.hi.movedim(dim, -1)
    least, most = _others(lo), _others(hi)
    magnitude = sum(part.abs().nan_to_num(posinf=0) for part in (lo, hi, least, most)) + 1
    odds = widened(lo - most, hi - least, magnitude)
    return odds.movedim(-1, dim)


@rule("softmax")
def _softmax(x: Interval, dim: int, _stacklevel: Any = 3, dtype: torch.dtype | None = None) -> Interval:
    floating(dtype)
    return log_odds(x, dim).sigmoid()


@rule("log_softmax")
def _log_softmax(x: Interval, dim: int, _stacklevel: Any = 3, dtype: torch.dtype | None = None) -> Interval:
    floating(dtype)
    return F.logsigmoid(log_odds(x, dim))  # type: ignore[reportArgumentType]


# --- normalisation ---


def _centred(x: Interval) -> Interval:
    """Minus the mean of the last dimension: exact, each entry occurring once with its whole coefficient."""
    n, radius = x.shape[-1], x.radius
    center = x.center - x.center.mean(-1, keepdim=True)
    spread = (radius * (1 - 2 / n)).clamp_min(0) + radius.mean(-1, keepdim=True)
    magnitude = x.center.abs() + radius + (x.center.abs() + radius).mean(-1, keepdim=True)
    return widened(center - spread, center + spread, magnitude)


def _square_sum(x: Interval, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the sum of squares over the last dimension: by entries, and by the triangle inequality."""
    squares = x.square()
    norm, reach = x.center.norm(dim=-1, keepdim=True), radius.norm(dim=-1, keepdim=True)
    lo = torch.maximum(squares.lo.sum(-1, keepdim=True), (norm * (1 - SLACK) - reach).clamp_min(0).square())
    hi = torch.minimum(squares.hi.sum(-1, keepdim=True), (norm + reach).square())
    return lo * (1 - SLACK), hi * (1 + SLACK)


def _normalised(x: Interval, radius: Tensor, eps: float) -> Interval:
    r"""Divide by the root mean square of the last dimension, each entry's own square kept with it.

    The radius is that of x before centring, a projection that makes no distance from the centre longer.

    :math:`y_i = x_i / \sqrt{(x_i^2 + s) / n + \epsilon}` rises in :math:`x_i` and its size falls in :math:`s
    = \sum_{j \ne i} x_j^2`, so its ends are at ends of the two. Never beyond :math:`\pm\sqrt n`. Source:
    ours.
    """
    n, own, (least, most) = x.shape[-1], x.square(), _square_sum(x, radius)
    others_lo = (own.lo.sum(-1, keepdim=True) - own.lo - SLACK * own.lo.sum(-1, keepdim=True)).clamp_min(0)
    others_hi = (own.hi.sum(-1, keepdim=True) - own.hi + SLACK * own.hi.sum(-1, keepdim=True)).clamp_min(0)

    def largest(end: Tensor) -> Tensor:
        few = torch.maximum(others_lo, least - end.square() - SLACK * least)
        many = torch.minimum(others_hi, most - end.square() + SLACK * most).clamp_min(0)
        return end / ((end.square() + torch.where(end > 0, few, many)) / n + eps).sqrt()

    return widened(-largest(-x.lo), largest(x.hi))


def _scaled(x: Interval, weight: Tensor | None, bias: Tensor | None) -> Interval:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@rule("layer_norm")
def _layer_norm(
    x: Interval,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Interval:
    rows = x.flatten(-len(normalized_shape))
    return _scaled(_normalised(_centred(rows), rows.radius, eps).reshape(x.shape), weight, bias)


@rule("rms_norm")
def _rms_norm(
    x: Interval, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Interval:
    if eps is None and weight is None:
        raise TypeError("without eps and weight its eps is that of the input's dtype, which an interval has not")
    eps = torch.finfo(weight.dtype).eps if eps is None and weight is not None else eps
    rows = x.flatten(-len(normalized_shape))
    return _scaled(_normalised(rows, rows.radius, eps or 0.0).reshape(x.shape), weight, None)


@rule("group_norm")
def _group_norm(
    x: Interval,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Interval:
    groups = x.reshape(x.shape[0], num_groups, -1)
    weight, bias = (None if part is None else _channels(part, x.ndim) for part in (weight, bias))
    return _scaled(_normalised(_centred(groups), groups.radius, eps).reshape(x.shape), weight, bias)


def _channels(values: Tensor, ndim: int) -> Tensor:
    return constant(values).reshape(-1, *[1] * (ndim - 2))


@rule("batch_norm")
def _batch_norm(
    x: Interval,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Interval:
    if training or running_mean is None:
        raise TypeError("only in eval mode with running statistics")
    mean, variance = _channels(running_mean, x.ndim), _channels(running_var, x.ndim)
    weight, bias = (None if part is None else _channels(part, x.ndim) for part in (weight, bias))
    scale = (variance + eps).rsqrt()
    return _scaled((x - mean) * scale, weight, bias)


# --- attention ---


@rule("scaled_dot_product_attention")
def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Interval:
    if dropout_p:
        raise TypeError("only without dropout")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = Interval.of(constant(query) @ constant(key.mT)) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    return _mixture(scores.softmax(-1), Interval.of(value))


def _mixture(shares: Interval, values: Interval) -> Interval:
    """Shares times values, where the shares of a row sum to one."""
    size = torch.maximum(values.lo.abs(), values.hi.abs()).amax(-2, keepdim=True)
    top = partial(_best_mixture, shares.lo, shares.hi)
    return widened(-top(-values.lo), top(values.hi), size)


def _best_mixture(least: Tensor, most: Tensor, values: Tensor) -> Tensor:
    """The largest sum_k p_k values_k, least <= p <= most, sum_k p_k = 1: fill up from the largest value."""
    values, order = values.sort(dim=-2, descending=True)
    order = order.expand(*least.shape[:-2], *order.shape[-2:])
    rows = []
    for low, high in zip(least.unbind(-2), most.unbind(-2), strict=True):
        base = low.unsqueeze(-1).expand(order.shape).gather(-2, order)
        room = (high - low).unsqueeze(-1).expand(order.shape).gather(-2, order)
        left = 1 - base.sum(-2, keepdim=True) - (room.cumsum(-2) - room)
        rows.append(((base + torch.minimum(room, left.clamp_min(0))) * values).sum(-2))
    return torch.stack(rows, -2)


# --- dropout ---


@rule("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout")
def _dropout(x: Interval, p: float = 0.5, training: bool = True) -> Interval:
    if training:
        raise TypeError("only in eval mode")
    return x
