"""Nulls: the same scores for ways to cut the weights up that cannot be right, at the same number active."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._attack import Ablation, Part
from weightdecomp._forward import Record
from weightdecomp._ledger import price
from weightdecomp._pieces import Pieces
from weightdecomp._regimes import Trial, frequencies, ladder, ledger, rounded, stochastic, summed
from weightdecomp._sites import Site
from weightdecomp._starts import Reach, column_start, row_start, svd_start
from weightdecomp._verification import Candidate

STEPS = 160  # attack budget of a null; ours is shown at the same
_CAPACITY = 8  # a null with more pieces than this multiple of the smaller side of a matrix is left out
_WIDEST = 4096  # inputs wider than this have no second moment computed
_AT_ONCE = 1 << 24  # numbers in one temporary
_ROUNDING = 1e-5  # a remainder whose norm is below this share of W's is rounding


class Place(NamedTuple):
    """What a null needs to know of one site.

    Attributes:
        site: The site.
        reach: The span of the site's inputs.
        n: Number of our components there.
        active: Mean number of our components active per row.
    """

    site: Site
    reach: Reach
    n: int
    active: float


class Unsuitable(ValueError):
    """A null that cannot be made for a model, with the reason."""


def nulls(
    trial: Trial,
    records: Sequence[Record],
    tolerance: float,
    budget: tuple[int, int],
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> tuple[tuple[Candidate, ...], Candidate]:
    """Score every null under the same attack, and price the dense model.

    Per site and input a null's largest contributions are on, above one size a site, so that as many are active on
    average as of ours. Whatever of W the inputs never reach is remainder, ablated like ours.

    Args:
        trial: Our own decomposition on the inputs.
        records: What the target's sites were called with, one record a part.
        tolerance: For the ledger.
        budget: Steps and restarts of the attack.
        seed: Of random directions, sources and attacks.
        on_step: Called after every attack step.

    Returns:
        The nulls, those that had to be skipped with their reason, and the dense row.
    """
    by_site = frequencies(trial)
    try:
        places = [_place(trial, records, site, float(by_site[site.path][0].sum())) for site in trial.ablation.sites]
    except Unsuitable as error:
        return (Candidate("all nulls", reason=str(error)),), _dense(trial, None, tolerance)
    found = []
    for name, start in _STARTS.items():
        rng = torch.Generator(device=places[0].reach.basis.device).manual_seed(seed)
        try:
            pieces = {place.site.path: start(place, rng) for place in places}
        except Unsuitable as error:
            found.append(Candidate(name, reason=str(error)))
            continue
        null = _gated(trial, records, places, pieces)
        found.append(scored(name, null, tolerance, budget, rng, on_step))
    return tuple(found), _dense(trial, places, tolerance)


def scored(
    name: str,
    trial: Trial,
    tolerance: float,
    budget: tuple[int, int],
    rng: torch.Generator,
    on_step: Callable[[], None] | None = None,
) -> Candidate:
    """One candidate's figures."""
    random = stochastic(trial, rng)
    steps, restarts = budget
    return Candidate(
        name=name,
        active=sum(float(frequency.sum()) for frequency, _ in frequencies(trial).values()),
        ledger=ledger(trial, tolerance, random.divergence),
        stochastic=random,
        gates=rounded(trial),
        adversarial=ladder(trial, [steps], restarts, False, rng, on_step).at(steps),
    )


def random_directions(place: Place, rng: torch.Generator) -> Pieces:
    """As many pieces as ours that read random directions in W's row space and sum to W on the inputs' span.

    The directions are rows of a random orthonormal frame, the best conditioned case: nothing cancels, and the least
    squares solution for what they write is the frame times W.
    """
    weight = place.reach.weight
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    rank = int((sizes > 1e-6 * sizes[0]).sum())
    drawn = torch.randn((max(place.n, rank), rank), generator=rng, device=weight.device, dtype=weight.dtype)
    frame = torch.linalg.qr(drawn).Q
    return place.reach.lifted(frame @ right[:rank], frame @ (left[:, :rank] * sizes[:rank]).T)


def _rows(place: Place, rng: torch.Generator) -> Pieces:
    _check_size(place, place.site.shape[0], "rows")
    return row_start(place.reach)


def _columns(place: Place, rng: torch.Generator) -> Pieces:
    _check_size(place, place.site.shape[1], "columns")
    return column_start(place.reach, place.site.matrix())


