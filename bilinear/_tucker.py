"""Tucker and block terms: shared subspaces, and low-rank forms of shared output directions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_count
from bilinear._eigen import dense_pairs
from bilinear._factors import Factors, forms
from bilinear._gram import as_double, form_norms, hosvd
from bilinear._layer import Layer
from bilinear._metric import Metric, resolved
from bilinear._squares import Squares, squares_of


@dataclass(frozen=True, eq=False)
class Tucker:
    r"""T ~ core x (outputs, inputs, inputs): the best found for given ranks. Bases mean something up to rotation only.

    Attributes:
        core: Symmetric in its last two modes.
        outputs: Orthonormal output directions, as columns.
        inputs: Orthonormal input directions in whitened coordinates, as columns.
        error: Relative error |T - T^| / |T| in the metric.
        squares: The same as components, each core slice diagonalised.
        metric: In which it was fitted.
    """

    core: Float[Tensor, "n_outputs n_inputs n_inputs"]
    outputs: Float[Tensor, "d_out n_outputs"]
    inputs: Float[Tensor, "coordinate n_inputs"]
    error: float
    squares: Squares
    metric: Metric


@dataclass(frozen=True, eq=False)
class BlockTerms:
    r"""T ~ sum_b u_b (x) G_b with orthonormal output directions u_b and forms G_b of low rank.

    Attributes:
        outputs: u_b as columns.
        values: Eigenvalues of the forms.
        squares: All terms as components, block after block.
        error: Relative error in the metric, exact since the blocks are orthogonal.
        metric: In which it was taken.
    """

    outputs: Float[Tensor, "d_out block"]
    values: Float[Tensor, "block rank"]
    squares: Squares
    error: float
    metric: Metric


@torch.no_grad()
def tucker(
    layer: Layer, n_outputs: int, n_inputs: int, *, metric: str | Metric | Tensor | None = None, sweeps: int = 10
) -> Tucker:
    """A Tucker decomposition by higher-order orthogonal iteration through the factors.

    Args:
        layer: The layer.
        n_outputs: Output directions to keep.
        n_inputs: Input directions to keep.
        metric: As in `eigen`.
        sweeps: Alternating improvements after the truncated HOSVD; 0 keeps that.

    Raises:
        ValueError: For ranks beyond the layer's widths, or a layer that is zero.

    Source:
        HOOI: De Lathauwer et al. 2000.
    """
    measure = resolved(layer, metric)
    check_count("n_outputs", n_outputs, layer.d_out, "outputs")
    check_count("n_inputs", n_inputs, layer.n_coordinates, "coordinates of the layer")
    factors = as_double(measure.whitened(layer.factors()))
    whole = _whole(layer, factors)
    start = hosvd(layer, measure)
    u, p = start.outputs[:, :n_outputs].to(factors.w), start.inputs[:, :n_inputs].to(factors.w)
    for _ in range(sweeps):
        # Outputs projected, one input mode projected: the other mode's best basis; then outputs likewise.
        half = torch.stack([_times(factors, row, p) for row in u.T])
        p = torch.linalg.svd(half.permute(1, 0, 2).flatten(1), full_matrices=False)[0][:, :n_inputs]
        inner = forms(Factors(factors.w @ p, factors.v @ p, factors.d), torch.eye(layer.d_out).to(factors.w))
        u = torch.linalg.svd(inner.flatten(1), full_matrices=False)[0][:, :n_outputs]
    core = forms(Factors(factors.w @ p, factors.v @ p, factors.d), u.T.contiguous())
    error = max(1 - float(core.square().sum()) / whole, 0.0) ** 0.5
    values, vectors = torch.linalg.eigh(core)
    reads = measure.vectors((p @ vectors).to(layer.w)).permute(1, 0, 2).flatten(1)
    writes = (u[:, :, None] * values[None]).flatten(1).to(layer.w)
    return Tucker(core, u, p, error, squares_of(layer, reads, writes, "fitted"), measure)


@torch.no_grad()
def block_terms(layer: Layer, n: int, rank: int, *, metric: str | Metric | Tensor | None = None) -> BlockTerms:
    """The n largest output directions of the HOSVD with the forms along them, each cut to its largest eigenpairs.

    Args:
        layer: The layer.
        n: Blocks.
        rank: Eigenpairs a block.
        metric: As in `eigen`.

    Raises:
        ValueError: For counts beyond the layer's widths, or a layer that is zero.

    Source:
        SVD of the unfolded tensor with eigenvectors of each term: Pearce et al. (arXiv 2410.08417), section 3.3.
    """
    measure = resolved(layer, metric)
    check_count("n", n, layer.d_out, "outputs")
    check_count("rank", rank, layer.n_coordinates, "coordinates of the layer")
    factors = as_double(measure.whitened(layer.factors()))
    whole = _whole(layer, factors)
    u = hosvd(layer, measure).outputs[:, :n].to(factors.w)
    pairs = dense_pairs(factors, u.T.contiguous(), min(rank, layer.n_coordinates))
    error = max(1 - float(pairs.values.square().sum()) / whole, 0.0) ** 0.5
    reads = measure.vectors(pairs.vectors.to(layer.w)).permute(1, 0, 2).flatten(1)
    writes = (u[:, :, None] * pairs.values[None]).flatten(1).to(layer.w)
    return BlockTerms(u, pairs.values, squares_of(layer, reads, writes, "truncated"), error, measure)


def _whole(layer: Layer, factors: Factors) -> float:
    whole = float(form_norms(factors, layer.directions(None)).square().sum())
    if not whole > 0:
        raise ValueError("the layer is zero; there is nothing to decompose")
    return whole


def _times(factors: Factors, row: Tensor, basis: Tensor) -> Tensor:
    """The form of a direction times a basis, without the form."""
    weights = (row @ factors.d)[:, None]
    w, v = factors.w, factors.v
    return (w.T @ (weights * (v @ basis)) + v.T @ (weights * (w @ basis))) / 2
