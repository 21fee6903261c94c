"""Factors: a layer in its coordinates with nothing but products, and the symmetric forms that these make."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Factors(NamedTuple):
    r"""A layer with nothing but products: :math:`y = d[(w \tilde x) \circ (v \tilde x)]`.

    Attributes:
        w: (hidden, coordinate).
        v: (hidden, coordinate).
        d: (d_out, hidden).
    """

    w: Float[Tensor, "hidden coordinate"]
    v: Float[Tensor, "hidden coordinate"]
    d: Float[Tensor, "d_out hidden"]


def forms(factors: Factors, directions: Tensor) -> Float[Tensor, "direction coordinate coordinate"]:
    """Symmetric forms of several directions. Never an outer product over neurons: one matrix product a direction."""
    found = torch.stack([(factors.w.T * row) @ factors.v for row in directions @ factors.d])
    return (found + found.mT) / 2


def linear_factors(linear: Float[Tensor, "d_out _"], n: int) -> Factors:
    """A linear map of the coordinates as products with the constant; one neuron an output, or a column if fewer."""
    d_out, width = linear.shape
    eye = torch.eye(max(n, d_out), dtype=linear.dtype, device=linear.device)
    if width < d_out:
        return Factors(eye[:1, :n].expand(width, n), eye[:width, :n], linear)
    v = torch.cat([linear, linear.new_zeros(d_out, n - width)], 1)
    return Factors(eye[:1, :n].expand(d_out, n), v, eye[:d_out, :d_out])


def joined(a: Factors, b: Factors) -> Factors:
    """Neurons of both side by side: the sum."""
    return Factors(torch.cat([a.w, b.w]), torch.cat([a.v, b.v]), torch.cat([a.d, b.d], 1))
