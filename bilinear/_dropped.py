"""What a truncation dropped: certain bounds on what it adds to the output of an input."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._factors import Spanned, forms, spanned
from bilinear._gram import as_double
from bilinear._layer import Layer
from bilinear._metric import Metric


class Interval(NamedTuple):
    """Where the full layer's output certainly is, from the truncated one's."""

    lower: Float[Tensor, "*batch direction"]
    upper: Float[Tensor, "*batch direction"]


class Dropped(NamedTuple):
    """What a metric says about the dropped part: its extreme eigenvalues beside vectors that it does not see.

    Attributes:
        metric: Where lengths are measured.
        reads: Columns that read coordinates into the whitened span of the layer's forms.
        kept: Orthonormal columns in that span, of which the dropped part is free.
        low: Smallest eigenvalue of the dropped part on the complement of these.
        high: Largest one.
        rounding: What rounding may add, as a share of the squared length.
    """

    metric: Metric
    reads: Float[Tensor, "coordinate rank"]
    kept: Float[Tensor, "direction rank k"]
    low: Float[Tensor, " direction"]
    high: Float[Tensor, " direction"]
    rounding: Float[Tensor, " direction"]

    def bounds(self, coordinates: Float[Tensor, "*batch coordinate"]) -> Interval:
        """Where the dropped part's output on inputs is: its eigenvalues times the energy that it acts on; float64."""
        inner = coordinates @ self.reads
        seen = torch.einsum("...r,nrk->...nk", inner, self.kept).square().sum(-1)
        energy = (inner.square().sum(-1)[..., None] - seen).clamp_min(0)
        slack = self.rounding * self.metric.energy(coordinates)[..., None]
        return Interval(energy * self.low - slack, energy * self.high + slack)


def of_eigenpairs(measure: Metric, span: Spanned, rows: Tensor, kept: Tensor, values: Tensor) -> Dropped:
    """The dropped part of some directions in the metric of their eigenpairs, where it is free of the kept vectors.

    Args:
        measure: Of the eigenpairs.
        span: Of the whitened forms.
        rows: The directions.
        kept: The kept vectors in the span, (direction, rank, k).
        values: All eigenvalues in the span, the kept ones first.
    """
    k = kept.shape[2]
    rest = values[:, k:] if k < values.shape[1] else values[:, :1] * 0
    rounding = span.rounding(rows) + _noise(rows) * values[:, 0].abs().double()
    reads = measure.vectors(span.basis).double()
    return Dropped(measure, reads, kept.double(), rest.amin(1).double(), rest.amax(1).double(), rounding)


def in_input_space(layer: Layer, rows: Tensor, vectors: Tensor, values: Tensor) -> Dropped:
    """The dropped part of another metric's eigenpairs by its Euclidean extreme eigenvalues.

    Args:
        layer: The full layer.
        rows: The directions.
        vectors: The kept ones, that read coordinates: (direction, coordinate, k).
        values: The kept eigenvalues.
    """
    span, ends = spanned(as_double(layer.factors())), []
    for row, own, weights in zip(rows.double(), vectors.double(), values.double(), strict=True):
        inner = span.basis.T @ own
        ends.append(torch.linalg.eigvalsh(forms(span.factors, row[None])[0] - (inner * weights) @ inner.T)[[0, -1]])
    low, high = torch.stack(ends).T
    kept = span.basis.new_zeros(len(rows), span.basis.shape[1], 0)
    sizes = (values[:, 0] * vectors[:, :, 0].square().sum(1)).abs().double()
    return Dropped(Metric("input"), span.basis, kept, low, high, span.rounding(rows) + _noise(rows) * sizes)


def _noise(like: Tensor) -> float:
    """Rounding of eigenpairs, as a share of the largest."""
    return 1e2 * torch.finfo(like.dtype).eps
