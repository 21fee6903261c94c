"""Diagnosis of overfitting: how concentrated spectra are, and on how few pixels their vectors lie."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._directions import Direction
from bilinear._eigen import eigen
from bilinear._layer import Layer
from bilinear._metric import Metric, check_layer


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Concentration of spectra and of vectors, per direction; none of it depends on data.

    Attributes:
        effective_rank: (sum |lambda|)^2 / sum lambda^2 over the whole spectrum.
        leading_share: Share of the squared spectrum in the largest pairs.
        pixel_count: Effective number of inputs of the leading vectors, (sum |v_i|)^2 / sum v_i^2, averaged.
        outlier_share: Share of the leading vectors' squared length on inputs that are rarely active.
        k: Leading pairs looked at.
    """

    effective_rank: Float[Tensor, " direction"]
    leading_share: Float[Tensor, " direction"]
    pixel_count: Float[Tensor, " direction"]
    outlier_share: Float[Tensor, " direction"]
    k: int

    def __str__(self) -> str:
        """Means over the directions."""
        means = [float(x.double().mean()) for x in (self.effective_rank, self.leading_share, self.pixel_count)]
        outliers = float(self.outlier_share.double().mean())
        rare = "" if math.isnan(outliers) else f", {outliers:.1%} of them on rarely active inputs"
        return (
            f"effective rank {means[0]:.1f}, top {self.k} pairs hold {means[1]:.1%} of the spectrum, their vectors "
            f"cover {means[2]:.0f} inputs{rare}"
        )


def effective_count(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """(sum |x|)^2 / sum x^2: n for equal sizes, 1 for a single entry, 0 for zeros."""
    squares = x.square().sum(-1)
    return torch.where(squares > 0, x.abs().sum(-1).square() / torch.where(squares > 0, squares, 1), 0)


@torch.no_grad()
def diagnosis(
    layer: Layer,
    direction: Direction | None = None,
    *,
    k: int = 5,
    metric: str | Metric | Tensor | None = None,
    inputs: Tensor | None = None,
    rare: float = 0.01,
) -> Diagnosis:
    """Concentration of a layer's spectra and vectors, which tells networks trained on noisy inputs from others.

    Args:
        layer: The layer.
        direction: As in `Layer.form`.
        k: Leading pairs.
        metric: As in `eigen`; the pixel count means most in the input metric.
        inputs: (..., d_in), to find inputs that are rarely active; without them `outlier_share` is nan.
        rare: Share of the inputs on which such an entry may be other than 0.

    Source:
        Pixel concentration of noise-free networks: Pearce et al. (arXiv 2410.08417), section 4.1 and appendix B;
        figures ours.
    """
    check_layer(layer)
    pairs = eigen(layer, layer.directions(direction), metric=metric)
    squares = pairs.values.square()
    whole = squares.sum(1)
    top = pairs.top(k)
    vectors = top.vectors[:, 1:] if layer.affine else top.vectors
    outliers = torch.full_like(whole, torch.nan)
    if inputs is not None:
        active = (layer.coordinates(inputs).reshape(-1, layer.n_coordinates)[:, int(layer.affine) :] != 0).double()
        seldom = active.mean(0) < rare
        lengths = vectors.square().sum(1)
        share = vectors[:, seldom].square().sum(1) / torch.where(lengths > 0, lengths, 1)
        outliers = share.mean(1)
    return Diagnosis(
        effective_rank=pairs.effective_rank(),
        leading_share=squares[:, :k].sum(1) / torch.where(whole > 0, whole, 1),
        pixel_count=effective_count(vectors.mT).mean(1),
        outlier_share=outliers,
        k=k,
    )
