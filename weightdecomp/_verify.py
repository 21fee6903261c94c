"""Verification: a fresh adversary, sizes, bits, nulls and a certified bound for a finished decomposition.

1. Take the first inputs, in parts that fit into memory; record the target and the gates on them.
2. Measure the regimes: everything ablated, unmasked, stochastic, gates as masks.
3. Attack with sources shared across all inputs, then with sources for every input; read both ladders.
4. Score nulls at the same number active under the same attack; bound the damage of a small model.
5. Say no if the plateau of the shared attack exceeds the tolerance.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from weightdecomp._attack import Ablation, Part
from weightdecomp._batches import Batch, joined, select, size, split, tensors
from weightdecomp._certified import certified
from weightdecomp._check import check_seed
from weightdecomp._divergence import Divergence, output_tensor
from weightdecomp._forward import Masks, Record, recorded
from weightdecomp._nulls import NAMES, STEPS, Place, dense, null, places
from weightdecomp._regimes import (
    RUNGS,
    Figure,
    Ladder,
    Trial,
    all_at,
    frequencies,
    ladder,
    ledger,
    mean_divergence,
    rounded,
    stochastic,
    unmasked,
)
from weightdecomp._sites import Site
from weightdecomp._verification import Candidate, SiteSize, Verification

__all__ = ["Verification", "verification"]

_OTHERS = 1024  # inputs at most that nulls are made from, or as many as are scored
_NUMBERS = 1 << 23  # activations of one part and all its restarts held at a time

OnProgress = Callable[[int, int], None]


@runtime_checkable
class Subject(Protocol):
    """What is verified: a `Decomposition`, or anything with these parts of one."""

    @property
    def target(self) -> nn.Module: ...
    @property
    def sites(self) -> Sequence[Site]: ...
    @property
    def divergence(self) -> Divergence: ...
    @property
    def tolerance(self) -> float: ...
    def ablation(self) -> Ablation: ...
    def gates_on(self, record: Record) -> Masks: ...
    def read(self, batches: Iterable[Batch]) -> list[Batch]: ...


def verification(
    decomposition: Subject,
    batches: Iterable[Batch],
    *,
    steps: int = 1280,
    restarts: int = 3,
    inputs: int = 1024,
    nulls: bool = True,
    bound: bool = True,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Measure what a decomposition does under ablation, by regime and attack budget.

    Args:
        decomposition: The result of a run.
        batches: Inputs, best ones that the run has not seen; the first `inputs` of them are used.
        steps: Largest attack budget; the ladder doubles from 20 up to it.
        restarts: Searches run side by side at every step.
        inputs: Number of inputs that are scored. If as many follow them, nulls are made from those that follow, as ours
            was made from others; else from the scored ones, on which they are then at their best.
        nulls: Score what cannot be right beside it; attacked with at most 160 steps.
        bound: Try for a certified upper bound.
        seed: Of sources, attacks and nulls.
        on_progress: Called with the attack steps done and the most there can be; attacks may end early.

    Returns:
        Every figure with its kind of evidence and its budget.

    Raises:
        ValueError: For bad batches or settings, or inputs on which ablating everything changes nothing.
    """
    for name, value in (("steps", steps), ("restarts", restarts), ("inputs", inputs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_seed(seed)
    read = decomposition.read(batches)
    trial = _trial(decomposition, read, inputs, restarts)
    tolerance, n_inputs = decomposition.tolerance, sum(size(part.batch) for part in trial.parts)
    budgets = sorted({rung for rung in RUNGS if rung < steps} | {steps})
    at = max([rung for rung in budgets if rung <= STEPS], default=steps)
    progress = _Progress(on_progress, [steps, steps * len(trial.parts)] + [at] * len(NAMES) * nulls)
    rng = _generator(trial, seed)
    random, gates = stochastic(trial, rng), rounded(trial)
    shared = ladder(trial, budgets, restarts, False, rng, progress.step)
    progress.phase()
    per_input = ladder(trial, budgets, restarts, True, rng, progress.step)
    progress.phase()
    sizes, bits = _sizes(trial), ledger(trial, tolerance, random.divergence)
    active = sum(one.active for one in sizes)
    where = places(trial, _others(read, inputs, size(trial.parts[0].batch)))
    others = _nulls(trial, where, tolerance, (at, restarts), seed, progress) if nulls else ()
    certificate, no_bound = certified(trial) if bound else (None, "not asked for (bound=False)")
    progress.end()
    converged, reason = _verdict(shared, tolerance, n_inputs)
    return Verification(
        n_inputs=n_inputs,
        divergence=decomposition.divergence.name,
        tolerance=tolerance,
        unmasked=unmasked(trial),
        stochastic=random,
        gates=gates,
        ablated=Figure(1.0, trial.nothing, "exact", "1 pass", "the unit of damage"),
        shared=shared,
        per_input=per_input,
        bound=certificate,
        bound_reason=no_bound,
        sites=sizes,
        ledger=bits,
        ours=Candidate("this decomposition", active, bits, random, gates, shared.at(at)),
        nulls=others,
        dense=dense(trial, where, tolerance),
        converged=converged,
        reason=reason,
        seed=seed,
    )


class _Progress:
    """Counts attack steps over phases that may end early."""

    def __init__(self, report: OnProgress | None, phases: Sequence[int]) -> None:
        self.report, self.phases = report, list(phases)
        self.done, self.before, self.total = 0, 0, sum(phases)

    def step(self) -> None:
        """One attack step."""
        self._at(self.done + 1)

    def phase(self) -> None:
        """The end of a phase, whether it took all its steps or not."""
        self.before += self.phases.pop(0)
        self._at(self.before)

    def end(self) -> None:
        """The end of all phases."""
        self._at(self.total)

    def _at(self, done: int) -> None:
        ceiling = self.before + self.phases[0] if self.phases else self.total
        self.done = min(done, ceiling)
        if self.report:
            self.report(self.done, self.total)


def _generator(trial: Trial, seed: int) -> torch.Generator:
    return torch.Generator(device=tensors(trial.parts[0].batch)[0].device).manual_seed(seed)


def _trial(decomposition: Subject, batches: Sequence[Batch], inputs: int, restarts: int) -> Trial:
    """The first inputs with the target's outputs and the importances, in parts that fit into memory."""
    ablation = decomposition.ablation()
    chosen = _first(batches, inputs)
    most = max(1, _NUMBERS // (restarts * _numbers_per_input(ablation, chosen[0])))
    parts = []
    for batch in split(joined(chosen), most):
        record = recorded(ablation.model, batch, ablation.sites)
        with torch.no_grad():
            parts.append(Part(batch, record.output, decomposition.gates_on(record)))
    nothing = mean_divergence(Trial(ablation, parts, 1.0), all_at(0.0))
    if not 0 < nothing < torch.inf:
        why = "does not change the output" if nothing == 0 else f"gives a divergence of {nothing}"
        raise ValueError(
            f"ablating every component {why} on the given batches, so that damage has no unit; "
            "pass inputs on which the decomposed weights matter"
        )
    return Trial(ablation, parts, nothing)


def _first(batches: Sequence[Batch], inputs: int, start: int = 0) -> list[Batch]:
    """So many inputs from a start on, in order."""
    kept, seen = [], 0
    for batch in batches:
        low, high = (min(max(at - seen, 0), size(batch)) for at in (start, start + inputs))
        if low < high:
            whole = high - low == size(batch)
            kept.append(batch if whole else select(batch, torch.arange(low, high, device=tensors(batch)[0].device)))
        seen += size(batch)
    return kept


def _others(batches: Sequence[Batch], inputs: int, at_once: int) -> list[Batch]:
    """Inputs after the first ones, to make nulls from; none where there are fewer than of those."""
    found = _first(batches, max(inputs, _OTHERS), inputs)
    if sum(size(batch) for batch in found) < inputs:
        return []
    return split(joined(found), at_once)


def _numbers_per_input(ablation: Ablation, batch: Batch) -> int:
    """Activations and masks of one input in a masked pass, and its outputs."""
    one = select(batch, torch.arange(1, device=tensors(batch)[0].device))
    record = recorded(ablation.model, one, ablation.sites)
    total = output_tensor(record.output).numel() if ablation.divergence.name in ("mse", "kl") else 0
    for site in ablation.sites:
        own = ablation.pieces[site.path]
        for operands in record.operands[site.path]:
            rows = site.read(operands, own.v[:1]).numel()
            total += rows * (sum(site.shape) + len(own.owner) + own.n)
    return max(total, 1)


def _sizes(trial: Trial) -> tuple[SiteSize, ...]:
    found = []
    by_site = frequencies(trial)
    for site in trial.ablation.sites:
        own, frequency, matrix = trial.ablation.pieces[site.path], by_site[site.path][0], site.matrix()
        share = float((matrix - own.total()).square().sum() / matrix.square().sum())
        live, active = int((frequency > 0).sum()), float(frequency.sum())
        found.append(SiteSize(site.path, site.shape, own.n, live, active, share))
    return tuple(found)


def _nulls(
    trial: Trial,
    where: Sequence[Place],
    tolerance: float,
    budget: tuple[int, int],
    seed: int,
    progress: _Progress,
) -> tuple[Candidate, ...]:
    """All nulls, each with draws of its own, so that leaving one out changes no other."""
    found = []
    for name in NAMES:
        rng = _generator(trial, seed)
        found.append(null(name, trial, where, tolerance, budget, rng, progress.step))
        progress.phase()
    return tuple(found)


def _verdict(shared: Ladder, tolerance: float, n_inputs: int) -> tuple[bool, str]:
    """Whether the attack stayed within the tolerance, and both numbers with the budget."""
    converged = shared.plateau <= tolerance
    relation = "is within" if converged else "exceeds"
    return converged, (
        f"adversarial damage {shared.plateau:.4g} {relation} the tolerance {tolerance:g} "
        f"({shared.budget}; sources shared across {n_inputs:,} inputs)"
    )
