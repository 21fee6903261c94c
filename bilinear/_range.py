"""Range: the least and largest output along a direction over all inputs of a norm, with a duality gap."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from bilinear._directions import Direction
from bilinear._factors import forms
from bilinear._layer import Layer
from bilinear._metric import check_layer

_HARD = 1e-10  # share of the linear part below which it does not reach the top eigenvectors


class Range(NamedTuple):
    """Certified extremes of outputs along directions; float64 rounding is not part of the certificate.

    Attributes:
        lower: Bound from below on the output, over all inputs of the domain.
        upper: Bound from above.
        lowest: Inputs at which the output comes within `gap` of the lower bound.
        highest: Inputs at which it comes within `gap` of the upper bound.
        gap: Largest difference of a bound and the output attained, relative to the width of the range.
    """

    lower: Float[Tensor, " direction"]
    upper: Float[Tensor, " direction"]
    lowest: Float[Tensor, "direction d_in"]
    highest: Float[Tensor, "direction d_in"]
    gap: Float[Tensor, " direction"]


@torch.no_grad()
def output_range(layer: Layer, direction: Direction | None = None, radius: float | None = None) -> Range:
    r"""The least and largest output along directions, over all inputs.

    Behind a norm the inputs are all of R^d (x-hat is on the sphere of radius sqrt(d), or in the ball where eps > 0; for
    LayerNorm in the centred subspace); a skip path around the norm is unbounded and left out. Without a norm they are
    those with \|x\| <= radius. Without linear terms behind a norm this is a Rayleigh quotient.

    Args:
        layer: The layer.
        direction: As in `Layer.form`; None is all outputs.
        radius: Largest length of an input; for layers without a norm, and needed there.

    Returns:
        Bounds from the dual and inputs that attain them: strong duality holds for one quadratic constraint.

    Raises:
        ValueError: For a radius where there is a norm, or none where there is no norm.

    Source:
        Trust-region subproblem: More and Sorensen 1983; use on bilinear layers ours.
    """
    check_layer(layer)
    if layer.norm is None and radius is None:
        raise ValueError("the layer has no norm in front, so its output is unbounded; pass radius=, the longest input")
    if layer.norm is not None and radius is not None:
        raise ValueError("the layer is behind a norm, which sets the length of its inputs; leave radius out")
    if radius is not None and not 0 < radius < float("inf"):
        raise ValueError(f"radius must be positive and finite, got {radius}")
    length = float(radius) if radius is not None else layer.d_in**0.5
    ball = layer.norm is None or layer.norm.eps > 0
    basis = _domain_basis(layer)
    rows = layer.directions(direction)
    factors = layer.double().factors()
    found = [_extremes(forms(factors, row[None].double())[0].cpu().numpy(), layer, basis, length, ball) for row in rows]
    stacked = [torch.tensor(np.stack(one)).to(layer.w) for one in zip(*found, strict=True)]
    return Range(*stacked)


def _domain_basis(layer: Layer) -> np.ndarray | None:
    """Orthonormal basis of the inputs' span where it is not everything: the centred subspace of LayerNorm."""
    if layer.norm is None or layer.norm.kind != "layer" or layer.d_in == 1:
        return None
    centred = np.eye(layer.d_in) - 1 / layer.d_in
    return np.linalg.svd(centred)[0][:, :-1]


def _extremes(form: np.ndarray, layer: Layer, basis: np.ndarray | None, length: float, ball: bool) -> tuple:
    quadratic, linear, constant = form, np.zeros(len(form)), 0.0
    if layer.affine:
        quadratic, linear, constant = form[1:, 1:], 2 * form[0, 1:], form[0, 0]
    if layer.norm is not None and layer.norm.kind == "layer" and layer.d_in == 1:
        zero = np.zeros(1)  # a single centred number is 0
        return constant, constant, zero, zero, 0.0
    if basis is not None:
        quadratic, linear = basis.T @ quadratic @ basis, basis.T @ linear
    upper, highest = trust_region(quadratic, linear, length, ball)
    lower, lowest = trust_region(-quadratic, -linear, length, ball)

    def attained(x: np.ndarray) -> float:
        return float(x @ quadratic @ x + linear @ x)

    width = max(upper + lower, np.finfo(float).tiny)
    gap = max(upper - attained(highest), lower + attained(lowest), 0.0) / width
    if basis is not None:
        lowest, highest = basis @ lowest, basis @ highest
    return constant - lower, constant + upper, lowest, highest, gap


def trust_region(quadratic: np.ndarray, linear: np.ndarray, length: float, ball: bool) -> tuple[float, np.ndarray]:
    r"""An upper bound on x^T A x + l^T x over \|x\| = length (or <= length), and where it is attained.

    The dual :math:`\min_{\mu \ge \lambda_1} \mu r^2 + \sum_i g_i^2 / (\mu - \lambda_i)`, with g half the linear part in
    the eigenbasis (and mu >= 0 on a ball), is solved as one equation in t = mu - lambda_1.
    """
    values, vectors = np.linalg.eigh(quadratic)
    g = vectors.T @ linear / 2
    below = values[-1] - values  # >= 0
    if ball and values[-1] < 0:
        # The stationary point may lie inside, where mu = 0.
        inside = -g / values
        if np.linalg.norm(inside) <= length:
            return float(-(g * g / values).sum()), vectors @ inside
    scale = max(np.abs(values).max() * length, np.linalg.norm(g), np.finfo(float).tiny)
    top = below <= 1e-12 * max(np.abs(values).max(), np.finfo(float).tiny)
    reached = np.linalg.norm(g[top])
    if reached <= _HARD * scale:
        # The hard case: the linear part does not reach the top eigenvectors, which then take what length is left.
        z = np.where(top, 0, g / np.where(top, 1, below))
        left = length**2 - z @ z
        if left >= 0:
            z[np.flatnonzero(top)[-1]] = left**0.5
            bound = values[-1] * length**2 + (g[~top] ** 2 / below[~top]).sum()
            return float(bound + 2 * reached * length), vectors @ z
    lower, upper = max(float(reached) / length, 1e-14 * float(scale)), 2 * float(np.linalg.norm(g)) / length
    t = _root(lambda t: 1 / np.linalg.norm(g / (t + below)) - 1 / length, lower, upper)
    mu = max(values[-1] + t, 0.0) if ball else values[-1] + t
    z = g / (mu - values)
    z *= length / np.linalg.norm(z)
    return float(mu * length**2 + (g * g / (mu - values)).sum()), vectors @ z


def _root(function: Callable[[float], Any], lower: float, upper: float) -> float:
    """The zero of an increasing function, or the end of the bracket that is nearest to it."""
    if function(lower) >= 0:
        return lower
    zero: Any = brentq(function, lower, upper, xtol=1e-300, rtol=4 * np.finfo(float).eps, maxiter=500)
    return float(zero)
