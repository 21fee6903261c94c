"""Tables of the image classifiers' records."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.report import spread, table

_DECISIONS = "data, decisions"


def image_tables(name: str, found: dict[str, Any], kept: Sequence[int]) -> str:
    """All tables of one data set's record.

    Args:
        name: Of the data set.
        found: The record, by setting.
        kept: Numbers of components that its curves are for.
    """
    parts = (_bars(found, kept), _by_kept(found, kept), _shared(found), _vectors(found), _masks(found))
    return "\n\n".join(f"{name}: {title}\n\n{text}" for title, text in parts)


def _runs(found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every setting's runs, one a seed."""
    return ((setting, record["runs"]) for setting, record in found.items() if "runs" in record)


def _ranges(values: Sequence[float]) -> str:
    """Median and, of several, the extremes; in percent or points."""
    low, middle, high = (f"{100 * one:.2f}" for one in (min(values), spread(values).median, max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def _median(values: Sequence[float], digits: int = 2) -> str:
    return f"{spread(values).median:.{digits}f}"


def _bars(found: dict[str, Any], kept: Sequence[int]) -> tuple[str, str]:
    rows = [["to reach", "", "<= 0.10", "", ">= 95", "<= 0.20"]]
    for setting, runs in _runs(found):
        lost = [run["accuracy"] - run["accuracy_by_kept"][_DECISIONS][kept.index(10)] for run in runs]
        row = [setting, _ranges([run["accuracy"] for run in runs]), _ranges(lost)]
        row.append(_ranges([run["changed_at_10"] for run in runs]))
        row.append(_ranges([run["certified"][_DECISIONS]["30"] for run in runs]))
        shared = [run["shared"]["data 64"]["accuracy_lost"] for run in runs if "data 64" in run.get("shared", {})]
        rows.append([*row, _ranges(shared) if shared else ""])
    head = ("regularisation", "accuracy %", "lost at k = 10", "changed at k = 10 %", "certified at k = 30 %")
    title = "components for decisions, and squares that classes share; median of seeds (and range)"
    return title, table([*head, "64 shared squares lost"], rows)


def _by_kept(found: dict[str, Any], kept: Sequence[int]) -> tuple[str, str]:
    rows = []
    for setting, runs in _runs(found):
        for metric in runs[0]["accuracy_by_kept"]:
            columns = zip(*(run["accuracy_by_kept"][metric] for run in runs), strict=True)
            certified = _certified(runs, metric) if metric in runs[0]["certified"] else ""
            rows.append([f"{setting}, {metric}", certified, *(_lost(runs, column) for column in columns)])
    head = ["regularisation, metric", "certified % at 15/30", *(f"-{k}" for k in kept[: len(rows[0]) - 2])]
    return "accuracy lost (percentage points, median of seeds) by components kept per class", table(head, rows)


def _certified(runs: Sequence[dict[str, Any]], metric: str) -> str:
    shares = ([run["certified"][metric][k] for run in runs] for k in runs[0]["certified"][metric])
    return "/".join(_median([100 * share for share in one], 1) for one in shares)


def _lost(runs: Sequence[dict[str, Any]], kept: Sequence[float | None]) -> str:
    lost = [100 * (run["accuracy"] - one) for run, one in zip(runs, kept, strict=True) if one is not None]
    return _median(lost) if lost else ""


def _shared(found: dict[str, Any]) -> tuple[str, str]:
    rows = []
    for setting, runs in _runs(found):
        for kind, one in runs[0].get("shared", {}).items():
            cells = (100 * one["accuracy_lost"], one["relative_error"], one["agreement"], one["cancellation"])
            texts = ("-" if cell is None else f"{cell:.3f}" for cell in cells)
            rows.append([f"{setting}, {kind}", *texts, f"{one['cpu_seconds']:.1f}"])
    head = ("regularisation, metric, squares", "lost points", "relative error", "agreement", "cancellation", "CPU s")
    return "squares shared by all classes", table(head, rows)


def _vectors(found: dict[str, Any]) -> tuple[str, str]:
    """Spectra, pixels of the leading vectors, and what other seeds find."""
    rows = []
    for setting, runs in _runs(found):
        ranks = (_median([run["effective_rank"][metric] for run in runs], 1) for metric in ("input", "data"))
        pixels = _median([run["pixel_count"] for run in runs], 0)
        outliers = _median([100 * run["outlier_share"] for run in runs], 1)
        rows.append([setting, *ranks, pixels, outliers, _agreement(found[setting].get("seed_agreement"))])
    untrained = found["untrained_seed_agreement"]
    rows.append(["untrained", "", "", "", "", _agreement(untrained)])
    head = (
        "regularisation",
        "effective rank, input",
        "data",
        "pixels of top 5",
        "% on rare pixels",
        "seeds' top 5 agree",
    )
    return "spectra and leading vectors; |cosine| of the ordered positive ones between seeds", table(head, rows)


def _agreement(record: dict[str, Any] | None) -> str:
    return "" if record is None else " ".join(f"{one:.2f}" for one in record["top_positive"])


def _masks(found: dict[str, Any]) -> tuple[str, str]:
    rows = []
    for setting, runs in _runs(found):
        for one in runs[0].get("masks", ()):
            cells = (f"{100 * one[name]:.1f}" for name in ("mask", "random", "hit", "random_hit"))
            rows.append([f"{setting}, {one['vectors']}", f"{one['strength']:.1f}", *cells])
    head = ("regularisation, made of", "strength", "accuracy %", "permuted", "taken for the class %", "permuted")
    return "what adding a mask does, beside the same mask with its pixels permuted", table(head, rows)
