"""The trap suite: tasks with exact answers, our decomposition and all baselines, the known answer and a null.

`python -m benchmarks.traps [--smoke | --quick] [--task PATTERN] [--method PATTERN] [--shard i/n]`. A cell is one task,
method and seed. It is kept in `benchmarks/.cache/traps` under the hash of all that it depends on, the code included, so
that a run that was stopped goes on, shards share a folder, and nothing stale is shown. Cells are made side by side, one
a core. Records of other machines or commits are shown with `--join FILE`; every cell names its commit. Of a method's
grid the best setting is reported, chosen by the score itself: the baselines' most favourable reading. Ours has one
setting.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from tqdm import tqdm

import bilinear
import weightdecomp
from benchmarks import targets
from benchmarks.report import RESULTS, provenance, spread, table, write, write_json
from benchmarks.trap_page import page
from benchmarks.trap_run import ORACLE, OURS, RANDOM, Cell, Effort, scored
from benchmarks.trap_tasks import TASKS
from weightdecomp import Config, baselines

CACHE = Path(__file__).parent / ".cache" / "traps"
PASS = 0.95  # of the exact answer

FULL = Effort(3, None, None, Config())
_SLOW = ("sae mdl", "sae end-to-end", "sae end-to-end + downstream", "apd", "spd", "l3d")
QUICK = Effort(3, 600, None, Config())
SMOKE = Effort(1, 100, ("neurons", "pca", "ica", "sae topk", "svd"), Config(steps=10, sample=512), False, 2048, 384)


def cells(effort: Effort) -> list[Cell]:
    """All cells, seeds outermost, so that a stopped run has something to show of every task."""
    names = [OURS, ORACLE, RANDOM, *(effort.methods or baselines.NAMES)]
    return [Cell(task, name, seed) for seed in range(effort.seeds) for task in TASKS for name in names]


def key(cell: Cell, effort: Effort) -> str:
    """The hash of all that a cell depends on: its names, the effort, and the code."""
    effort = effort._replace(seeds=0, methods=None)
    said = f"{cell.task.name}|{cell.method}|{cell.seed}|{effort}|{_code()}"
    return hashlib.sha256(said.encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """The hash of the code that scores are made by; the page and this file's doorway are not part of it."""
    files = [file for package in (weightdecomp, bilinear) for file in Path(str(package.__file__)).parent.rglob("*.py")]
    files += [file for file in Path(__file__).parent.glob("trap_*.py") if file.name != "trap_page.py"]
    files.append(Path(str(targets.__file__)))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def run(
    effort: Effort,
    shard: tuple[int, int],
    folder: Path,
    progress: bool = True,
    only: Callable[[Cell], bool] = lambda _: True,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Make this shard of such cells, those that are not there yet, and return all that are."""
    wanted = cells(effort)
    files = [folder / f"{key(cell, effort)}.json" for cell in wanted]
    mine = [i for i, cell in enumerate(wanted) if only(cell)][shard[0] :: shard[1]]
    missing = [i for i in mine if not files[i].exists()]
    made = Parallel(jobs, return_as="generator_unordered")(delayed(_make)(wanted[i], effort, files[i]) for i in missing)
    there = len(mine) - len(missing)
    for _ in tqdm(made, total=len(mine), initial=there, disable=not progress, desc="traps", leave=False):
        pass
    return [json.loads(file.read_text()) for file in files if file.exists()]


def _make(cell: Cell, effort: Effort, file: Path) -> None:
    """Make one cell, on one thread whatever process it is in, so that its figures are the same."""
    torch.set_num_threads(1)
    write_json(file, scored(cell, effort) | {"commit": provenance()["commit"]})


def record(word: str) -> list[dict[str, Any]]:
    """The cells of a record that a run wrote, each with its commit."""
    try:
        read = json.loads(Path(word).read_text())
        commit = read["provenance"]["commit"]
        return list({_name(one): {"commit": commit, **one} for one in read["cells"]}.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"expected a record of this benchmark, as traps-quick.json is, got {word!r} ({error})"
        ) from error


def joined(found: Sequence[dict[str, Any]], records: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The cells found, and those of records that they lack, as other machines or commits made them."""
    cells = {_name(one): one for one in found}
    for one in chain.from_iterable(records):
        cells.setdefault(_name(one), one)
    return list(cells.values())


def _name(one: dict[str, Any]) -> tuple[str, str, int]:
    """What tells a cell from others."""
    return one["task"], one["method"], one["seed"]


def summary(found: Sequence[dict[str, Any]]) -> str:
    """Tasks by methods: median score over seeds; n/a where a method does not apply, nothing where it was not run."""
    methods = list(dict.fromkeys(one["method"] for one in found))
    rows = []
    for method in methods:
        row = [method]
        for task in TASKS:
            own = [one for one in found if (one["task"], one["method"]) == (task.name, method)]
            scores = [one["score"] for one in own if "score" in one]
            row.append(spread(scores).text(".2f") if scores else "n/a" if own else "")
        rows.append(row)
    return table(["method", *(task.name for task in TASKS)], rows)


def costs(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Per method what a cell costs, medians over tasks and seeds: a header, then one row a method."""
    rows = [["method", "CPU-s a cell", "CPU-s of a fit", "parameters", "peak MiB of a fit"]]
    for method in dict.fromkeys(one["method"] for one in found):
        own = [one for one in found if one["method"] == method]

        def told(name: str, form: str, unit: float = 1, own: Sequence[dict[str, Any]] = own) -> str:
            values = [one[name] / unit for one in own if one.get(name) is not None]
            return spread(values).text(form) if values else "-"

        fit = told("fit_seconds", ".1f"), told("parameters", ",.0f"), told("peak_bytes", ",.0f", 2**20)
        rows.append([method, told("cpu_seconds", ".1f"), *fit])
    return rows


def shard(word: str) -> tuple[int, int]:
    """`i/n`, i from 1 to n, as (i - 1, n)."""
    first, _, last = word.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"expected i/n with i from 1 to n, got {word!r}")
    return int(first) - 1, int(last)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and write the table and the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.traps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, few steps and methods: below two minutes")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="600 training steps; the six slowest methods are left out unless --method names them",
    )
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="only every n-th cell (1/1)")
    parser.add_argument("--jobs", type=int, default=-1, metavar="N", help="cells at a time (-1: one a core)")
    parser.add_argument("--task", default="*", metavar="PATTERN", help="only tasks of such a name, as in 'ping*'")
    parser.add_argument("--method", default="*", metavar="PATTERN", help="only methods of such a name")
    parser.add_argument(
        "--join", type=record, action="append", default=[], metavar="FILE", help="show the cells of this record as well"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "traps", metavar="DIR", help="default: %(default)s")
    given = parser.parse_args(arguments)
    if not given.jobs:
        parser.error("--jobs must be a number of cells, or -1 for one a core; got 0")
    effort, name = (SMOKE, "traps-smoke") if given.smoke else (QUICK, "traps-quick") if given.quick else (FULL, "traps")

    def only(cell: Cell) -> bool:
        left_out = given.quick and given.method == "*" and cell.method in _SLOW
        return not left_out and fnmatch(cell.task.name, given.task) and fnmatch(cell.method, given.method)

    if not any(map(only, cells(effort))):
        known = [*(task.name for task in TASKS), *dict.fromkeys(cell.method for cell in cells(effort))]
        parser.error(f"no task like {given.task!r} with a method like {given.method!r}; there are {', '.join(known)}")
    found = joined(run(effort, given.shard, CACHE, only=only, jobs=given.jobs), given.join)
    order = {(cell.task.name, cell.method, cell.seed): i for i, cell in enumerate(cells(effort))}
    found.sort(key=lambda one: order.get(_name(one), len(order)))
    missing = len(order.keys() - set(map(_name, found)))
    spent = costs(found)
    text = f"{summary(found)}\n\n{table(spent[0], spent[1:])}\n"
    text += f"\n{missing} cells are still missing.\n" if missing else ""
    # One seed's pictures are shown; those of others would be most of the record.
    kept = [one if one["seed"] == 0 else {**one, "pictures": []} for one in found]
    document = {"provenance": provenance(), "missing": missing, "cells": kept}
    write(given.out / f"{name}.json", json.dumps(document, allow_nan=False, separators=(",", ":")))
    write(given.out / f"{name}.md", text)
    write(given.out / f"{name}.html", page(found, TASKS, PASS, spent))
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
