"""Shared components: symmetric CP through the factors, with the diagnostics that say whether to trust it."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment, minimize
from torch import Tensor

from bilinear._checks import check_count
from bilinear._eigen import eigen
from bilinear._factors import Factors
from bilinear._gram import as_double, form_norms
from bilinear._layer import Layer
from bilinear._metric import Metric, resolved
from bilinear._squares import Squares, squares_of

_RIDGE = 1e-6  # of the norm penalty, relative to |T|^2; keeps the infimum attained where no best CP exists
_AS_GOOD = 0.01  # of |T|: starts that end this close to the best are as good


@dataclass(frozen=True, eq=False)
class SharedSquares:
    """A symmetric CP decomposition: squares that all outputs share.

    Attributes:
        squares: The components, most important first, to be run or written back.
        error: Relative error |T - T^| / |T| in the metric.
        errors: That of every start, best first.
        agreement: Mean similarity of the best start's components with those of each other start that fits as well,
            after matching; 1 is the same solution. nan where no other start does. Far below 1 the squares compress the
            layer, but other sets do so as well: none of them is a mechanism by itself.
        as_good: Starts that fit as well, the best one included: their error is at most .01 above its.
        cancellation: Sum of the components' squared norms over the squared norm of their sum, in the metric; far above
            1 means large components that cancel.
        steps: Optimiser steps of the best start.
        converged: Whether the optimiser of the best start stopped by itself.
        metric: In which it was fitted.
    """

    squares: Squares
    error: float
    errors: tuple[float, ...]
    agreement: float
    as_good: int
    cancellation: float
    steps: int
    converged: bool
    metric: Metric

    def __str__(self) -> str:
        """The diagnostics as text."""
        spread = ", ".join(f"{one:.4f}" for one in self.errors)
        end = "converged" if self.converged else "stopped at the limit of steps"
        agreement = f"agreement of the {self.as_good} that fit as well {self.agreement:.3f}"
        return (
            f"{self.squares.n} shared squares, metric {self.metric.name}: relative error {self.error:.4f} "
            f"(starts: {spread}), {agreement if self.as_good > 1 else 'no other start fits as well'}, "
            f"cancellation {self.cancellation:.2f}, {self.steps} steps, {end}"
        )

    __repr__ = __str__


class _Problem:
    """Squared distance to a layer's tensor as a function of unit vectors, with the writes solved for in closed form."""

    def __init__(self, factors: Factors, square: float, n: int) -> None:
        self.factors, self.square, self.n = factors, square, n

    def writes(self, s: Float[Tensor, "coordinate component"]) -> tuple[Tensor, Tensor]:
        """The best writes for given unit vectors, and the tensor's inner products with the vectors' squares."""
        w, v, d = self.factors
        target = d @ ((w @ s) * (v @ s))
        gram = (s.T @ s).square()
        gram.diagonal().add_(_RIDGE)
        return torch.linalg.solve(gram, target.T).T, target

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Relative squared error and its gradient."""
        raw = torch.from_numpy(flat).to(self.factors.w.device).reshape(-1, self.n)
        sizes = raw.norm(dim=0)
        s = raw / sizes
        w, v, d = self.factors
        c, target = self.writes(s)
        # With the best writes c, the ridge's own cost included, the error is |T|^2 - <c, target>.
        error = self.square - float((c * target).sum())
        back = d.T @ c
        slope = -2 * (w.T @ (back * (v @ s)) + v.T @ (back * (w @ s))) + 4 * s @ ((c.T @ c) * (s.T @ s))
        slope = (slope - s * (s * slope).sum(0)) / sizes
        return error / self.square, (slope / self.square).reshape(-1).cpu().numpy()


@torch.no_grad()
def shared_squares(
    layer: Layer,
    n: int,
    *,
    metric: str | Metric | Tensor | None = None,
    starts: int = 1,
    steps: int = 300,
    seed: int = 0,
) -> SharedSquares:
    r"""Squares shared by all outputs: the best T ~ sum_r c_r (x) s_r (x) s_r that was found.

    .. math:: \min_{S} \min_C \Big\| T - \sum_r c_r \otimes s_r \otimes s_r \Big\|^2 + \rho \|C\|^2

    The inner problem is solved in closed form (variable projection) through the factors; the outer by L-BFGS. The first
    start takes the largest eigenvectors over all outputs, the others perturb random ones.

    Args:
        layer: The layer.
        n: Number of squares.
        metric: As in `eigen`.
        starts: Independent fits, which say by their agreement whether the components mean anything.
        steps: Most optimiser steps a start.
        seed: Of the random starts.

    Returns:
        The best fit with its diagnostics, `origin` "fitted".

    Raises:
        ValueError: For counts that cannot be, or a layer that is zero.

    Source:
        Symmetric CP (INDSCAL): Carroll and Chang 1970; variable projection: Golub and Pereyra 1973; through the
        factors of a bilinear layer, ours.
    """
    measure = resolved(layer, metric)
    check_count("n", n, 2 * layer.hidden + 2 * layer.n_coordinates, "twice the products and coordinates")
    check_count("starts", starts, 1000, "starts")
    factors = as_double(measure.whitened(layer.factors()))
    square = float(form_norms(factors, layer.directions(None)).square().sum())
    if not square > 0:
        raise ValueError("the layer is zero; there is nothing to decompose")
    rng = torch.Generator().manual_seed(seed)
    problem, fits = _Problem(factors, square, n), []
    for index in range(starts):
        first = _start(layer, measure, factors, n, rng, spectral=index == 0)
        found = minimize(
            problem, first.cpu().numpy().ravel(), jac=True, method="L-BFGS-B",
            options={"maxiter": steps, "maxfun": 2 * steps, "maxcor": 20, "ftol": 1e-10},
        )  # fmt: skip
        raw = torch.from_numpy(found.x).to(factors.w.device).reshape(-1, n)
        s = raw / raw.norm(dim=0)
        fits.append((s, problem.writes(s)[0], found))
    fits.sort(key=lambda fit: fit[2].fun)
    return _result(layer, measure, factors, square, fits)


def _start(layer: Layer, measure: Metric, factors: Factors, n: int, rng: torch.Generator, spectral: bool) -> Tensor:
    noise = torch.randn(factors.w.shape[1], n, generator=rng, dtype=torch.float64).to(factors.w.device)
    noise = noise / noise.norm(dim=0)
    if not spectral:
        return noise
    per_output = min(layer.n_coordinates, max(1, -(-n // layer.d_out)))
    # Eigenvectors of the whitened forms themselves: the metric is in the factors already.
    pairs = eigen(Layer(factors.w, factors.v, factors.d), k=per_output)
    order = pairs.values.abs().reshape(-1).argsort(descending=True)[:n]
    vectors = pairs.vectors.permute(1, 0, 2).flatten(1)[:, order]
    # Outputs may share an eigenvector; a little noise lets its copies part.
    found = noise.clone()
    found[:, : len(order)] = vectors + 0.05 * noise[:, : len(order)]
    return found


def _result(layer: Layer, measure: Metric, factors: Factors, square: float, fits: list) -> SharedSquares:
    errors = tuple(_error(factors, square, s, c) for s, c, _ in fits)
    s, c, found = fits[0]
    as_good = [fit for fit, error in zip(fits[1:], errors[1:], strict=True) if error <= errors[0] + _AS_GOOD]
    agreements = [match_score((s, c), (other, writes)) for other, writes, _ in as_good]
    order = c.norm(dim=0).argsort(descending=True)
    gram = (s.T @ s).square() * (c.T @ c)
    whole = float(gram.sum())
    vectors = measure.vectors(s[:, order].to(layer.w))
    return SharedSquares(
        squares=squares_of(layer, vectors, c[:, order].to(layer.w), "fitted"),
        error=errors[0],
        errors=errors,
        agreement=float(np.mean(agreements)) if agreements else float("nan"),
        as_good=1 + len(as_good),
        cancellation=float(gram.diagonal().sum()) / whole if whole > 0 else float("inf"),
        steps=int(found.nit),
        converged=bool(found.success),
        metric=measure,
    )


def _error(factors: Factors, square: float, s: Tensor, c: Tensor) -> float:
    w, v, d = factors
    cross = float((c * (d @ ((w @ s) * (v @ s)))).sum())
    own = float(((c.T @ c) * (s.T @ s).square()).sum())
    return max(square - 2 * cross + own, 0.0) ** 0.5 / square**0.5


def match_score(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Mean cosine of two sets of components (unit vectors, writes) as tensors, under the best one-to-one matching."""
    (s, c), (s2, c2) = a, b
    unit, unit2 = (one / one.norm(dim=0).clamp_min(1e-300) for one in (c, c2))
    cosines = (s.T @ s2).square() * (unit.T @ unit2)
    rows, columns = linear_sum_assignment(-cosines.cpu().numpy())
    return float(cosines[rows, columns].mean())
