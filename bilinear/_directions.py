"""Directions: which outputs, or combinations of outputs, a question is about."""

from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_tensor

Direction = Any  # int, numbers or rows of numbers (sequences, arrays, tensors); checked by `direction_rows`


def direction_rows(direction: Direction | None, d_out: int, like: Tensor) -> Float[Tensor, "direction d_out"]:
    """Output directions as rows; an integer is that output, None all of them.

    Args:
        direction: As a user gave it.
        d_out: Outputs of the layer.
        like: A tensor whose dtype and device the rows have.

    Raises:
        ValueError: For an output that does not exist, or directions of another width.
        TypeError: For what is neither an integer nor numbers.
    """
    if direction is None:
        return torch.eye(d_out, dtype=like.dtype, device=like.device)
    if isinstance(direction, Integral):
        number = int(direction)
        if not -d_out <= number < d_out:
            raise ValueError(f"direction {number}: the layer has outputs 0 to {d_out - 1}")
        return direction_rows(None, d_out, like)[[number]]
    rows = direction if isinstance(direction, Tensor) else _converted(direction, like)
    if rows.ndim == 1:
        if len(rows) != d_out:
            raise ValueError(
                f"direction has {len(rows)} numbers, expected {d_out}, one an output; several outputs are rows, "
                f"torch.eye({d_out})[numbers]"
            )
        check_tensor("direction", rows, (d_out,), like)
        return rows[None]
    check_tensor("directions", rows, (None, d_out), like)
    if not len(rows):
        raise ValueError("directions are empty, expected at least one row; None is all outputs")
    return rows


def _converted(direction: Any, like: Tensor) -> Tensor:
    """Numbers, or rows of them, as a tensor."""
    try:
        if not isinstance(direction, np.ndarray):
            direction = [one.tolist() if isinstance(one, Tensor) else one for one in direction]
        return torch.as_tensor(np.asarray(direction, dtype=np.float64)).to(like)
    except (TypeError, ValueError) as error:
        raise TypeError(f"direction must be an output's number, numbers, or rows of numbers: {error}") from error


def one_direction(direction: Direction | None) -> bool:
    """Whether one direction was asked for, without a leading axis."""
    if direction is None or isinstance(direction, Integral):
        return direction is not None
    return np.ndim(direction[0]) == 0
