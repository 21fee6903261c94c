"""Biases that may be absent: None is 0."""

import torch
from torch import Tensor


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of both."""
    return b if a is None else a if b is None else a + b


def or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    """The value, or zeros like another tensor."""
    return torch.zeros_like(like) if value is None else value


def with_column(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A matrix with its bias as a column in front, for a constant 1 in front of what it reads."""
    return torch.cat([or_zero(bias, weight[:, 0])[:, None], weight], 1)
