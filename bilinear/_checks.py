"""Checks at the boundary: what users pass in, refused by the name that they typed."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor


def check_tensor(name: str, tensor: object, shape: Sequence[int | None], like: Tensor | None = None) -> None:
    """Refuse what is no finite floating point tensor of this shape, dtype and device.

    Args:
        name: As the user knows it.
        tensor: What came.
        shape: Expected sizes; None is any.
        like: A tensor whose dtype and device it must share.

    Raises:
        TypeError: For no tensor, or one of another dtype or device.
        ValueError: For another shape, or NaN or infinity.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}; convert it with .float()")
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}, expected {like.dtype} on {like.device} like the layer"
        )
    fits = tensor.ndim == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({wanted}{',' * (len(shape) == 1)})")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} contains NaN or infinity")


def check_inputs(name: str, x: object, d_in: int, like: Tensor) -> None:
    """Refuse inputs whose last dimension is not d_in, or that are no finite tensor of the layer's dtype."""
    if isinstance(x, Tensor) and x.ndim == 0:
        raise ValueError(f"{name} is a single number, expected (..., {d_in})")
    shape = [None] * (x.ndim - 1) + [d_in] if isinstance(x, Tensor) else [d_in]
    check_tensor(name, x, shape, like)


def check_count(name: str, value: object, most: int, of: str) -> None:
    """Refuse a count that is no integer in 1..most."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 1 <= int(value) <= most:
        raise ValueError(f"{name} must be between 1 and {most} ({of}), got {value}")
