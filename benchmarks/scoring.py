"""Scores of a decomposition against a known answer: pure functions on tensors, free of the engine.

No score depends on the gauge: neither on how a piece's scale is shared between its two factors, nor on the
basis inside a component of higher rank, nor on the order of the components.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.targets import PerFeature, Target


class Factors(NamedTuple):
    """Components of one site: component c has the weight ``sum_{r: owner[r] == c} u_r v_r^T``."""

    u: Float[Tensor, "row d_out"]
    v: Float[Tensor, "row d_in"]
    owner: Int[Tensor, " row"]

    @property
    def n(self) -> int:
        """Number of components."""
        return int(self.owner.max()) + 1 if len(self.owner) else 0

    @property
    def total(self) -> Float[Tensor, "d_out d_in"]:
        """Sum of all components."""
        return self.u.T @ self.v

    @property
    def transposed(self) -> "Factors":
        """The components of the transposed matrix."""
        return Factors(self.v, self.u, self.owner)


# ------------------------------------------------------------ importance patterns on one-hot probes


def matched_columns(importances: Float[Tensor, "probe component"]) -> tuple[list[int], list[int]]:
    """Pair probes with components so that the paired importances sum to the most (Hungarian)."""
    rows, columns = linear_sum_assignment(-importances.detach().double().cpu().numpy())
    return rows.tolist(), columns.tolist()


def pattern_errors(importances: Float[Tensor, "probe component"], tolerance: float = 0.1) -> int:
    """Count where importances on one-hot probes differ from "exactly one component per feature".

    Every probe's own component must be at least ``1 - tolerance``, and every other importance, surplus
    components included, at most `tolerance`. A probe without a component counts as one error.

    Source:
        SPD's ``IdentityCIError``; probes are one-hot at .75 there.
    """
    rows, columns = matched_columns(importances)
    own = importances[rows, columns]
    on = int((importances > tolerance).sum()) - int((own > tolerance).sum())
    return int((own < 1 - tolerance).sum()) + on + len(importances) - len(rows)


def dense_errors(
    importances: Float[Tensor, "probe component"],
    ranks: Int[Tensor, " component"],
    k: int,
    tolerance: float = 0.1,
) -> int:
    """Count where importances on probes differ from "one mechanism of rank `k`".

    Components are taken by falling sum of importances until their ranks sum to `k`. An error is each rank of
    a taken component that no probe switches on (at least ``1 - tolerance``), each rank short of `k` or above
    it, and each importance above `tolerance` of a component not taken.

    Args:
        importances: One row per probe.
        ranks: Rank of each component.
        k: Rank of the mechanism.
        tolerance: Distance from 0 or 1 that is forgiven.

    Source:
        SPD's ``DenseCIError``, which this equals when all ranks are one; ranks are ours.
    """
    errors, held, taken = 0, 0, torch.zeros(importances.shape[1], dtype=torch.bool)
    # A component that is never on holds no rank; it can neither fill up nor overshoot.
    by_mass = importances.sum(0).argsort(descending=True).tolist()
    for column in [c for c in by_mass if importances[:, c].max() > tolerance]:
        if held >= k:
            break
        rank = int(ranks[column])
        held += rank
        taken[column] = True
        if importances[:, column].max() < 1 - tolerance:
            errors += rank
    return errors + abs(held - k) + int((importances[:, ~taken.to(importances.device)] > tolerance).sum())


def active_per_input(importances: Float[Tensor, "*batch component"], threshold: float = 0.1) -> float:
    """Mean number of components that are on (importance above `threshold`) for an input."""
    return (importances > threshold).double().sum(-1).mean().item()


def true_active_per_input(target: Target, inputs: Float[Tensor, "batch d_in"]) -> float:
    """Mean number of features that are on for an input: the true `active_per_input` of a per-feature site."""
    return target.active(inputs).double().sum(-1).mean().item()


# ------------------------------------------------------------ weights of components


def inner_products(left: Factors, right: Factors) -> Float[Tensor, "left right"]:
    """Frobenius inner products of all pairs of components, without forming a weight matrix; in float64."""
    products = (left.u.double() @ right.u.double().T) * (left.v.double() @ right.v.double().T)
    rows = products.new_zeros(left.n, products.shape[1]).index_add_(0, left.owner, products)
    return rows.new_zeros(left.n, right.n).index_add_(1, right.owner, rows)


def squared_norms(factors: Factors) -> Float[Tensor, " component"]:
    """Squared Frobenius norm of each component, in float64."""
    return inner_products(factors, factors).diagonal().clamp(min=0)


class Matching(NamedTuple):
    """Found components paired with the true ones.

    Attributes:
        columns: Index of the component paired with each true one; -1 where there is none left.
        relative_error: Frobenius norm of (found - true) over the true one's; 1 where nothing is paired.
        norm_ratio: Frobenius norm of the found component over the true one's; 0 where nothing is paired.
    """

    columns: Int[Tensor, " true"]
    relative_error: Float[Tensor, " true"]
    norm_ratio: Float[Tensor, " true"]


def matching(found: Factors, truth: Factors) -> Matching:
    """Pair found components with true ones so that the summed squared relative errors are least (Hungarian).

    Accurate to about 1e-7 relative: the error comes from Gram matrices in float64.
    """
    norms, true_norms = squared_norms(found), squared_norms(truth)
    differences = (norms + true_norms[:, None] - 2 * inner_products(truth, found)).clamp(min=0)
    squared = differences / true_norms[:, None]
    rows, columns = linear_sum_assignment(squared.cpu().numpy())
    result = Matching(torch.full((truth.n,), -1), torch.ones(truth.n).double(), torch.zeros(truth.n).double())
    index, chosen = torch.from_numpy(rows), torch.from_numpy(columns)
    result.columns[index] = chosen
    result.relative_error[index] = squared.cpu()[index, chosen].sqrt()
    result.norm_ratio[index] = (norms.cpu()[chosen] / true_norms.cpu()[index]).sqrt()
    return result


def mean_max_cosine(found: Factors, truth: Factors) -> tuple[float, float]:
    """Mean over features of the best cosine of any component, and those components' mean norm ratio.

    Compared is what a component and the true piece give for the feature's own direction (TMS: a column of the
    first matrix, a row of the last). The side is the one on which the true pieces' directions are
    independent. Random components that sum to the matrix reach .994 on TMS 5-2, so state `random_null` beside
    it.

    Returns:
        MMCS and ML2R.

    Raises:
        ValueError: If the true pieces are independent on neither side, or are not of rank one each.

    Source:
        Bushnaq et al. 2025 (SPD), table 1; other sides than the columns of a matrix are ours.
    """
    if len(truth.owner) != truth.n:
        raise ValueError(f"truth has {len(truth.owner)} rows for {truth.n} components, expected rank one each")
    order = truth.owner.argsort()
    truth = Factors(truth.u[order], truth.v[order], truth.owner[order])
    if torch.linalg.matrix_rank(truth.v.double()) < truth.n:
        found, truth = found.transposed, truth.transposed
        if torch.linalg.matrix_rank(truth.v.double()) < truth.n:
            raise ValueError("the true pieces' directions are linearly dependent on both sides; use `matching`")
    directions = torch.linalg.pinv(truth.v.double()).T
    cosines, ratios = [], []
    for answer, direction in zip(truth.u.double(), directions, strict=True):
        rows = found.u.double() * (found.v.double() @ direction)[:, None]
        answers = rows.new_zeros(found.n, rows.shape[1]).index_add_(0, found.owner, rows)
        norms = answers.norm(dim=1)
        # A component that does not answer at all has no direction: the floor makes its cosine 0.
        all_cosines = (answers @ answer) / (norms * answer.norm()).clamp(min=1e-300)
        best = all_cosines.argmax()
        cosines.append(all_cosines[best].item())
        ratios.append((norms[best] / answer.norm()).item())
    return sum(cosines) / len(cosines), sum(ratios) / len(ratios)


# ------------------------------------------------------------ nulls: decompositions that cannot be right


def random_null(matrix: Float[Tensor, "d_out d_in"], n: int, seed: int) -> Factors:
    """Draw `n` random rank-one components that sum to the matrix exactly.

    Directions are Gaussian on the matrix's shorter side; the other side follows by the pseudo-inverse.

    Raises:
        ValueError: If `n` directions cannot span the shorter side.
    """
    if matrix.shape[1] < matrix.shape[0]:
        return random_null(matrix.T, n, seed).transposed
    if n < matrix.shape[0]:
        raise ValueError(f"n is {n}, expected at least {matrix.shape[0]} so that the components can sum to the matrix")
    rng = torch.Generator().manual_seed(seed)
    u = torch.randn(n, matrix.shape[0], generator=rng, dtype=torch.float64).to(matrix.device)
    v = torch.linalg.pinv(u.T) @ matrix.double()
    return Factors(u.to(matrix.dtype), v.to(matrix.dtype), torch.arange(n, device=matrix.device))


def svd_null(matrix: Float[Tensor, "d_out d_in"]) -> Factors:
    """Split the matrix into its singular directions, one component a rank."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return Factors((left * values).T, right, torch.arange(len(values), device=matrix.device))


