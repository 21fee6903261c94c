"""Nulls: the same scores for ways to cut the weights up that cannot be right, at the same number active."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._attack import Ablation, Part
from weightdecomp._batches import Batch
from weightdecomp._forward import Operands, inner_activations, recorded
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


class Unsuitable(ValueError):
    """A null that cannot be made for a model, with the reason."""


class Place(NamedTuple):
    """What a null needs to know of one site.

    Attributes:
        site: The site.
        n: Number of our components there.
        active: Mean number of our components active per row.
        span: The span of the site's inputs; None where there are too many of them.
    """

    site: Site
    n: int
    active: float
    span: Reach | None

    @property
    def reach(self) -> Reach:
        """The span of the site's inputs.

        Raises:
            Unsuitable: If it is not known.
        """
        if self.span is None:
            wide = f"{self.site.path!r} has {self.site.shape[1]:,} inputs"
            raise Unsuitable(f"{wide}, more than the {_WIDEST:,} that are scored at most")
        return self.span


@torch.no_grad()
def places(trial: Trial, others: Sequence[Batch] = ()) -> tuple[Place, ...]:
    """All sites of our own decomposition, with the spans of their inputs.

    Args:
        trial: Our own decomposition on the inputs that are scored.
        others: Inputs to take the spans from, as ours were made from others than these; none: the scored ones, on which
            a null is then at its best.
    """
    by_site, found = frequencies(trial), []
    roots = _root_rows(trial.ablation, others or [part.batch for part in trial.parts])
    for site in trial.ablation.sites:
        root, active = roots.get(site.path), float(by_site[site.path][0].sum())
        span = None if root is None else Reach(site.matrix(), root)
        found.append(Place(site, trial.ablation.pieces[site.path].n, active, span))
    return tuple(found)


def null(
    name: str,
    trial: Trial,
    where: Sequence[Place],
    tolerance: float,
    budget: tuple[int, int],
    rng: torch.Generator,
    on_step: Callable[[], None] | None = None,
) -> Candidate:
    """Make and score one null.

    Per site and input its largest contributions are on, above one size a site, so that as many are active on
    average as of ours. Whatever of W the inputs never reach is remainder, ablated like ours.

    Args:
        name: One of `NAMES`.
        trial: Our own decomposition on the inputs.
        where: The sites, from `places`.
        tolerance: For the ledger.
        budget: Steps and restarts of the attack.
        rng: For random directions, sources and the attack.
        on_step: Called after every attack step.

    Returns:
        Its figures, or the reason why it cannot be made for this model.
    """
    try:
        pieces = {place.site.path: _STARTS[name](place, rng) for place in where}
    except Unsuitable as error:
        return Candidate(name, reason=str(error))
    gated = gated_by_size(trial, where, pieces)
    return scored(name, gated, tolerance, budget, rng, on_step)


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

    The directions are rows of a random orthonormal frame, the best conditioned case: nothing cancels, and the
    least squares solution for what they write is the frame times W.
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


NAMES = tuple(_STARTS)


def _check_size(place: Place, n: int, what: str) -> None:
    most = max(_CAPACITY * min(place.site.shape), place.n)
    if n > most:
        raise Unsuitable(f"{n:,} {what} at {place.site.path!r} are more than the {most:,} pieces scored at most")


def _root_rows(ablation: Ablation, batches: Sequence[Batch]) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """Per site that is not too wide, a few rows with the same second moment as all its rows, up to scale."""
    sites = {site.path: site for site in ablation.sites if site.shape[1] <= _WIDEST}
    moments = {}
    for batch in batches:
        for path, calls in recorded(ablation.model, batch, tuple(sites.values())).operands.items():
            for operands in calls:
                site, d_in = sites[path], sites[path].shape[1]
                for some in _chunks(operands, site.read(operands, site.matrix()[:1]).numel() * d_in):
                    rows = site.vectors(some).reshape(-1, d_in).double()
                    moments[path] = moments.get(path, 0.0) + rows.T @ rows
    roots = {}
    for path, moment in moments.items():
        power, basis = torch.linalg.eigh(moment)
        roots[path] = power.clamp_min(0).sqrt()[:, None] * basis.T
    return roots


def _chunks(operands: Operands, numbers: int) -> list[Operands]:
    """The same call on a few inputs at a time where all its rows take much memory."""
    n = len(operands[0])
    most = max(1, n * _AT_ONCE // numbers)
    if operands[0].ndim < 2 or n <= most:
        return [operands]
    return [tuple(x[i : i + most] if isinstance(x, Tensor) else x for x in operands) for i in range(0, n, most)]


@torch.no_grad()
def gated_by_size(trial: Trial, where: Sequence[Place], pieces: Mapping[str, Pieces]) -> Trial:
    """Other components on the same inputs, their largest contributions on, as many per row as of ours."""
    ablation = trial.ablation._replace(pieces=pieces, remainders=_remainders(trial.ablation.sites, pieces))
    sizes = [_sizes(ablation, part) for part in trial.parts]
    levels = {}
    for place in where:
        path = place.site.path
        every = torch.cat([a.flatten() for own in sizes for a in own[path]])
        levels[path] = _level(every, place.active / pieces[path].n)
    parts = []
    for part, own in zip(trial.parts, sizes, strict=True):
        masks = {path: [(a > levels[path]).to(a.dtype) for a in calls] for path, calls in own.items()}
        parts.append(part._replace(importances=masks))
    return Trial(ablation, parts, trial.nothing)


def _remainders(sites: Sequence[Site], pieces: Mapping[str, Pieces]) -> dict[str, Tensor]:
    """What pieces do not sum to, where that is more than rounding."""
    found = {}
    for site in sites:
        left = site.matrix() - pieces[site.path].total()
        if left.norm() > _ROUNDING * site.matrix().norm():
            found[site.path] = left
    return found


def _sizes(ablation: Ablation, part: Part) -> dict[str, list[Float[Tensor, "*batch component"]]]:
    """How large every component's contribution is on the target's own inputs, by site and call."""
    record, found = recorded(ablation.model, part.batch, ablation.sites), {}
    for site in ablation.sites:
        own = ablation.pieces[site.path]
        found[site.path] = [own.activations(inner).abs() for inner in inner_activations(record, site, own)]
    return found


def _level(sizes: Float[Tensor, " n"], share: float) -> float:
    """The size that a given share of all sizes is above."""
    above = round(share * len(sizes))
    return -1.0 if above >= len(sizes) else float(sizes.kthvalue(len(sizes) - above).values)


def dense(trial: Trial, where: Sequence[Place], tolerance: float) -> Candidate:
    """The undecomposed model's bits: every rank of every site active on every row."""
    total, active = None, 0.0
    by_site = frequencies(trial)
    for place in where:
        weight = place.site.matrix() if place.span is None else place.span.weight
        rank = int(torch.linalg.matrix_rank(weight))
        ones, rows = torch.ones(rank, dtype=torch.float64), by_site[place.site.path][1]
        own = price(rows, tolerance, [ones], [torch.ones(rank, dtype=torch.long)], [place.site.shape])
        total = own if total is None else summed(total, own)
        active += rank
    return Candidate("dense", active, total, reason="every rank always active, nothing left out")
