"""What the benchmarks write: where and on what they ran, medians with ranges, tables, and whole files."""

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
"""Where results go."""


class Spread(NamedTuple):
    """Several runs' figures.

    Attributes:
        median: The middle one.
        low: The smallest.
        high: The largest.
    """

    median: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """Median and range, each in a format such as ``.1f``."""
        return f"{self.median:{form}} ({self.low:{form}}-{self.high:{form}})"


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(statistics.median(values), min(values), max(values))


def provenance() -> dict[str, Any]:
    """Commit, versions, machine and date: what a figure depends on besides the code that names it."""
    changed = _git("status", "--porcelain", "--", "weightdecomp", "bilinear", "graphs", "benchmarks/*.py")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "scipy": version("scipy"),
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    """What git prints; empty outside a checkout."""
    try:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_bytes() -> int:
    """Largest resident memory of this process since `reset_peak` (its start where that does nothing)."""
    return _resident("VmHWM") or _peak_by_resource()


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not say."""
    return _resident("VmRSS")


def reset_peak() -> None:
    """Let `peak_bytes` count from now on (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident(name: str) -> int:
    # Not ru_maxrss: a child process inherits its parent's.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")]
    return found[0] if found else 0


def _peak_by_resource() -> int:
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all.

    Raises:
        ValueError: For numbers that are not finite.
    """
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table padded to be read as text; the first column to the left, the others to the right."""
    cells = [list(head), *[list(row) for row in rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        pairs = list(zip(row, widths, strict=True))
        padded = [pairs[0][0].ljust(widths[0]), *[cell.rjust(w) for cell, w in pairs[1:]]]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
