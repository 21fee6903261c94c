"""Stacks: layers one after another, with exact edge weights and values by tensor contraction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import opt_einsum
import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_tensor
from bilinear._eigen import Eigen
from bilinear._factors import Factors, forms
from bilinear._gram import as_double, gaussian_inner
from bilinear._layer import Layer
from bilinear._squares import Squares

_MOST = 1 << 27  # numbers of an intermediate


class Edges(NamedTuple):
    r"""What downstream components read from upstream ones, exactly.

    With z = f(x) written as squares, :math:`v_j \cdot \tilde z = o_j + \sum_r \mu_{jr} (s_r \cdot \tilde x)^2
    + \ell_j \cdot x`.

    Attributes:
        weights: mu, what component j reads of component r.
        offsets: o, constants: the reader's own and those of the upstream bias.
        direct: l, what goes around the upstream squares, on a skip path around its norm; None without one.
    """

    weights: Float[Tensor, "reader component"]
    offsets: Float[Tensor, " reader"]
    direct: Float[Tensor, "reader d_in"] | None


class Evidence(NamedTuple):
    """A figure with how it is known: "exact" or "estimate"."""

    value: float
    kind: str
    method: str


def edges(upstream: Squares, readers: Tensor | Eigen | Squares) -> Edges:
    """Exact edge weights from upstream components to what reads their output.

    Args:
        upstream: Components of the earlier layer; its own residual path is among them (see `neuron_squares`).
        readers: Vectors (d_z, reader) as columns, or (1 + d_z, reader) with the constant in front, or the pairs of
            one direction, or components, of the later layer.

    Raises:
        ValueError: For readers of another width, or behind a norm, through which nothing is linear.
    """
    vectors: Any = readers
    if isinstance(readers, Eigen):
        if readers.layer.norm is not None:
            raise ValueError("the later layer is behind a norm, through which no edge is linear")
        vectors = readers.vectors if readers.values.ndim == 1 else readers.vectors.permute(1, 0, 2).flatten(1)
    if isinstance(readers, Squares):
        if readers.norm is not None:
            raise ValueError("the later layer is behind a norm, through which no edge is linear")
        vectors = readers.vectors
    d_z = len(upstream.writes)
    constant = isinstance(vectors, Tensor) and vectors.ndim == 2 and len(vectors) == d_z + 1
    check_tensor("readers", vectors, (d_z + constant, None), upstream.writes)
    linear = vectors[int(constant) :]
    offsets = vectors[0] if constant else torch.zeros_like(linear[0])
    if upstream.bias is not None:
        offsets = offsets + linear.T @ upstream.bias
    direct = None if upstream.skip is None else linear.T @ upstream.skip
    return Edges(linear.T @ upstream.writes, offsets, direct)


@dataclass(frozen=True, eq=False)
class Stack:
    """Bilinear layers applied one after another, residual paths and biases included, without norms between them.

    Attributes:
        layers: First to last; each reads the previous one's output.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        """Refuse layers that do not follow one another."""
        if not self.layers:
            raise ValueError("a stack needs at least one layer")
        for i, (a, b) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            if a.d_out != b.d_in:
                raise ValueError(f"layer {i} writes {a.d_out} numbers, layer {i + 1} reads {b.d_in}")
        if any(layer.norm is not None for layer in self.layers):
            raise ValueError("a stack is a polynomial of its input, which a norm is not; analyse its layers one by one")

    def __call__(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        """The last layer's output on inputs (..., d_in)."""
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def degree(self) -> int:
        """Degree of the polynomial."""
        return 2 ** len(self.layers)

    def multilinear(self, direction: Any, inputs: Sequence[Tensor]) -> Evidence:
        """The stack's multilinear form on `degree` inputs: one input to each leaf of its tree.

        Equal inputs give the stack's output along the direction. Contracted in the order that opt_einsum finds, whose
        largest intermediate is checked first.

        Args:
            direction: As in `Layer.form`, of the last layer.
            inputs: `degree` vectors (d_in,), left to right.

        Raises:
            ValueError: For a wrong number of inputs, or a contraction that would need too much memory.
        """
        if len(inputs) != self.degree:
            raise ValueError(f"a stack of degree {self.degree} takes as many inputs, got {len(inputs)}")
        first = self.layers[0]
        for i, x in enumerate(inputs):
            check_tensor(f"inputs[{i}]", x, (first.d_in,), first.w)
        lifted = _lifted_factors(self.layers)
        leaves = [torch.cat([torch.ones_like(x[:1]), x]) for x in inputs]
        row = self.layers[-1].directions(direction)[0]
        return Evidence(float(_contracted(lifted, row, leaves)), "exact", "contraction")

    def cost(self) -> tuple[float, int]:
        """Operations and the largest intermediate of `multilinear`, as opt_einsum plans it."""
        lifted = _lifted_factors(self.layers)
        row = self.layers[-1].d[:, 0]
        leaves = [torch.ones(lifted[0].w.shape[1]).to(row)] * self.degree
        path = opt_einsum.contract_path(*_operands(lifted, row, leaves), optimize=_strategy(lifted))[1]
        return float(path.opt_cost), int(path.largest_intermediate)

    def energy(self) -> Evidence:
        r"""E|y|^2 for standard normal inputs.

        Exact for one layer. Deeper, each layer's output is taken as Gaussian with the right first two moments, which is
        an estimate that can be far off in narrow stacks.

        Source:
            Closure of second moments as in arXiv 2605.15183, whose figures are estimates after one layer.
        """
        first = self.layers[0].double()
        if len(self.layers) == 1 and not first.affine:
            return Evidence(gaussian_inner(first, first), "exact", "Gram matrices")
        mean = first.w.new_zeros(first.d_in)
        covariance = torch.eye(first.d_in, dtype=torch.float64, device=first.w.device)
        for layer in self.layers:
            mean, covariance = _pushed(layer.double(), mean, covariance)
        kind = "exact" if len(self.layers) == 1 else "estimate"
        return Evidence(float(covariance.trace() + mean @ mean), kind, "Gaussian closure of the first two moments")


def _lifted_factors(layers: Sequence[Layer]) -> list[Factors]:
    """Factors of layers that map lifted coordinates (1, x) to lifted coordinates (1, y); the last keeps y alone."""
    found = []
    for i, layer in enumerate(layers):
        w, v, d = layer.factors()
        if not layer.affine:
            w, v = (torch.nn.functional.pad(one, (1, 0)) for one in (w, v))
        if i + 1 < len(layers):
            one = torch.zeros_like(w[:1])
            one[0, 0] = 1
            w, v = torch.cat([one, w]), torch.cat([one, v])
            d = torch.block_diag(torch.ones(1, 1).to(d), d)
        found.append(Factors(w, v, d))
    return found


def _operands(lifted: Sequence[Factors], row: Tensor, leaves: Sequence[Tensor]) -> list[Any]:
    """Tensors and their indices of the binary tree: every product of a layer joins two copies of the layer before."""
    operands: list[Any] = []
    counter = iter(range(1_000_000))

    def grow(depth: int, left: list[Tensor]) -> int:
        """Add the tree of one layer's output; returns the index of that output."""
        factors, neuron, out = lifted[depth], next(counter), next(counter)
        half = len(left) // 2
        for weight, part in ((factors.w, left[:half]), (factors.v, left[half:])):
            if depth == 0:
                index = next(counter)
                operands.extend([part[0], [index]])
            else:
                index = grow(depth - 1, part)
            operands.extend([weight, [neuron, index]])
        operands.extend([factors.d, [out, neuron]])
        return out

    top = grow(len(lifted) - 1, list(leaves))
    operands.extend([row, [top], []])
    return operands


def _strategy(lifted: Sequence[Factors]) -> Literal["auto-hq", "greedy"]:
    # `auto` may choose intermediates that are larger by orders of magnitude; auto-hq is slow on deep trees.
    return "auto-hq" if len(lifted) <= 2 else "greedy"


def _contracted(lifted: Sequence[Factors], row: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    operands = _operands(lifted, row, leaves)
    path, plan = opt_einsum.contract_path(*operands, optimize=_strategy(lifted))
    if plan.largest_intermediate > _MOST:
        raise ValueError(
            f"the contraction needs an intermediate of {plan.largest_intermediate:.1e} numbers; truncate the "
            "layers first"
        )
    return opt_einsum.contract(*operands, optimize=path)


def _pushed(layer: Layer, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a layer's output for Gaussian inputs; exact."""
    factors = as_double(layer.factors())
    if layer.affine:
        mean = torch.cat([torch.ones_like(mean[:1]), mean])
        covariance = torch.block_diag(torch.zeros(1, 1).to(covariance), covariance)
    q = forms(factors, layer.directions(None))
    reach = q @ covariance
    new_mean = reach.diagonal(dim1=1, dim2=2).sum(1) + torch.einsum("i,nij,j->n", mean, q, mean)
    slopes = q @ mean
    new = 2 * torch.einsum("nij,mji->nm", reach, reach) + 4 * slopes @ covariance @ slopes.T
    return new_mean, new
