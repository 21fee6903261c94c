"""Metrics: in which inner product of inputs a spectrum is taken, which every spectrum depends on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_tensor
from bilinear._factors import Factors
from bilinear._layer import Layer


@dataclass(frozen=True, eq=False)
class Metric:
    r"""An inner product on a layer's coordinates.

    With second moment M = root root^T the spectrum is that of root^T Q root, and a component's vector is
    root^-T u for its eigenvector u; None is the Euclidean metric.

    Attributes:
        name: "input" (Euclidean in the input space), "sphere" (Euclidean on the norm sphere) or "data".
        moment: M, the second moment of the coordinates with its floor; None for a Euclidean metric.
        root: Symmetric root of M.
        inverse: Its inverse.
    """

    name: str
    moment: Float[Tensor, "coordinate coordinate"] | None = None
    root: Float[Tensor, "coordinate coordinate"] | None = None
    inverse: Float[Tensor, "coordinate coordinate"] | None = None

    def whitened(self, factors: Factors) -> Factors:
        """Factors of the form whose ordinary spectrum is the spectrum in this metric."""
        if self.root is None:
            return factors
        return Factors(factors.w @ self.root, factors.v @ self.root, factors.d)

    def vectors(self, found: Float[Tensor, "*direction coordinate k"]) -> Float[Tensor, "*direction coordinate k"]:
        """Vectors v that read coordinates, v . x~, from eigenvectors of the whitened form."""
        return found if self.inverse is None else self.inverse @ found

    def energy(self, coordinates: Float[Tensor, "*batch coordinate"]) -> Float[Tensor, "*batch"]:
        """Squared length of coordinates x~: x~^T M^-1 x~."""
        whitened = coordinates if self.inverse is None else coordinates @ self.inverse.to(coordinates)
        return whitened.square().sum(-1)


def softmax_variance(logits: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch"]:
    r"""How undecided a softmax is, :math:`\sum_u p_u (1 - p_u)`: the trace of its Fisher matrix in the logits.

    As the weight of `data_metric` it measures a classifier's forms where errors in them could change its answer.
    """
    return 1 - logits.softmax(-1).square().sum(-1)


def moment(
    layer: Layer, inputs: Tensor | Iterable[Tensor], weight: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "coordinate coordinate"]:
    """Second moment E[x~ x~^T] of the layer's coordinates over inputs, in float64.

    Args:
        layer: Whose coordinates.
        inputs: (..., d_in), or an iterable of such batches.
        weight: Weight of every input, from the layer's outputs; None is 1.

    Raises:
        ValueError: If there are no inputs, they do not fit the layer, or weights are negative, not finite or all 0.
    """
    check_layer(layer)
    total, n = None, 0.0
    for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
        x = layer.coordinates(batch).double().reshape(-1, layer.n_coordinates)
        weights = x.new_ones(len(x)) if weight is None else weight(layer(batch)).double().reshape(-1)
        if len(weights) != len(x) or not torch.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("weight must give one finite number, 0 or more, for every input")
        part = (x * weights[:, None]).T @ x
        total, n = part if total is None else total + part, n + float(weights.sum())
    if total is None or not n:
        raise ValueError("inputs are empty or all of weight 0; a second moment needs at least one input")
    return total / n


def data_metric(
    layer: Layer,
    inputs: Tensor | Iterable[Tensor],
    floor: float = 1e-6,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Metric:
    """The metric in which a form's norm is its size on data: the second moment of the layer's coordinates.

    Args:
        layer: Whose coordinates.
        inputs: (..., d_in), or an iterable of such batches.
        floor: Variances are not taken below this share of their mean, so that the metric can be inverted on
            directions that the data never enters. Rounding errors of a full decomposition grow with the condition
            of the metric. Floors of .1 to 2 keep nearly as much of the layer on data, and give tighter bounds
            (`Truncation.certified`), since inputs are then short in the metric's noise directions too.
        weight: Weight of every input, from the layer's outputs (..., d_out); `softmax_variance` for a classifier.

    Returns:
        The metric. Spectra in it are the same in every basis of the input, up to the floor.

    Raises:
        ValueError: If there are no inputs, or all are zero, or of weight 0.
    """
    return metric_from_moment(layer, moment(layer, inputs, weight), floor)


def metric_from_moment(layer: Layer, second_moment: Tensor, floor: float = 1e-6) -> Metric:
    """The data metric of a known second moment of the layer's coordinates; see `data_metric`."""
    n = layer.n_coordinates
    check_tensor("moment", second_moment, (n, n))
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")
    values, vectors = torch.linalg.eigh((second_moment + second_moment.T).double() / 2)
    mean = values.mean()
    if not mean > 0 or values[0] < -1e-8 * values[-1]:
        raise ValueError("the second moment must be positive semidefinite and not zero")
    values = values.clamp_min(floor * mean)
    made = [(vectors * values**power) @ vectors.T for power in (1.0, 0.5, -0.5)]
    return Metric("data", *(one.to(layer.w) for one in made))


def check_layer(layer: object) -> None:
    """Refuse what is no layer.

    Raises:
        TypeError: Saying what makes one.
    """
    if not isinstance(layer, Layer):
        raise TypeError(
            f"expected a bilinear.Layer, got {type(layer).__name__}; bilinear.read(module) makes one of a module, "
            "and a gated layer's exact half is its .bilinear"
        )


def resolved(layer: Layer, metric: str | Metric | Tensor | None) -> Metric:
    """The metric that a user named, or the layer's default: the norm sphere behind a norm, else the input space.

    Raises:
        ValueError: For an unknown name, the sphere without a norm, or "data" without data.
        TypeError: For what is no layer.
    """
    check_layer(layer)
    if isinstance(metric, Metric):
        if metric.moment is not None and len(metric.moment) != layer.n_coordinates:
            raise ValueError(
                f"the metric has {len(metric.moment)} coordinates, the layer {layer.n_coordinates}; "
                "make it from this layer with bilinear.data_metric(layer, inputs)"
            )
        return metric
    if isinstance(metric, Tensor):
        if metric.ndim == 2 and len(metric) != metric.shape[1]:
            raise ValueError(
                f"metric has shape {tuple(metric.shape)}, expected a second moment; if these are inputs, pass "
                "metric=bilinear.data_metric(layer, inputs)"
            )
        return metric_from_moment(layer, metric)
    default = "input" if layer.norm is None else "sphere"
    if metric in (None, default):
        return Metric(default)
    if metric == "sphere":
        raise ValueError("metric='sphere' needs a layer behind a norm; this one has none, use 'input' or a data metric")
    if metric == "input":
        raise ValueError(
            "the layer is behind a norm: its forms act on the sphere; use metric='sphere' or a data metric"
        )
    if metric == "data":
        raise ValueError("a data metric needs data: pass metric=bilinear.data_metric(layer, inputs)")
    raise ValueError(f"metric must be 'input', 'sphere', a Metric or a second moment, got {metric!r}")
