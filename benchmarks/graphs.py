"""What do circuit graphs cost, do their edges agree with interventions, and which method's graph is simplest?

1. Parts: `graph_sizes`, `graph_agreement`, and `graph_methods` on four trained models.
2. Each runs in a process of its own: CPU seconds and peak memory are its own, and a crash ends one part only.
3. After each, the results file is written anew with that part in it and all others as they were. A part that was
   measured at this very commit is kept, so that a run that was cut off goes on where it was.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import graph_agreement, graph_methods, graph_sizes
from benchmarks.report import RESULTS, peak_bytes, provenance, table, write, write_json
from benchmarks.targets import one_thread

Results = dict[str, dict[str, Any]]  # a record a part
_RECORD = {"figures", "seeds", "cpu_seconds", "peak_bytes", "provenance"}


class Kind(NamedTuple):
    """One part of the benchmark, and how its figures are shown."""

    title: str
    measure: Callable[[Sequence[int], bool], dict[str, Any]]
    table: Callable[[Mapping[str, Any]], str]
    legend: str


PARTS: dict[str, Kind] = {
    "sizes": Kind("Sizes", graph_sizes.sizes, graph_sizes.sizes_table, graph_sizes.LEGEND),
    "agreement": Kind("Agreement", graph_agreement.agreements, graph_agreement.agreement_table, graph_agreement.LEGEND),
    **{
        name: Kind(f"Methods on {name}", partial(graph_methods.measured, name), graph_methods.methods_table, "")
        for name in graph_methods.CASES
    },
}


def measured(part: str, smoke: bool, n_seeds: int = 3) -> dict[str, Any]:
    """One part's record: its figures, what they cost, and where and how they were measured."""
    seeds, where, start = list(range(1 if smoke else n_seeds)), provenance(), time.process_time()
    with one_thread():
        figures = PARTS[part].measure(seeds, smoke)
    spent = {"cpu_seconds": time.process_time() - start, "peak_bytes": peak_bytes()}
    return {"figures": figures, "seeds": seeds, **spent, "provenance": {**where, "threads": 1}}


def results(path: Path) -> Results:
    """The records that a results file holds; none where there is no file.

    Raises:
        ValueError: If the file is no such file; it is left as it is.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON ({error}); move it away to measure anew") from error
    for part, record in found.items() if isinstance(found, dict) else [("", found)]:
        if part not in PARTS or not isinstance(record, dict) or not record.keys() >= _RECORD:
            raise ValueError(f"'{path}' holds {part!r}, which is no record of this benchmark; move the file away")
    return found


def is_current(record: Mapping[str, Any] | None, here: Mapping[str, Any]) -> bool:
    """Whether a record was measured with the code that is here now."""
    if record is None or here["uncommitted_changes"] or not here["commit"]:
        return False
    there = record["provenance"]
    return there["commit"] == here["commit"] and not there["uncommitted_changes"]


def run(parts: Sequence[str], folder: Path, measure: Callable[[str], dict[str, Any]]) -> int:
    """Measure parts and add each to the results as it is done; returns how many failed."""
    path, failures = folder / "graphs.json", 0
    for part in parts:
        if is_current(results(path).get(part), provenance()):
            print(f"{part} was measured at this commit", file=sys.stderr)
            continue
        try:
            record = measure(part)
        except Exception as error:
            failures += 1
            print(f"{part} failed: {error!r}", file=sys.stderr)
            continue
        every = {**results(path), part: record}
        every = {name: every[name] for name in PARTS if name in every}
        write_json(path, every)
        write(folder / "graphs.md", markdown(every))
    return failures


def apart(part: str, n_seeds: int) -> dict[str, Any]:
    """One part, measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, part, False, n_seeds).result()


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of all records, each with what its figures are."""
    blocks = []
    for part, record in found.items():
        kind = PARTS[part]
        if not kind.legend and graph_methods.LEGEND not in blocks:
            blocks += ["## Methods", graph_methods.LEGEND]
        blocks += [
            f"## {kind.title}",
            kind.table(record["figures"]),
            " ".join([kind.legend, _measured(record)]).strip(),
        ]
    return "\n\n".join(blocks) + "\n"


_SHOWN = (
    *("build s", "prune s", "score s", "write .graphml s", "read .graphml s", "write .json s", "read .json s"),
    *("write .html s", "size .html MB"),
)


def summary(found: Mapping[str, Any]) -> list[str]:
    """The README's tables, of medians alone: times and sizes, and agreement of the default effects."""
    blocks = []
    if "sizes" in found:
        rows = [
            [size, *(f"{one[name]['median']:.2g}" for name in _SHOWN)]
            for size, one in found["sizes"]["figures"].items()
        ]
        blocks.append(table(["nodes / edges", *_SHOWN], rows))
    if "agreement" in found:
        rows = [
            [
                model,
                *(f"{one[f'gradient {name}']['median']:.3f}" for name in ("correlation", "mean error", "worst error")),
            ]
            for model, one in found["agreement"]["figures"].items()
        ]
        blocks.append(table(["model", "correlation", "mean error", "worst error"], rows))
    return blocks


def _measured(record: Mapping[str, Any]) -> str:
    """Seeds, cost, machine and commit of one part."""
    where, seeds = record["provenance"], record["seeds"]
    runs = f"Medians over seeds {seeds}, ranges in brackets" if len(seeds) > 1 else f"Seed {seeds[0]} alone"
    cost = f"{record['cpu_seconds']:,.0f} CPU-seconds and at most {record['peak_bytes'] / 1e6:,.0f} MB in all"
    machine = f"{where['machine']}, torch {where['torch']}, {where['date'][:10]}, commit {where['commit'][:9]}"
    return f"{runs}; {cost}. {machine}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.graphs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny targets, in seconds; prints, and writes nothing")
    parser.add_argument("--only", choices=list(PARTS), help="run this part alone; the others' results stay")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default 3)")
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {given.seeds}")
    parts = [given.only] if given.only else list(PARTS)
    if given.smoke:
        print(markdown({part: measured(part, smoke=True) for part in parts}))
        return 0
    try:
        failures = run(parts, RESULTS, lambda part: apart(part, given.seeds))
    except ValueError as error:
        parser.error(str(error))
    found = results(RESULTS / "graphs.json")
    print("\n\n".join([markdown(found), "For the README:", *summary(found)]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
