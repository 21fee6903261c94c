"""Starts: exact decompositions of one site, made from its weights and inputs without training."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._pieces import Pieces, rank_one_pieces

_SAMPLE = 6144  # rows that exemplars are sought among
_REACHED = 1e-9  # relative mean square below which an input direction counts as never used
_HEEDED = 1e-2  # least share of the mean sensitivity that an output direction counts by
_CUTS = 3  # numbers of exemplars that the ledger chooses from
_CONE = 512  # rows that a direction is refined on
_AGREEMENTS = (0.99, 0.9)  # |cosines| from which two inputs count as one direction
_PARALLEL = 1e-5  # sine up to which two rows or columns of a matrix count as one direction: that of rounding
_ROUNDING = 1e-5  # share of the weight that counts as rounding
_LEAST_COUNT = 2  # rows that must agree on a direction for it to be an exemplar
_LEAST_WEIGHT = 0.01  # rows whose effect is below this share of the mean are not looked at


class Reach:
    """The span of a site's inputs, where its weights are decomposed; the rest of W is remainder.

    Attributes:
        basis: Orthonormal columns, ordered by the mean square of the inputs along them.
        power: Mean square of the inputs along each column.
        weight: W in this basis.
    """

    def __init__(self, matrix: Float[Tensor, "d_out d_in"], rows: Float[Tensor, "row d_in"]) -> None:
        """Diagonalise the inputs' second moment."""
        moment = rows.double().T @ rows.double() / len(rows)
        if not moment.any():
            # Inputs that are zero everywhere prefer no direction.
            moment = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        power, basis = torch.linalg.eigh(moment)
        kept = power > _REACHED * power[-1]
        self.basis = basis[:, kept].flip(-1).to(matrix.dtype)
        self.power = power[kept].flip(-1).to(matrix.dtype)
        self.weight = matrix @ self.basis

    def lifted(self, v: Tensor, u: Tensor) -> Pieces:
        """Pieces with v given in the basis, as pieces of the site."""
        return rank_one_pieces(v @ self.basis.T, u).balanced()


def svd_start(reach: Reach) -> Pieces:
    """Singular pairs of W in the metric of the inputs: pieces with uncorrelated activations."""
    root = reach.power.sqrt()
    left, sizes, right = torch.linalg.svd(reach.weight * root, full_matrices=False)
    kept = sizes > 1e-6 * sizes[0]
    return reach.lifted(right[kept] / root, (left * sizes).T[kept])


def effect_start(reach: Reach, sensitivity: Float[Tensor, "row d_out"]) -> Pieces:
    """Singular pairs of W in the metrics of the inputs and of what follows: directions that count little come last.

    Args:
        reach: The span of the inputs.
        sensitivity: Gradients of the model's output at the site's output; their second moment is the metric.

    Source:
        The two metrics are the factors of K-FAC (Martens and Grosse 2015, arXiv 1503.05671); pairs in them ours.
    """
    moment = sensitivity.double().T @ sensitivity.double()
    floor = _HEEDED * float(moment.diagonal().mean()) or 1.0
    metric = moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    upper = torch.linalg.cholesky(metric, upper=True).to(reach.weight)
    root = reach.power.sqrt()
    left, sizes, right = torch.linalg.svd(upper @ reach.weight * root, full_matrices=False)
    kept = sizes > 1e-6 * sizes[0]
    u = torch.linalg.solve_triangular(upper, (left * sizes)[:, kept], upper=True)
    return reach.lifted(right[kept] / root, u.T)


def row_start(reach: Reach) -> Pieces:
    """One piece an output coordinate (a neuron before its nonlinearity)."""
    return reach.lifted(
        reach.weight, torch.eye(len(reach.weight), dtype=reach.weight.dtype, device=reach.weight.device)
    )


def column_start(reach: Reach, matrix: Float[Tensor, "d_out d_in"]) -> Pieces:
    """One piece an input coordinate (a neuron after its nonlinearity)."""
    return reach.lifted(reach.basis, matrix.T)


def row_line_start(reach: Reach) -> Pieces | None:
    """One piece a direction that rows share: what several output coordinates read alike; None where none do."""
    lines = _lines(reach.weight)
    return reach.lifted(*lines) if len(lines[0]) < len(reach.weight) else None


