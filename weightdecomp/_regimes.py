"""Regimes: the damage that different choices of masks do on fixed inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._attack import (
    Ablation,
    Part,
    ablated_divergence,
    attacked,
    drawn_sources,
    entries,
    masks_from,
)
from weightdecomp._batches import size, tensors
from weightdecomp._forward import Masks
from weightdecomp._ledger import Ledger, price

ON = 0.1  # a component counts as active where its importance is above this
DRAWS = 8  # of random sources for every input
RUNGS = (20, 40, 80, 160, 320, 640, 1280)  # attack steps at which the ladder is read (V1)


@dataclass(frozen=True)
class Figure:
    """One damage and how it is known.

    Attributes:
        damage: Divergence as a share of that of ablating everything; 0 is unchanged, 1 all behaviour lost.
        divergence: The same in nats (kl) or squared output units (mse), averaged over inputs and positions.
        evidence: "exact" (for these inputs), "estimate" (sampled), "counterexample" (found by attack, so the
            worst case is at least this) or "bound" (certified, so the worst case is at most this).
        budget: What was spent to know it.
        note: How to read it.
        error: Standard error of an estimated damage, else None.
    """

    damage: float
    divergence: float
    evidence: str
    budget: str
    note: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Ladder:
    """Adversarial damage by attack budget; every rung is a counterexample: the worst case is at least this.

    Attributes:
        sources: "shared" (one set of sources for all inputs) or "per input".
        steps: Budget of each rung, in steps of every restart.
        damages: Worst damage found within each budget.
        divergences: The same in nats (kl) or squared output units (mse).
        restarts: Searches run side by side at every step.
        spent: Steps made. Fewer than the last budget where 160 steps had brought less than 0.1 %; rungs
            beyond it repeat the last figure.
    """

    sources: str
    steps: tuple[int, ...]
    damages: tuple[float, ...]
    divergences: tuple[float, ...]
    restarts: int
    spent: int

    @property
    def plateau(self) -> float:
        """Damage at the last rung."""
        return self.damages[-1]

    @property
    def rise(self) -> float:
        """The last rung as a multiple of the one before it: 1 on a plateau."""
        before = self.damages[max(len(self.damages) - 2, 0)]
        return self.plateau / before if before else 1.0

    @property
    def budget(self) -> str:
        """Steps and restarts in words."""
        early = f", at a plateau after {self.spent:,}" if self.spent < self.steps[-1] else ""
        return f"{self.steps[-1]:,} steps x {self.restarts} restarts{early}"

    def at(self, steps: int) -> Figure:
        """The rung of a budget."""
        rung = self.steps.index(steps)
        budget = f"{steps:,} steps x {self.restarts} restarts"
        return Figure(self.damages[rung], self.divergences[rung], "counterexample", budget, f"{self.sources} sources")


class Trial(NamedTuple):
    """Components with importances on fixed inputs, ready to be masked.

    Attributes:
        ablation: The masked model.
        parts: The inputs, in pieces that fit into memory, with the target's outputs and the importances.
        nothing: Mean divergence with everything ablated: what a damage of 1 is.
    """

    ablation: Ablation
    parts: Sequence[Part]
    nothing: float

    def figure(self, divergence: float, evidence: str, budget: str, note: str = "") -> Figure:
        """A divergence with its damage."""
        return Figure(divergence / self.nothing, divergence, evidence, budget, note)


@torch.no_grad()
def mean_divergence(trial: Trial, masks: Callable[[Part], tuple[Masks, dict[str, Tensor]]]) -> float:
    """Mean over all inputs and positions under the masks of components and remainders that `masks` gives."""
    total, n = 0.0, 0
    for part in trial.parts:
        own, remainder = masks(part)
        found = ablated_divergence(trial.ablation, part.batch, part.target, own, remainder)
        if found.ndim == 0 or len(found) != size(part.batch):
            raise ValueError(
                f"divergence returned the shape {tuple(found.shape)} for {size(part.batch)} inputs; "
                "it must return one number per input or position, inputs first"
            )
        total, n = total + float(found.double().sum()), n + found.numel()
    return total / n


def all_at(value: float) -> Callable[[Part], tuple[Masks, dict[str, Tensor]]]:
    """The same mask for all components, remainders off."""
    return lambda part: (
        {path: [torch.full_like(g, value) for g in calls] for path, calls in part.importances.items()},
        {},
    )


def unmasked(trial: Trial) -> Figure:
    """All components on, remainders off."""
    note = "what ablating the remainder alone does"
    return trial.figure(mean_divergence(trial, all_at(1.0)), "exact", "1 pass", note)


def rounded(trial: Trial) -> Figure:
    """The gates themselves as masks, remainders off."""
    found = mean_divergence(trial, lambda part: (part.importances, {}))
    return trial.figure(found, "exact", "1 pass", "monitor: every source at 0")


def stochastic(trial: Trial, rng: torch.Generator) -> Figure:
    """Uniform sources for every input, component and remainder on its own."""

    def drawn(part: Part) -> tuple[Masks, dict[str, Tensor]]:
        n = size(part.batch)
        group = torch.arange(n, device=tensors(part.batch)[0].device)
        return masks_from(part.importances, drawn_sources(trial.ablation, n, rng), group)

    found = torch.tensor([mean_divergence(trial, drawn) for _ in range(DRAWS)], dtype=torch.float64)
    error = float(found.std() / DRAWS**0.5) / trial.nothing
    mean = float(found.mean())
    return Figure(mean / trial.nothing, mean, "estimate", f"{DRAWS} draws per input", error=error)


def ladder(
    trial: Trial,
    budgets: Sequence[int],
    restarts: int,
    per_input: bool,
    rng: torch.Generator,
    on_step: Callable[[], None] | None = None,
) -> Ladder:
    """Attack the trial and read the damage at every budget."""
    found = attacked(trial.ablation, trial.parts, budgets, restarts, per_input, rng, on_step)
    worst = found.ladder.amax(1).double()
    return Ladder(
        sources="per input" if per_input else "shared",
        steps=tuple(budgets),
        damages=tuple((worst / trial.nothing).tolist()),
        divergences=tuple(worst.tolist()),
        restarts=restarts,
        spent=found.spent,
    )


def frequencies(trial: Trial) -> dict[str, tuple[Float[Tensor, " component"], int]]:
    """Per site, the share of rows (inputs, positions, calls) with each component active; the rows."""
    found = {}
    for site in trial.ablation.sites:
        calls = [g for part in trial.parts for g in part.importances[site.path]]
        rows = sum(g[..., 0].numel() for g in calls)
        counts = torch.stack([(g > ON).flatten(0, -2).sum(0).double() for g in calls]).sum(0)
        found[site.path] = (counts / rows, rows)
    return found


def ledger(trial: Trial, tolerance: float, divergence: float) -> Ledger:
    """Bits of these inputs: every site at its own number of rows, the residual where outputs are compared."""
    n = sum(entries(trial.ablation, part) for part in trial.parts)
    found = price(n, tolerance, [], [], [], divergence)
    by_site = frequencies(trial)
    for site in trial.ablation.sites:
        frequency, rows = by_site[site.path]
        ranks = trial.ablation.pieces[site.path].ranks()
        found = summed(found, price(rows, tolerance, [frequency], [ranks], [site.shape]))
    return found


def summed(one: Ledger, other: Ledger) -> Ledger:
    """Both costs together, on the inputs of the first."""
    parts = (getattr(one, name) + getattr(other, name) for name in ("naming", "values", "dictionary", "residual"))
    return Ledger(one.n_inputs, *parts)
