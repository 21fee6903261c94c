"""Squares: any set of components of a layer, each a squared reading that writes one output vector."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_inputs
from bilinear._factors import balanced
from bilinear._layer import Layer
from bilinear._metric import check_layer
from bilinear._norm import Norm


@dataclass(frozen=True, eq=False)
class Squares:
    r"""A layer, or a part of one, as a sum of squares: a tied bilinear layer.

    .. math:: y = \sum_r c_r\, (s_r \cdot \tilde x)^2 + \mathrm{bias} + \mathrm{skip}\, x

    Attributes:
        vectors: s_r as columns, in the coordinates of the layer they are from; row 0 is the constant's where `affine`.
        writes: c_r as columns.
        affine: Whether the coordinates begin with the constant 1.
        origin: "exact" (sums to the layer), "truncated" (exact components, some left out) or "fitted".
        bias: Constant beside the squares, or None.
        norm: The projection to the norm sphere in front, or None.
        skip: A skip path around the norm, or None.
    """

    vectors: Float[Tensor, "coordinate component"]
    writes: Float[Tensor, "d_out component"]
    affine: bool
    origin: str
    bias: Tensor | None = None
    norm: Norm | None = None
    skip: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of components."""
        return self.vectors.shape[1]

    def __call__(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        """The components' output on inputs (..., d_in)."""
        return self.layer()(x)

    def activations(self, x: Tensor) -> Float[Tensor, "*batch component"]:
        """(s_r . x~)^2 of every component on inputs (..., d_in)."""
        check_inputs("x", x, len(self.vectors) - self.affine, self.vectors)
        x = x if self.norm is None else self.norm.unit(x)
        inner = x @ self.vectors[int(self.affine) :]
        return (inner + self.vectors[0] if self.affine else inner).square()

    def select(self, keep: Tensor | list[int] | slice) -> "Squares":
        """Some of the components: their numbers, a mask, or a slice."""
        origin: str = "truncated" if self.origin == "exact" else self.origin
        return replace(self, vectors=self.vectors[:, keep], writes=self.writes[:, keep], origin=origin)

    def layer(self) -> Layer:
        """The components as weights: a layer with w = v."""
        reads = self.vectors.T[:, int(self.affine) :].contiguous()
        offsets = self.vectors[0] if self.affine else None
        return Layer(reads, reads, self.writes, offsets, offsets, self.bias, self.skip, self.norm)

    def norms(self) -> Float[Tensor, " component"]:
        """Frobenius norm of every component as a tensor: |c_r| |s_r|^2."""
        return self.writes.norm(dim=0) * self.vectors.square().sum(0)

    def cancellation(self) -> float:
        """Sum of the components' squared norms over the squared norm of their sum; 1 when none overlap, inf at 0/0."""
        gram = (self.vectors.T @ self.vectors).square() * (self.writes.T @ self.writes)
        whole = float(gram.sum())
        return float(gram.diagonal().sum()) / whole if whole > 0 else float("inf")


def neuron_squares(layer: Layer) -> Squares:
    r"""Every neuron as two squares, exactly: :math:`(wx)(vx) = \frac14((w+v)x)^2 - \frac14((w-v)x)^2`.

    w and v are balanced to the same length first, so that the squares do not depend on the gauge.
    """
    check_layer(layer)
    w, v, d = balanced(layer.factors())
    vectors = torch.cat([w + v, w - v]).T / 2
    return squares_of(layer, vectors, torch.cat([d, -d], 1), "exact")


def squares_of(layer: Layer, vectors: Tensor, writes: Tensor, origin: str, bias: Tensor | None = None) -> Squares:
    """Components in a layer's coordinates, behind its norm and beside its skip path around the norm."""
    norm = None if layer.norm is None else layer.norm.without_affine()
    skip = layer.skip if layer.norm is not None else None
    return Squares(vectors, writes, layer.affine, origin, bias, norm, skip)