def column_line_start(reach: Reach, matrix: Float[Tensor, "d_out d_in"]) -> Pieces | None:
    """One piece a direction that columns share: what several input coordinates write alike; None where none do."""
    u, v = _lines(matrix.T)
    return reach.lifted(v @ reach.basis, u) if len(v) < matrix.shape[1] else None


def _lines(vectors: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "line d"], Float[Tensor, "line n"]]:
    """Unit directions on which the vectors lie, and each vector's length along its own; zero vectors have none."""
    length = vectors.norm(dim=1)
    unit = torch.nn.functional.normalize(vectors.double())
    same = 1 - (unit @ unit.T).square() < _PARALLEL**2
    left = length > _REACHED * length.max()
    directions, lengths = [vectors[:0]], [vectors.new_zeros(0, len(vectors))]
    while left.any():
        first = int(length.where(left, 0).argmax())
        own = left & same[first]
        signs = torch.sign(unit[own] @ unit[first]).to(vectors.dtype)
        directions.append(torch.nn.functional.normalize(signs @ vectors[own], dim=0)[None])
        lengths.append((vectors @ directions[-1][0]).where(own, 0)[None])
        left &= ~own
    return torch.cat(directions), torch.cat(lengths)


class Exemplars(NamedTuple):
    """Directions that many inputs share, densest first.

    Attributes:
        agreement: |cosine| from which two inputs count as one direction.
        directions: Unit vectors.
        cuts: How many of them to take, each with the factor by which the density falls there.
    """

    agreement: float
    directions: Float[Tensor, "exemplar d"]
    cuts: dict[int, float]


def exemplars(
    rows: Float[Tensor, "row d"], power: Float[Tensor, " d"], effects: Float[Tensor, " row"], most: int
) -> list[Exemplars]:
    """Find directions that many inputs share, one set for each agreement.

    Inputs that use one mechanism alone lie on its line exactly; inputs that use several lie scattered. So lines that
    many inputs agree on are mechanisms. An input counts as far as the site matters to the output there (up to one), so
    that lines which only the data has, and the model never reads, do not. Each direction is refined by narrowing the
    cone around its densest member.

    Args:
        rows: Inputs of a site, in a basis in which their coordinates are uncorrelated.
        power: Mean square of each coordinate.
        effects: Divergence of the final output when the whole site is ablated on that input.
        most: At most so many directions.
    """
    if not effects.any():
        return []
    weight = (effects / effects.mean()).clamp_max(1)
    kept = weight > _LEAST_WEIGHT
    unit, weight = torch.nn.functional.normalize(rows[kept]), weight[kept]
    some = unit[:_SAMPLE]
    cosines = (some @ some.T).abs_()
    found = {agreement: _densest(some, weight[:_SAMPLE], cosines, agreement, most) for agreement in _AGREEMENTS}
    return [_ranked(unit, weight, power, *one) for one in found.items() if len(one[1]) > 1]


def _ranked(
    unit: Float[Tensor, "row d"],
    weight: Float[Tensor, " row"],
    power: Float[Tensor, " d"],
    agreement: float,
    directions: Float[Tensor, "exemplar d"],
) -> Exemplars:
    """Order directions by the density of all rows, each at its nearest, and see where it falls.

    A direction counts as far as no denser one overlaps it where inputs are uncorrelated: there independent mechanisms
    are orthogonal, while the two lines on which a nonlinearity leaves one mechanism (on and off) are not.
    """
    cosine, nearest = (unit @ directions.T).abs().max(1)
    weight = weight.where(cosine > agreement, 0)
    density = torch.zeros_like(directions[:, 0]).index_add_(0, nearest, weight)
    density, order = density.sort(descending=True)
    directions = directions[order]
    white = torch.nn.functional.normalize(directions / power.sqrt())
    density *= 1 - (white @ white.T).tril(-1).abs().amax(1)
    density, order = density.sort(descending=True)
    falls = density / torch.cat([density[1:], density.new_zeros(1)]).clamp_min(_LEAST_COUNT)
    steepest = falls[1:].topk(min(_CUTS, len(falls) - 1))
    cuts = {int(i) + 2: float(fall) for fall, i in zip(*steepest, strict=True)}
    return Exemplars(agreement, directions[order], cuts)


