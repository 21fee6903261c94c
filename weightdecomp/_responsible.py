"""Which components are responsible for a behaviour, by what the output loses when they are taken out of the weights."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightdecomp._batches import Batch, call, size
from weightdecomp._circuits import Member
from weightdecomp._forward import Operands, recorded, replaced
from weightdecomp._sample import without
from weightdecomp._sites import Site

if TYPE_CHECKING:
    from weightdecomp._decomposition import Decomposition

Score = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Responsible:
    """Components without which a behaviour is gone.

    Attributes:
        members: The components, in the order in which they were found.
        before: Mean score of the target on the on-target inputs.
        after: The same with the members taken out.
        goal: What it was to fall to.
        off_target: Mean divergence on the off-target inputs with the members taken out.
        tried: Sets of components that were taken out and measured.
    """

    members: tuple[Member, ...]
    before: float
    after: float
    goal: float
    off_target: float
    tried: int

    @property
    def reached(self) -> bool:
        """Whether the score fell to the goal."""
        return self.after <= self.goal


def responsible(
    decomposition: "Decomposition",
    on_target: Iterable[Batch],
    off_target: Iterable[Batch],
    score: Score,
    goal: float,
    *,
    sites: Sequence[str] | None = None,
    most: int = 16,
) -> Responsible:
    """A small set of components without which a score on some inputs falls to a goal, at little damage on others.

    Candidates are the components in use on the on-target inputs. Every step takes out the one that lowers `shortfall +
    damage` most, where the shortfall is the share of the way to the goal that is left, and damage is the off-target
    divergence as a share of that of ablating every site; it ends at the goal, or where no component lowers the sum.
    Then members that are not needed for it are put back. Every set is measured by running the model without it.

    Args:
        decomposition: Components with gates.
        on_target: Inputs that show the behaviour.
        off_target: Inputs on which nothing should change.
        score: `score(output)` gives one number per input (or position) that shall fall, such as a class's probability.
        goal: What its mean over the on-target inputs shall fall to.
        sites: Module paths to choose components from; None takes all sites.
        most: Largest number of members.

    Returns:
        The members with the figures on the given inputs; `edit_report` has those on others.

    Raises:
        ValueError: For bad batches, unknown sites or none, a score without one finite number per input or one that is
            at the goal, and for a goal or number of members that cannot be.

    Source:
        Ours; a step measures only candidates whose last known gain could win, as in Minoux's accelerated greedy (1978),
        which is exact where gains never grow and a shortcut here.
    """
    if isinstance(sites, str) or sites is not None and not sites:
        raise ValueError(f"sites must be a list of module paths, or None for all, got {sites!r}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    return _Search(decomposition, on_target, off_target, score, goal).found(sites, most)


class _Search:
    """The target without sets of components, each measured once."""

    def __init__(
        self, decomposition: "Decomposition", on: Iterable[Batch], off: Iterable[Batch], score: Score, goal: float
    ) -> None:
        if not math.isfinite(goal):
            raise ValueError(f"goal must be finite, got {goal}")
        self.own, self.score, self.goal = decomposition, score, goal
        self.on, self.off = decomposition.read(on), decomposition.read(off)
        self.matrices = {site.path: site.matrix() for site in decomposition.sites}
        target, metric = decomposition.target, decomposition.divergence
        with torch.no_grad():
            self.outputs = [call(target, batch) for batch in self.off]
            empty = [without(target, batch, decomposition.sites) for batch in self.off]
        self.nothing = _mean([metric(x, y) for x, y in zip(empty, self.outputs, strict=True)])
        self.measured: dict[frozenset[Member], tuple[float, float]] = {}
        self.before = self.figures(frozenset())[0]
        if not self.nothing > 0:
            raise ValueError("ablating every site changes nothing on off_target; pass inputs that the weights act on")
        if self.before <= goal:
            raise ValueError(f"the score on on_target is {self.before:.4g} already, at most the goal {goal:g}")

    @torch.no_grad()
    def figures(self, members: frozenset[Member]) -> tuple[float, float]:
        """Mean score on the on-target inputs and mean divergence on the others, without the members."""
        if members not in self.measured:
            paths = {path for path, _ in members}
            edited = {path: self._matrix(path, members) for path in paths}
            chosen = [site for site in self.own.sites if site.path in paths]
            with replaced(chosen, lambda site, _, operands: _rows(site, operands, edited[site.path])):
                on = [self.score(call(self.own.target, batch)) for batch in self.on]
                off = [call(self.own.target, batch) for batch in self.off]
            for scores, batch in zip(on, self.on, strict=True):
                _check_scores(scores, batch)
            metric = self.own.divergence
            damage = _mean([metric(x, y) for x, y in zip(off, self.outputs, strict=True)])
            self.measured[members] = (_mean(on), damage)
        return self.measured[members]

    def _matrix(self, path: str, members: frozenset[Member]) -> Tensor:
        pieces = self.own.parts[path].pieces
        out = torch.tensor([index for place, index in sorted(members) if place == path], device=pieces.owner.device)
        taken = torch.isin(pieces.owner, out)
        return self.matrices[path] - pieces.u[taken].T @ pieces.v[taken]

    def loss(self, members: frozenset[Member]) -> float:
        """Shortfall and damage."""
        score, off = self.figures(members)
        return max(score - self.goal, 0) / (self.before - self.goal) + off / self.nothing

    def candidates(self, sites: Sequence[str] | None) -> list[Member]:
        """Components of these sites that are in use on some on-target input."""
        paths = [self.own.site(path).path for path in sites] if sites is not None else list(self.own.parts)
        used: dict[str, Tensor] = {}
        for batch in self.on:
            found = self.own.gates_on(recorded(self.own.target, batch, self.own.sites))
            for path in paths:
                on = torch.stack([call.reshape(-1, call.shape[-1]).amax(0) > 0 for call in found[path]]).any(0)
                used[path] = used[path] | on if path in used else on
        return [(path, index) for path in paths for index in torch.nonzero(used[path]).flatten().tolist()]

    def found(self, sites: Sequence[str] | None, most: int) -> Responsible:
        """The greedy set, then without the members that it does not need."""
        members = list[Member]()
        falls = {one: self.loss(frozenset()) - self.loss(frozenset([one])) for one in self.candidates(sites)}
        while falls and len(members) < most and self.figures(frozenset(members))[0] > self.goal:
            best = self._best(members, falls)
            if falls.pop(best) <= 0:
                break
            members.append(best)
        members = self._needed(members)
        after, off = self.figures(frozenset(members))
        return Responsible(tuple(members), self.before, after, self.goal, off, len(self.measured))

    def _best(self, members: list[Member], falls: dict[Member, float]) -> Member:
        """The candidate that lowers the loss most, measuring only those whose last known fall could win."""
        fresh = set[Member]()
        while (best := max(falls, key=falls.__getitem__)) not in fresh:
            falls[best] = self.loss(frozenset(members)) - self.loss(frozenset([*members, best]))
            fresh.add(best)
        return best

    def _needed(self, members: list[Member]) -> list[Member]:
        """Put back, one by one, the member whose return lowers the loss most."""
        while members:
            fewer = min(([one for one in members if one != out] for out in members), key=self._loss_of)
            if self._loss_of(fewer) > self._loss_of(members):
                break
            members = fewer
        return members

    def _loss_of(self, members: list[Member]) -> float:
        return self.loss(frozenset(members))


def _rows(site: Site, operands: Operands, matrix: Tensor) -> Tensor:
    return site.write(site.read(operands, matrix), operands)


def _check_scores(scores: Any, batch: Batch) -> None:
    if not isinstance(scores, Tensor) or scores.ndim == 0 or len(scores) != size(batch):
        came = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"score must return a tensor with one number per input ({size(batch)} here), got {came}")
    if not torch.isfinite(scores).all():
        raise ValueError("score returned NaN or infinity on on_target")


def _mean(parts: Sequence[Tensor]) -> float:
    return float(torch.cat([part.double().flatten() for part in parts]).mean())
