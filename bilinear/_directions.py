"""Directions: which outputs, or combinations of outputs, a question is about."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_tensor

Direction = Any  # int, sequence of floats or Tensor; checked by `direction_rows`


def direction_rows(direction: Direction | None, d_out: int, like: Tensor) -> Float[Tensor, "direction d_out"]:
    """Output directions as rows; an integer is that output, None all of them.

    Args:
        direction: As a user gave it.
        d_out: Outputs of the layer.
        like: A tensor whose dtype and device the rows have.

    Raises:
        ValueError: For an output that does not exist, or directions of another width.
    """
    if direction is None:
        return torch.eye(d_out, dtype=like.dtype, device=like.device)
    if isinstance(direction, int):
        if not -d_out <= direction < d_out:
            raise ValueError(f"direction {direction}: the layer has outputs 0 to {d_out - 1}")
        return direction_rows(None, d_out, like)[[direction]]
    if not isinstance(direction, Tensor):
        direction = torch.tensor(direction, dtype=like.dtype, device=like.device)
    if direction.ndim == 1:
        check_tensor("direction", direction, (d_out,), like)
        return direction[None]
    check_tensor("directions", direction, (None, d_out), like)
    return direction


def one_direction(direction: Direction | None) -> bool:
    """Whether one direction was asked for, without a leading axis."""
    if isinstance(direction, Tensor):
        return direction.ndim == 1
    return isinstance(direction, int) or (direction is not None and not isinstance(direction[0], Sequence))