def _densest(
    unit: Float[Tensor, "row d"],
    weight: Float[Tensor, " row"],
    cosines: Float[Tensor, "row row"],
    agreement: float,
    most: int,
) -> Float[Tensor, "exemplar d"]:
    """Directions that rows agree on, densest first."""
    near = cosines > agreement
    left = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    density = near.to(unit.dtype) @ weight
    found = list[Tensor]()
    while len(found) < most:
        centre = int(torch.where(left, density, 0).argmax())
        if not left[centre] or density[centre] < _LEAST_COUNT:
            break
        found.append(_mode(unit[near[centre] & left][:_CONE]))
        taken = left & ((unit @ found[-1]).abs() > agreement)
        taken[centre] = True
        left &= ~taken
        density -= weight[taken] @ near[taken].to(unit.dtype)
    return torch.stack(found) if found else unit[:0]


def _mode(unit: Float[Tensor, "row d"]) -> Float[Tensor, " d"]:
    """The direction that most of a cone's rows share, by narrowing the cone while a quarter stays."""
    cosines = (unit @ unit.T).abs()
    gap = 1 - float(cosines.min())
    least = max(_LEAST_COUNT, len(unit) // 4)
    member, inside = 0, torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    while gap > 1e-7:
        counts = (cosines > 1 - gap).sum(1, dtype=torch.int32)
        if int(counts.max()) < least:
            break
        member = int(counts.argmax())
        inside = cosines[member] > 1 - gap
        gap /= 4
    signs = torch.sign(unit[inside] @ unit[member])[:, None]
    mean = (unit[inside] * signs).mean(0)
    return mean / mean.norm()


def exemplar_start(reach: Reach, directions: Float[Tensor, "exemplar reach"]) -> Pieces:
    """Pieces that each answer to one exemplar: v_c . d_c = 1 and v_c . d_b = 0 for all others where they fit.

    The v are the rows of the pseudo-inverse of the exemplars and u_c = W d_c. What the exemplars do not span is taken
    up by the v where the u span the outputs, else by singular pairs of the rest.
    """
    n = len(directions)
    v = torch.linalg.pinv(directions.T)
    u = directions @ reach.weight.T
    missing = reach.weight - u.T @ v
    if missing.norm() > _ROUNDING * reach.weight.norm() and n >= u.shape[1]:
        v = v + torch.linalg.pinv(u.T, rtol=1e-4) @ missing
    return completed(reach, v, u)


def completed(reach: Reach, v: Float[Tensor, "piece d"], u: Float[Tensor, "piece d_out"]) -> Pieces:
    """Pieces in the basis of the reach, with singular pairs of what they do not sum to."""
    missing = reach.weight - u.T @ v
    if missing.norm() > _ROUNDING * reach.weight.norm():
        root = reach.power.sqrt()
        left, sizes, right = torch.linalg.svd(missing * root, full_matrices=False)
        kept = sizes > _ROUNDING * sizes[0]
        v, u = torch.cat([v, right[kept] / root]), torch.cat([u, (left * sizes).T[kept]])
    return reach.lifted(v, u)


def singular_starts(reach: Reach, sensitivity: Float[Tensor, "row d_out"]) -> dict[str, Pieces]:
    """Singular pairs in either metric, by name."""
    return {"svd": svd_start(reach), "svd by effect": effect_start(reach, sensitivity)}


def coordinate_starts(matrix: Float[Tensor, "d_out d_in"], reach: Reach, most: int) -> dict[str, Pieces]:
    """Coordinates, and the lines that coordinates share, by name."""
    d_out, d_in = matrix.shape
    found = dict[str, Pieces | None]()
    if d_out <= most:
        found |= {"rows": row_start(reach), "row lines": row_line_start(reach)}
    if d_in <= most:
        found |= {"columns": column_start(reach, matrix), "column lines": column_line_start(reach, matrix)}
    return {name: pieces for name, pieces in found.items() if pieces is not None}
