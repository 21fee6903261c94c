"""The result of a comparison: every method at every setting in the same bits, as a table, a plot and plain values."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from weightdecomp._ledger import Ledger
from weightdecomp._verification import _plain, _table

PROTOCOLS = ("matched", "clean", "propagating", "adversarial")


@dataclass(frozen=True)
class Point:
    """One method at one setting with one seed.

    Attributes:
        method: Its name.
        setting: Its settings in words.
        seed: Of its fit.
        ledger: Bits of the scored inputs, the residual under the propagating protocol.
        matched: Damage with one site replaced at a time, the mean over sites.
        clean: Damage with all sites replaced at once, their codes read from the target's own run.
        propagating: The same, their codes read from what the replaced model computes.
        adversarial: Damage under attack: the worst case is at least this.
        active: L0: mean number of active units per row, summed over banks.
        live: Units that are active on some row.
        units: Units in all.
        parameters: Numbers fitted or trained.
        cpu_seconds: Of the fit; None of components that were given.
        peak_bytes: Memory of the fit beyond what was there before; None where the system does not tell.
        loss_recovered: Share of the cross-entropy lost by ablating everything that is recovered with all sites
            replaced; None without labels.
        effects_matched: Mean over known mechanisms of how much of what deleting one does is reproduced by taking out
            one group of units; None where no mechanism is known.
        splitting: Mean number of units in these groups, over the mechanisms that were found; None where none was.
    """

    method: str
    setting: str
    seed: int
    ledger: Ledger
    matched: float
    clean: float
    propagating: float
    adversarial: float
    active: float
    live: int
    units: int
    parameters: int
    cpu_seconds: float | None
    peak_bytes: int | None
    loss_recovered: float | None = None
    effects_matched: float | None = None
    splitting: float | None = None

    @property
    def recovered(self) -> float:
        """Share of the divergence of ablating everything that is recovered: KL recovered where outputs are logits."""
        return 1 - self.propagating

    @property
    def bits(self) -> float:
        """Bits per input for names and values; what is left of the output is the damage."""
        return (self.ledger.naming + self.ledger.values) / self.ledger.n_inputs


@dataclass(frozen=True)
class Row:
    """One method in the table: its best setting over all seeds, or why it is not there.

    Attributes:
        method: Its name.
        points: One a seed at the best setting; empty if the method does not apply.
        reason: Why it does not apply, or to which sites or at which settings it does not.
        within: Whether the best setting's propagating damage is within the tolerance.
        agreement: Mean matched cosine of the units of two seeds; None with one seed.
    """

    method: str
    points: tuple[Point, ...] = ()
    reason: str = ""
    within: bool = False
    agreement: float | None = None

    def median(self, figure: Callable[[Point], float]) -> float:
        """A figure's median over seeds."""
        return float(statistics.median(figure(point) for point in self.points))

    def spread(self, figure: Callable[[Point], float | None], form: str) -> str:
        """A figure's median, with its range where seeds differ; a dash where no seed has it."""
        values = [value for point in self.points if (value := figure(point)) is not None]
        if not values:
            return "-"
        middle = f"{statistics.median(values):{form}}"
        low, high = f"{min(values):{form}}", f"{max(values):{form}}"
        return middle if low == high else f"{middle} ({low}-{high})"


