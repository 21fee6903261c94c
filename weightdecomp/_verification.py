"""The result of a verification: every figure with how it is known, as a table and as plain values."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from weightdecomp._ledger import Ledger
from weightdecomp._regimes import Figure, Ladder

_EVIDENCE = (
    "exact: for these inputs; estimate: sampled; counterexample: the worst case is at least this; bound: at most this"
)


@dataclass(frozen=True)
class SiteSize:
    """Size of one site's part of the decomposition on these inputs.

    Attributes:
        path: Module path.
        shape: (d_out, d_in).
        components: Number of components.
        live: Components that are active on some input.
        active: Mean number active per row (input or position).
        remainder: Share of ||W||^2 in the remainder.
    """

    path: str
    shape: tuple[int, int]
    components: int
    live: int
    active: float
    remainder: float


@dataclass(frozen=True)
class Candidate:
    """One way to cut the weights up, scored like any other.

    Attributes:
        name: This decomposition, or which null.
        active: Mean number active per row, summed over sites.
        ledger: Bits, the residual under stochastic sources; None where the null was skipped.
        stochastic: Damage under uniform sources.
        gates: Damage with the gates as masks.
        adversarial: Damage found by attack, sources shared across the inputs.
        reason: Why the null was skipped, or what to know about it.
    """

    name: str
    active: float = 0.0
    ledger: Ledger | None = None
    stochastic: Figure | None = None
    gates: Figure | None = None
    adversarial: Figure | None = None
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """What a decomposition does under ablation, on inputs of the caller's choice.

    Attributes:
        n_inputs: Inputs that every figure below is measured on.
        divergence: How outputs are compared.
        tolerance: Largest adversarial damage the decomposition was made for.
        unmasked: All components on, remainder off.
        stochastic: Uniform sources, remainder included.
        gates: The gates as masks, remainder off; a monitor, never the headline.
        ablated: Everything off; its divergence is the unit of damage.
        shared: Attack with one set of sources for all inputs, remainder included; decides `converged`.
        per_input: Attack with sources for every input on its own.
        bound: Certified upper bound over all masks, sources free for every input and position, or None.
        bound_reason: Why there is no bound; empty where there is one.
        sites: Sizes by site, in the model's order.
        ledger: Bits of these inputs by part, the residual under stochastic sources.
        ours: This decomposition in the terms that nulls are scored in, under the same attack.
        nulls: The same scores for what cannot be right, at the same mean number active per site.
        dense: Bits with every rank of every site always active: what a decomposition must beat to compress.
        converged: Whether the plateau of the shared attack is within the tolerance.
        reason: Both numbers and the attack budget, in words.
        seed: Of all random draws.
    """

    n_inputs: int
    divergence: str
    tolerance: float
    unmasked: Figure
    stochastic: Figure
    gates: Figure
    ablated: Figure
    shared: Ladder
    per_input: Ladder
    bound: Figure | None
    bound_reason: str
    sites: tuple[SiteSize, ...]
    ledger: Ledger
    ours: Candidate
    nulls: tuple[Candidate, ...]
    dense: Candidate
    converged: bool
    reason: str
    seed: int

    @property
    def damage(self) -> float:
        """Adversarial damage at the plateau, sources shared across the inputs."""
        return self.shared.plateau

    def __str__(self) -> str:
        """All figures as text tables."""
        unit = {"mse": "squared output units", "kl": "nats"}.get(self.divergence, "its own units")
        head = (
            f"Verification on {self.n_inputs:,} inputs, tolerance {self.tolerance:g}\n"
            f"damage 1 = everything ablated = {self.ablated.divergence:.4g} {unit} ({self.divergence})"
        )
        verdict = f"{'converged' if self.converged else 'NOT CONVERGED'}: {self.reason}"
        tables = (_regimes(self), _ladders(self), _sizes(self), str(self.ledger), _candidates(self), verdict)
        return "\n\n".join((head, *tables))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become text."""
        values = asdict(self)
        for name in ("shared", "per_input"):
            found: Ladder = getattr(self, name)
            values[name] |= {"plateau": found.plateau, "rise": found.rise, "evidence": "counterexample"}
        for name, one in (("ledger", self.ledger), ("ours", self.ours.ledger), ("dense", self.dense.ledger)):
            where = values[name] if name == "ledger" else values[name]["ledger"]
            where |= {"total": one.total} if one else {}
        return _plain(values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _table(rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """Columns padded to their widest cell: the given ones to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i in texts else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _regimes(result: Verification) -> str:
    figures = {
        "all on, remainder off": result.unmasked,
        "stochastic sources": result.stochastic,
        "gates as masks": result.gates,
        "everything ablated": result.ablated,
        "adversarial, shared": _summit(result.shared),
        "adversarial, per input": _summit(result.per_input),
        "all masks": result.bound,
    }
    rows = [["regime", "damage", "divergence", "evidence", "budget"]]
    for name, one in figures.items():
        if one is None:
            rows.append([name, "-", "-", "none", result.bound_reason])
            continue
        budget = one.budget if one.error is None else f"{one.budget}, +- {one.error:.1e}"
        rows.append([name, _number(one.damage), f"{one.divergence:.4g}", one.evidence, budget])
    return f"{_table(rows, texts=(0, 3, 4))}\n{_EVIDENCE}"


def _summit(found: Ladder) -> Figure:
    return Figure(found.plateau, found.divergences[-1], "counterexample", found.budget)


def _ladders(result: Verification) -> str:
    rows = [["attack steps", "shared", "per input"]]
    for i, steps in enumerate(result.shared.steps):
        rows.append([f"{steps:,}", _number(result.shared.damages[i]), _number(result.per_input.damages[i])])
    return _table(rows)


def _sizes(result: Verification) -> str:
    rows = [["site", "shape", "components", "live", "active", "remainder"]]
    for one in result.sites:
        shape = f"{one.shape[0]} x {one.shape[1]}"
        counts = [str(one.components), str(one.live), f"{one.active:.3f}", f"{one.remainder:.1e}"]
        rows.append([one.path or "(model)", shape, *counts])
    total = [sum(one.components for one in result.sites), sum(one.live for one in result.sites)]
    rows.append(["all", "", *map(str, total), f"{sum(one.active for one in result.sites):.3f}", ""])
    return _table(rows)


def _candidates(result: Verification) -> str:
    rows = [["candidate", "active", "bits per input", "bits in all", "stochastic", "gates", "adversarial", ""]]
    for one in (result.ours, *result.nulls, result.dense):
        if one.ledger is None:
            rows.append([one.name, *["-"] * 6, f"skipped: {one.reason}"])
            continue
        bits = [f"{one.ledger.per_input:,.2f}", f"{one.ledger.total:,.0f}"]
        damages = [_number(f.damage) if f else "-" for f in (one.stochastic, one.gates, one.adversarial)]
        rows.append([one.name, f"{one.active:.3f}", *bits, *damages, one.reason])
    attacked = result.ours.adversarial
    legend = f"\nadversarial: {attacked.budget}, shared sources, the same for all" if attacked else ""
    return _table(rows, texts=(0, 7)) + legend
