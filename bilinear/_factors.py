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


class Spanned(NamedTuple):
    """Factors in the coordinates that they read at all.

    Attributes:
        factors: In the span.
        basis: The span's orthonormal columns.
        size: Largest singular value of the balanced readings.
        lost: Largest one that counted as zero.
    """

    factors: Factors
    basis: Float[Tensor, "coordinate rank"]
    size: float
    lost: float

    def rounding(self, directions: Float[Tensor, "direction d_out"]) -> Float[Tensor, " direction"]:
        """Bound on what rounding in the directions' dtype and lost readings change in a form's output, over |x~|^2."""
        weights = (directions.double() @ self.factors.d.double()).abs().amax(1)
        noise = 8 * torch.finfo(directions.dtype).eps
        return weights * self.size * (noise * self.size + 2 * self.lost)


def spanned(factors: Factors) -> Spanned:
    """Factors in the span of what they read, up to rounding; the forms are zero beside it."""
    # Where every product is silent, one is left to span something.
    none = factors.w.new_zeros(1, factors.w.shape[1])
    w, v, d = joined(balanced(factors), Factors(none, none, factors.d.new_zeros(len(factors.d), 1)))
    both = torch.cat([w, v]).double()
    tolerance = max(both.shape) * torch.finfo(w.dtype).eps
    if len(both) > both.shape[1]:
        both = torch.linalg.qr(both, mode="r")[1]
    values = torch.linalg.svdvals(both)
    rank, n = max(1, int((values > tolerance * values[0]).sum())), w.shape[1]
    if rank == n:  # the vectors, which cost far more, are not needed
        return Spanned(Factors(w, v, d), torch.eye(n, dtype=w.dtype, device=w.device), float(values[0]), 0.0)
    basis = torch.linalg.svd(both, full_matrices=False)[2][:rank].T.to(w)
    lost = float(values[rank]) if rank < len(values) else 0.0
    return Spanned(Factors(w @ basis, v @ basis, d), basis, float(values[0]), lost)


def balanced(factors: Factors) -> Factors:
    """The same products with w and v of the same length, so that nothing depends on the gauge, less silent ones."""
    w, v, d = factors
    sizes = w.norm(dim=1, keepdim=True), v.norm(dim=1, keepdim=True)
    live = (sizes[0] * sizes[1] > 0)[:, 0]
    scale = (sizes[1][live] / sizes[0][live]).sqrt()
    return Factors(w[live] * scale, v[live] / scale, d[:, live])


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