@dataclass(frozen=True)
class Comparison:
    """Every method on the same inputs, in the same bits.

    Attributes:
        rows: One a method, at its best setting: the fewest bits within the tolerance, else the least damage.
        points: Every setting and seed that was tried.
        tolerance: Damage at which settings are chosen, and the relative precision that values are priced at.
        divergence: How outputs are compared.
        n_inputs: Inputs scored on, which no baseline was fitted on.
        n_fitted: Inputs that baselines were fitted on.
        nothing: Divergence of ablating everything: damage 1.
        budget: Attack steps and restarts.
        seeds: Seeds of every baseline.
    """

    rows: tuple[Row, ...]
    points: tuple[Point, ...] = field(repr=False)
    tolerance: float
    divergence: str
    n_inputs: int
    n_fitted: int
    nothing: float
    budget: str
    seeds: int

    def row(self, method: str) -> Row:
        """One method's row.

        Raises:
            ValueError: If it was not compared.
        """
        for row in self.rows:
            if row.method == method:
                return row
        raise ValueError(f"{method!r} was not compared; methods are {[row.method for row in self.rows]}")

    def splitting(self, method: str) -> list[tuple[int, float]]:
        """How a method's units split as its capacity grows: units in all, and units per mechanism that was found.

        One pair a setting, in the order of capacity, medians over seeds; settings that found nothing are left out.

        Raises:
            ValueError: If the method was not compared, or no mechanism is known.
        """
        self.row(method)
        mine = [point for point in self.points if point.method == method]
        if all(point.effects_matched is None for point in mine):
            raise ValueError("no mechanism is known, so that units cannot be counted per mechanism; pass truth=")
        found: dict[str, list[Point]] = {}
        for point in mine:
            if point.splitting is not None:
                found.setdefault(point.setting, []).append(point)
        rows = [Row(method, tuple(points)) for points in found.values()]
        return sorted((round(row.median(lambda p: p.units)), row.median(lambda p: p.splitting or 0)) for row in rows)

    def __str__(self) -> str:
        """The table."""
        unit = {"mse": "squared output units", "kl": "nats"}.get(self.divergence, "its own units")
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds, median (range)"
        head = (
            f"Comparison on {self.n_inputs:,} inputs (fitted on {self.n_fitted:,} others), {seeds}; "
            f"damage 1 = {self.nothing:.4g} {unit} ({self.divergence})\n"
            f"best setting a method: fewest bits at propagating damage <= {self.tolerance:g}, else (*) least damage"
        )
        notes = [f"{row.method}: {row.reason}" for row in self.rows if row.points and row.reason]
        foot = (
            "bits: names and values per input; stored: bits of the units' numbers, paid once; total: both and the "
            f"residual, over all inputs; adversarial: worst found, {self.budget}; params: numbers fitted or trained"
        )
        foot += "".join(f"; {head}: {meaning}" for head, (_, meaning) in _extra(self.rows).items())
        return "\n".join([head, "", _table(_cells(self.rows), texts=(0, 1, 14)), "", foot, *notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become text."""
        return _plain(asdict(self))

    def figure(self) -> Any:
        """Bits per input against damage, a panel a protocol, as a matplotlib Figure.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from weightdecomp import _figures

        return _figures.comparison(self)


_EXTRA: dict[str, tuple[Callable[[Row], str], str]] = {
    "agree": (
        lambda row: "-" if row.agreement is None else f"{row.agreement:.2f}",
        "one-to-one cosine of two seeds' units",
    ),
    "CE": (
        lambda row: row.spread(lambda p: p.loss_recovered, ".3f"),
        "share of the cross-entropy recovered, all sites replaced",
    ),
    "effects": (
        lambda row: row.spread(lambda p: p.effects_matched, ".3f"),
        "share of the known mechanisms' effects that groups of units reproduce",
    ),
    "split": (lambda row: row.spread(lambda p: p.splitting, ".1f"), "units in such a group"),
}


def _extra(rows: Sequence[Row]) -> dict[str, tuple[Callable[[Row], str], str]]:
    """Columns that only some comparisons have."""
    return {head: column for head, column in _EXTRA.items() if any(column[0](row) != "-" for row in rows)}


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells."""
    extra = _extra(rows)
    heads = ["method", "setting", "bits", "stored", "total", *PROTOCOLS, "L0", "live", "params", "CPU-s", "MiB", ""]
    return [[*heads, *extra], *[[*_line(row), *[text(row) for text, _ in extra.values()]] for row in rows]]


def _line(row: Row) -> list[str]:
    if not row.points:
        return [row.method, "-", *["-"] * 12, f"does not apply: {row.reason}"]
    first = row.points[0]
    peaks = [point.peak_bytes for point in row.points if point.peak_bytes is not None]
    return [
        row.method + ("" if row.within else " *"),
        first.setting,
        row.spread(lambda p: p.bits, ",.1f"),
        row.spread(lambda p: p.ledger.dictionary, ",.0f"),
        row.spread(lambda p: p.ledger.total, ",.0f"),
        *[row.spread(lambda p, name=name: getattr(p, name), ".3f") for name in PROTOCOLS],
        row.spread(lambda p: p.active, ".1f"),
        f"{row.median(lambda p: p.live):.0f}/{row.median(lambda p: p.units):.0f}",
        f"{row.median(lambda p: p.parameters):,.0f}",
        "-" if first.cpu_seconds is None else f"{row.median(lambda p: p.cpu_seconds or 0.0):.1f}",
        f"{max(peaks) / 2**20:.0f}" if peaks else "-",
        "see below" if row.reason else "",
    ]
