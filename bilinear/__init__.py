"""Closed-form, certified decompositions of bilinear layers, from their weights alone."""

from bilinear._adversary import adversarial_directions
from bilinear._attention import Attention, BilinearAttention
from bilinear._bridge import to_decomposition
from bilinear._common import without_common
from bilinear._cp import SharedSquares, shared_squares
from bilinear._diagnosis import Diagnosis, diagnosis
from bilinear._eigen import Eigen, eigen
from bilinear._gated import BilinearShare, GatedLayer
from bilinear._gram import Hosvd, cosine, distance, gaussian_inner, hosvd, inner, norm
from bilinear._interactions import interactions, strongest
from bilinear._layer import Layer
from bilinear._metric import Metric, data_metric, softmax_variance
from bilinear._modules import BilinearMLP, GatedMLP
from bilinear._norm import Norm
from bilinear._plot import plot_spectra, plot_vectors
from bilinear._range import Range, output_range
from bilinear._reading import read, read_linears, read_packed
from bilinear._rewriting import bilinear_finetuned, write_back
from bilinear._squares import Squares, neuron_squares
from bilinear._stack import Edges, Stack, edges
from bilinear._truncation import Truncation, centred, truncate
from bilinear._tucker import BlockTerms, Tucker, block_terms, tucker

__all__ = [
    "Attention",
    "BilinearAttention",
    "BilinearMLP",
    "BilinearShare",
    "BlockTerms",
    "Diagnosis",
    "Edges",
    "Eigen",
    "GatedLayer",
    "GatedMLP",
    "Hosvd",
    "Layer",
    "Metric",
    "Norm",
    "Range",
    "SharedSquares",
    "Squares",
    "Stack",
    "Truncation",
    "Tucker",
    "adversarial_directions",
    "bilinear_finetuned",
    "block_terms",
    "centred",
    "cosine",
    "data_metric",
    "diagnosis",
    "distance",
    "edges",
    "eigen",
    "gaussian_inner",
    "hosvd",
    "inner",
    "interactions",
    "neuron_squares",
    "norm",
    "output_range",
    "plot_spectra",
    "plot_vectors",
    "read",
    "read_linears",
    "read_packed",
    "shared_squares",
    "softmax_variance",
    "strongest",
    "to_decomposition",
    "truncate",
    "tucker",
    "without_common",
    "write_back",
]
