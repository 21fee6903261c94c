"""Bilinear layers for the tests: every combination of biases, skip path and norm, seeded."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilinear import Layer, Norm
from tests.models import drawn

KINDS = ("plain", "biases", "skip", "biases and skip", "rms", "layer norm", "eps", "norm and skip")

cases = {
    "d_in": st.integers(1, 6),
    "hidden": st.integers(1, 8),
    "d_out": st.integers(1, 4),
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 2**16),
}


def bilinear_layer(
    d_in: int, hidden: int, d_out: int, kind: str = "plain", seed: int = 0, dtype: torch.dtype = torch.float64
) -> Layer:
    """A layer with normal weights."""

    def weights(n: int, *shape: int) -> Tensor:
        return drawn(*shape, seed=seed + n)

    extra: dict = {}
    if "biases" in kind or kind == "layer norm":
        extra |= {"w_bias": weights(3, hidden), "v_bias": weights(4, hidden), "d_bias": weights(5, d_out)}
    if "skip" in kind:
        extra["skip"] = weights(6, d_out, d_in)
    if kind in ("rms", "norm and skip"):
        extra["norm"] = Norm("rms", 0.0, weights(7, d_in))
    if kind == "layer norm":
        extra["norm"] = Norm("layer", 1e-5, weights(7, d_in), weights(8, d_in))
    if kind == "eps":
        extra["norm"] = Norm("rms", 0.3)
    layer = Layer(weights(0, hidden, d_in), weights(1, hidden, d_in), weights(2, d_out, hidden), **extra)
    return layer.to(dtype)


def dense_tensor(layer: Layer) -> Tensor:
    """The third-order tensor, symmetric in its last two modes, by a loop over neurons."""
    w, v, d = layer.factors()
    found = torch.zeros(layer.d_out, w.shape[1], w.shape[1], dtype=w.dtype)
    for a in range(len(w)):
        product = torch.outer(w[a], v[a])
        found += d[:, a, None, None] * (product + product.T) / 2
    return found


def term_scale(layer: Layer, x: Tensor) -> float:
    """Size of the largest term that a sum over the layer's neurons or components can have on these inputs."""
    w, v, d = layer.factors()
    square = layer.coordinates(x).square().sum(-1).max()
    sizes = (d.abs() * w.norm(dim=1) * v.norm(dim=1)).sum(1).max()
    return max(float(sizes * square), 1e-300)