def neuron_null(matrix: Float[Tensor, "d_out d_in"], rows: bool) -> Factors:
    """Split the matrix into its rows (output neurons) or its columns (input neurons)."""
    if not rows:
        return neuron_null(matrix.T, rows=True).transposed
    n = len(matrix)
    return Factors(
        torch.eye(n, dtype=matrix.dtype, device=matrix.device), matrix, torch.arange(n, device=matrix.device)
    )


# ------------------------------------------------------------ oracle: the known answer


def oracle_components(target: Target) -> dict[str, Factors]:
    """Return the true components of every site; they sum to the site's matrix on all inputs that can occur.

    A dense site is one component of full rank, whose basis is a matter of convention.
    """
    components = {}
    for path, mechanism in target.mechanisms.items():
        if isinstance(mechanism, PerFeature):
            components[path] = Factors(mechanism.u, mechanism.v, mechanism.owner)
            continue
        matrix = target.model.get_submodule(path).get_parameter("weight").detach()
        rows = neuron_null(matrix, rows=matrix.shape[0] <= matrix.shape[1])
        components[path] = Factors(rows.u, rows.v, torch.zeros_like(rows.owner))
    return components


def oracle_importances(
    target: Target, inputs: Float[Tensor, "batch d_in"]
) -> dict[str, Float[Tensor, "batch component"]]:
    """Return the true importances: 1 for the features that are on, 0 for the others, 1 at a dense site."""
    active = target.active(inputs).to(inputs.dtype)
    return {
        path: active if isinstance(mechanism, PerFeature) else torch.ones(len(inputs), 1, dtype=inputs.dtype)
        for path, mechanism in target.mechanisms.items()
    }