_STARTS: Mapping[str, Callable[[Place, torch.Generator], Pieces]] = {
    "random directions": random_directions,
    "SVD": lambda place, rng: svd_start(place.reach),
    "rows (neurons out)": _rows,
    "columns (neurons in)": _columns,
}


def _check_size(place: Place, n: int, what: str) -> None:
    most = max(_CAPACITY * min(place.site.shape), place.n)
    if n > most:
        raise Unsuitable(f"{n:,} {what} at {place.site.path!r} are more than the {most:,} pieces scored at most")


@torch.no_grad()
def _place(trial: Trial, records: Sequence[Record], site: Site, active: float) -> Place:
    return Place(site, Reach(site.matrix(), _root_rows(records, site)), trial.ablation.pieces[site.path].n, active)


def _root_rows(records: Sequence[Record], site: Site) -> Float[Tensor, "d_in d_in"]:
    """As many rows as there are inputs' dimensions, with the second moment of all rows of a site."""
    d_in = site.shape[1]
    if d_in > _WIDEST:
        raise Unsuitable(f"{site.path!r} has {d_in:,} inputs, more than the {_WIDEST:,} scored at most")
    moment, n = torch.zeros(d_in, d_in, dtype=torch.float64, device=site.weight.device), 0
    for record in records:
        for operands in record.operands[site.path]:
            for some in _chunks(operands, d_in):
                rows = site.vectors(some).reshape(-1, d_in).double()
                moment, n = moment + rows.T @ rows, n + len(rows)
    power, basis = torch.linalg.eigh(moment / n)
    return (power.clamp_min(0) * d_in).sqrt()[:, None] * basis.T


def _chunks(operands: tuple, d_in: int) -> list[tuple]:
    """The same call on a few inputs at a time where reading out all rows would take much memory."""
    first = operands[0]
    most = max(1, _AT_ONCE // (d_in * max(1, first[0].numel() if first.ndim else 1)))
    if first.ndim < 2 or len(first) <= most:
        return [operands]
    return [
        tuple(x[i : i + most] if isinstance(x, Tensor) else x for x in operands) for i in range(0, len(first), most)
    ]


@torch.no_grad()
def _gated(
    trial: Trial, records: Sequence[Record], places: Sequence[Place], pieces: Mapping[str, Pieces]
) -> Trial:
    """The null with its largest contributions on, as many per row as of ours."""
    importances: list[Masks] = [{} for _ in records]
    remainders = {}
    for place in places:
        path, own, matrix = place.site.path, pieces[place.site.path], place.site.matrix()
        sizes = [
            [own.activations(place.site.read(operands, own.v)).abs() for operands in record.operands[path]]
            for record in records
        ]
        level = _level(torch.cat([a.flatten() for calls in sizes for a in calls]), place.active / own.n)
        for masks, calls in zip(importances, sizes, strict=True):
            masks[path] = [(a > level).to(a.dtype) for a in calls]  # pyright: ignore[reportIndexIssue]
        left = matrix - own.total()
        if left.norm() > _ROUNDING * matrix.norm():
            remainders[path] = left
    ablation = Ablation(trial.ablation.model, trial.ablation.sites, pieces, trial.ablation.divergence, remainders)
    parts = [Part(part.batch, part.target, masks) for part, masks in zip(trial.parts, importances, strict=True)]
    return Trial(ablation, parts, trial.nothing)


def _level(sizes: Float[Tensor, " n"], share: float) -> float:
    """The size that a given share of all sizes is above."""
    above = round(share * len(sizes))
    return -1.0 if above >= len(sizes) else float(sizes.kthvalue(len(sizes) - above).values)


def _dense(trial: Trial, places: Sequence[Place] | None, tolerance: float) -> Candidate:
    """The undecomposed model's bits: every rank of every site active on every row."""
    total, active = None, 0.0
    by_site = frequencies(trial)
    for i, site in enumerate(trial.ablation.sites):
        weight = site.matrix() if places is None else places[i].reach.weight
        rank = int(torch.linalg.matrix_rank(weight))
        ones = torch.ones(rank, dtype=torch.float64)
        own = price(by_site[site.path][1], tolerance, [ones], [torch.ones(rank, dtype=torch.long)], [site.shape])
        total = own if total is None else summed(total, own)
        active += rank
    return Candidate("dense", active, total, reason="every rank always active, nothing left out")
