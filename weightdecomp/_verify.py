"""Verification: a fresh adversary, sizes, bits, nulls and a certified bound for a finished decomposition.

1. Take the first inputs, in parts that fit into memory; record the target and the gates on them.
2. Measure the regimes: everything ablated, unmasked, stochastic, gates as masks.
3. Attack with sources shared across all inputs, then with sources for every input; read both ladders.
4. Score nulls at the same number active under the same attack; bound the damage where the model is small enough.
5. Say no if the plateau of the shared attack exceeds the tolerance.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from weightdecomp._attack import Ablation, Part
from weightdecomp._batches import Batch, joined, select, size, split, tensors
from weightdecomp._certified import certified
from weightdecomp._divergence import Divergence, output_tensor
from weightdecomp._forward import Masks, Record, recorded
from weightdecomp._nulls import STEPS, nulls
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

_NUMBERS = 1 << 23  # activations of one part and all its restarts held at a time
_N_NULLS = 4

OnProgress = Callable[[int, int], None]


class Subject(Protocol):
    """What is verified: a `Decomposition`, or anything with these parts of one."""

    @property
    def target(self) -> nn.Module: ...  # noqa: D102
    @property
    def sites(self) -> Sequence[Site]: ...  # noqa: D102
    @property
    def divergence(self) -> Divergence: ...  # noqa: D102
    @property
    def tolerance(self) -> float: ...  # noqa: D102
    def ablation(self) -> Ablation: ...  # noqa: D102
    def gates_on(self, record: Record) -> Masks: ...  # noqa: D102
    def read(self, batches: Iterable[Batch]) -> list[Batch]: ...  # noqa: D102


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
        inputs: Number of inputs.
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
    trial, records = _trial(decomposition, batches, inputs, restarts)
    rng = torch.Generator(device=tensors(trial.parts[0].batch)[0].device).manual_seed(seed)
    budgets = sorted({rung for rung in RUNGS if rung < steps} | {steps})
    compared = min(STEPS, steps)
    progress = _Progress(on_progress, [steps, steps * len(records)] + [compared] * (_N_NULLS * nulls))
    random = stochastic(trial, rng)
    shared = ladder(trial, budgets, restarts, False, rng, progress.step)
    progress.phase()
    per_input = ladder(trial, budgets, restarts, True, rng, progress.step)
    progress.phase()
    bits = ledger(trial, decomposition.tolerance, random.divergence)
    sizes = _sizes(trial)
    at = max(budget for budget in budgets if budget <= compared)
    ours = Candidate(
        name="this decomposition",
        active=sum(one.active for one in sizes),
        ledger=bits,
        stochastic=random,
        gates=rounded(trial),
        adversarial=shared.at(at),
    )
    others, dense = _nulls(trial, records, decomposition.tolerance, (at, restarts), seed, nulls, progress)
    certificate = certified(trial) if bound else (None, "not asked for (bound=False)")
    progress.end()
    n_inputs = sum(size(part.batch) for part in trial.parts)
    converged, reason = _verdict(shared, decomposition.tolerance, n_inputs)
    return Verification(
        n_inputs=n_inputs,
        divergence=decomposition.divergence.name,
        tolerance=decomposition.tolerance,
        unmasked=unmasked(trial),
        stochastic=random,
        gates=rounded(trial),
        ablated=Figure(1.0, trial.nothing, "exact", "1 pass", "the unit of damage"),
        shared=shared,
        per_input=per_input,
        bound=certificate[0],
        bound_reason=certificate[1],
        sites=sizes,
        ledger=bits,
        ours=ours,
        nulls=others,
        dense=dense,
        converged=converged,
        reason=reason,
        seed=seed,
    )
