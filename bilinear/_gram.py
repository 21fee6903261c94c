"""Gram matrices over neurons: norms, inner products, distances and the HOSVD, never the tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_count
from bilinear._factors import Factors, forms
from bilinear._layer import Layer
from bilinear._metric import Metric, check_layer, resolved
from bilinear._norm import same_sphere

_ROWS = 128  # neurons of a block; a block holds a few (rows, hidden) matrices
_CLOSE = 1e-5  # squared distance, as a share of the squared norms, below which Gram matrices lose too many digits


@torch.no_grad()
def inner(a: Layer, b: Layer, metric: str | Metric | Tensor | None = None) -> float:
    r"""Inner product of two layers' third-order tensors, symmetric in their inputs.

    .. math:: \langle T, T' \rangle = \sum_u \mathrm{tr}(Q_u Q'_u)
        = \sum_{ab} (d^\top d')_{ab}\, \tfrac12 [(w w'^\top)(v v'^\top) + (w v'^\top)(v w'^\top)]_{ab}

    Args:
        a: A layer; biases and skip path included (`Layer.factors`).
        b: Another of the same widths behind the same norm.
        metric: As in `eigen`.

    Raises:
        ValueError: If the layers are functions of different coordinates.

    Source:
        "Tensor similarity" of one layer (arXiv 2605.15183); through Gram matrices of neurons and in a metric: ours.
    """
    one, two = _paired(a, b, metric)
    return _inner(one, two)


def norm(layer: Layer, metric: str | Metric | Tensor | None = None) -> float:
    """Frobenius norm of the layer's tensor; see `inner`."""
    return max(inner(layer, layer, metric), 0.0) ** 0.5


def cosine(a: Layer, b: Layer, metric: str | Metric | Tensor | None = None) -> float:
    """Cosine of two layers' tensors; nan where one is zero. See `inner`."""
    sizes = norm(a, metric) * norm(b, metric)
    return inner(a, b, metric) / sizes if sizes else float("nan")


@torch.no_grad()
def distance(a: Layer, b: Layer, metric: str | Metric | Tensor | None = None) -> float:
    """Frobenius distance of two layers' tensors.

    From Gram matrices; where the layers are so close that these would lose digits, from the forms of their
    difference, one output at a time.
    """
    one, two = _paired(a, b, metric)
    sizes = _inner(one, one) + _inner(two, two)
    square = sizes - 2 * _inner(one, two)
    if square > _CLOSE * sizes:
        return square**0.5
    both = Factors(torch.cat([one.w, two.w]), torch.cat([one.v, two.v]), torch.cat([one.d, -two.d], 1))
    eye = torch.eye(len(both.d), dtype=both.d.dtype, device=both.d.device)
    # Per output in its own pass: outputs x coordinates^2 numbers need not fit in memory.
    return sum(float(forms(both, eye[[u]]).square().sum()) for u in range(len(eye))) ** 0.5


@torch.no_grad()
def gaussian_inner(a: Layer, b: Layer, metric: str | Metric | Tensor | None = None) -> float:
    r"""E[y . y'] for Gaussian coordinates: standard normal, or of the metric's second moment.

    .. math:: \mathbb E[y \cdot y'] = 2 \langle T, T' \rangle + \sum_u \mathrm{tr} Q_u\, \mathrm{tr} Q'_u

    Where the layers are affine their constant is Gaussian too, in which case this is no expected output product.
    """
    one, two = _paired(a, b, metric)
    return 2 * _inner(one, two) + float(traces(one) @ traces(two))


def traces(factors: Factors) -> Float[Tensor, " d_out"]:
    """Trace of every output's form."""
    return factors.d @ (factors.w * factors.v).sum(1)


def form_norms(factors: Factors, rows: Float[Tensor, "direction d_out"]) -> Float[Tensor, " direction"]:
    """Frobenius norms of the forms of some directions, from the neurons' Gram matrix."""
    weights = rows.to(factors.d.dtype) @ factors.d
    total = torch.zeros(len(rows), dtype=weights.dtype, device=weights.device)
    for block, gram in _neuron_gram(factors, factors):
        total += ((weights[:, block] @ gram) * weights).sum(1)
    return total.clamp_min(0).sqrt()


def _paired(a: Layer, b: Layer, metric: str | Metric | Tensor | None) -> tuple[Factors, Factors]:
    """Both layers' factors in float64, in one metric and the same coordinates."""
    check_layer(a)
    check_layer(b)
    if (a.d_in, a.d_out) != (b.d_in, b.d_out):
        raise ValueError(f"layers {a.d_in} -> {a.d_out} and {b.d_in} -> {b.d_out} differ in their widths")
    if not same_sphere(a.norm, b.norm):
        raise ValueError("layers behind different norms are functions of different coordinates; compare their parts")
    one, two = (as_double(layer.factors()) for layer in (a, b))
    if a.affine != b.affine:
        one, two = (_lifted(f, max(one.w.shape[1], two.w.shape[1])) for f in (one, two))
    measure = resolved(a if a.affine else b, metric)
    if measure.root is None:
        return one, two
    root = measure.root.double()
    return tuple(Factors(f.w @ root, f.v @ root, f.d) for f in (one, two))  # type: ignore[return-value]


def as_double(factors: Factors) -> Factors:
    """The factors in float64."""
    return Factors(*(one.double() for one in factors))


def _lifted(factors: Factors, n: int) -> Factors:
    """Factors with a constant in front of their coordinates, where they have none yet."""
    w, v = (torch.nn.functional.pad(one, (n - one.shape[1], 0)) for one in factors[:2])
    return Factors(w, v, factors.d)


def _neuron_gram(a: Factors, b: Factors) -> Iterator[tuple[slice, Float[Tensor, "rows hidden"]]]:
    """Inner products of the neurons' symmetric matrices, in blocks of rows."""
    for start in range(0, len(a.w), _ROWS):
        rows = slice(start, start + _ROWS)
        w, v = a.w[rows], a.v[rows]
        gram = (w @ b.w.T).mul_(v @ b.v.T)
        yield rows, gram.addcmul_(w @ b.v.T, v @ b.w.T).mul_(0.5)


def _inner(a: Factors, b: Factors) -> float:
    total = 0.0
    for rows, gram in _neuron_gram(a, b):
        total += float(((a.d[:, rows].T @ b.d) * gram).sum())
    return total


class Modes(NamedTuple):
    """Gram matrices of a layer's tensor, unfolded along its outputs and along its inputs."""

    outputs: Float[Tensor, "d_out d_out"]
    inputs: Float[Tensor, "coordinate coordinate"]


def mode_grams(factors: Factors) -> Modes:
    r"""Gram matrices of both modes in one pass over blocks of neurons.

    .. math:: G^{out}_{uu'} = \mathrm{tr}(Q_u Q_{u'}), \qquad G^{in} = \sum_u Q_u^2
    """
    w, v, d = factors
    outputs = torch.zeros(len(d), len(d), dtype=d.dtype, device=d.device)
    inputs = torch.zeros(w.shape[1], w.shape[1], dtype=d.dtype, device=d.device)
    for start in range(0, len(w), _ROWS):
        # Pairs with neurons before this block were taken when it was their turn; the transpose adds their other order.
        rows, rest = slice(start, start + _ROWS), slice(start, None)
        ww, vv, wv, vw = (a[rows] @ b[rest].T for a, b in ((w, w), (v, v), (w, v), (v, w)))
        gram = (ww * vv).addcmul_(wv, vw).mul_(0.5)
        c = d[:, rows].T @ d[:, rest]
        for one in (gram, c):
            one[:, : len(one)] /= 2  # pairs within the block come in both orders
        outputs.addmm_(d[:, rows], gram @ d[:, rest].T)
        # S_a S_b = 1/4 (w v^T + v w^T)(w' v'^T + v' w'^T) of neurons a, b; grouped by the vector of a on the left.
        left_w = ((c * vw) @ v[rest]).addmm_(c * vv, w[rest])
        left_v = ((c * ww) @ v[rest]).addmm_(c * wv, w[rest])
        inputs.addmm_(w[rows].T, left_w, alpha=0.25).addmm_(v[rows].T, left_v, alpha=0.25)
    return Modes(outputs + outputs.T, inputs + inputs.T)


@dataclass(frozen=True, eq=False)
class Hosvd:
    r"""Higher-order SVD of a layer's tensor: orthonormal bases of both modes, ordered by size.

    Attributes:
        output_values: Singular values of the unfolding along outputs, descending; their squares sum to |T|^2.
        outputs: Output directions u as columns; :math:`T = \sum_r \sigma_r\, u_r \otimes G_r`.
        input_values: Singular values of the unfolding along inputs.
        inputs: Input directions as columns, in the (whitened) coordinates.
        metric: In which it was taken.
        layer: What was decomposed.
    """

    output_values: Float[Tensor, " d_out"]
    outputs: Float[Tensor, "d_out d_out"]
    input_values: Float[Tensor, " coordinate"]
    inputs: Float[Tensor, "coordinate coordinate"]
    metric: Metric
    layer: Layer

    def core(self, n_outputs: int, n_inputs: int) -> Float[Tensor, "n_outputs n_inputs n_inputs"]:
        """The leading part of the core tensor, from the factors.

        Raises:
            ValueError: For more directions than there are.
        """
        check_count("n_outputs", n_outputs, self.outputs.shape[1], "outputs")
        check_count("n_inputs", n_inputs, self.inputs.shape[1], "coordinates of the layer")
        whitened = as_double(self.metric.whitened(self.layer.factors()))
        basis = self.inputs[:, :n_inputs].double()
        reduced = Factors(whitened.w @ basis, whitened.v @ basis, whitened.d)
        return forms(reduced, self.outputs[:, :n_outputs].T.double())


@torch.no_grad()
def hosvd(layer: Layer, metric: str | Metric | Tensor | None = None) -> Hosvd:
    """Higher-order SVD through hidden x hidden Gram matrices in blocks, in float64; the tensor is never formed.

    Args:
        layer: The layer.
        metric: As in `eigen`.

    Returns:
        Bases and singular values in float64. Values below about 1e-8 of the largest are rounding, since they are
        square roots of eigenvalues of Gram matrices.

    Source:
        HOSVD: De Lathauwer et al. 2000; of a bilinear layer: Pearce et al., section 3.3; through neurons ours.
    """
    measure = resolved(layer, metric)
    modes = mode_grams(as_double(measure.whitened(layer.factors())))
    (output_values, outputs), (input_values, inputs) = (_descending(gram) for gram in modes)
    return Hosvd(output_values, outputs, input_values, inputs, measure, layer)


def _descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
