"""The trap suite: tasks with exact answers, our decomposition and all baselines, the known answer and a null.

`python -m benchmarks.traps [--smoke | --quick] [--shard i/n]`. A cell is one task, method and seed. It is kept in
`benchmarks/.cache/traps` under the hash of all that it depends on, the code included, so that a run that was stopped
goes on, shards share a folder, and nothing stale is shown. Of a method's grid the best setting is reported, chosen by
the score itself: the baselines' most favourable reading. Ours has one setting.
"""

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import weightdecomp
from benchmarks.report import RESULTS, provenance, spread, table, write, write_json
from benchmarks.trap_page import page
from benchmarks.trap_scores import effect_matching
from benchmarks.trap_tasks import TASKS, Task, Trap
from weightdecomp import Config, baselines, decompose
from weightdecomp._divergence import named
from weightdecomp._nulls import Place, random_directions
from weightdecomp._sites import find_sites
from weightdecomp._starts import Reach
from weightdecomp.baselines import Data, Fitted, Inapplicable, Method, protocols
from weightdecomp.baselines._ours import as_fitted
from weightdecomp.baselines._weights import components

CACHE = Path(__file__).parent / ".cache" / "traps"
PASS = 0.95  # of the exact answer
OURS, RANDOM, ORACLE = "weight decomposition", "null: random directions", "oracle: the known answer"
_FIT, _SCORED = 4096, 512  # inputs


class Effort(NamedTuple):
    """How much a run spends.

    Attributes:
        seeds: Of every task.
        steps: Gradient steps of trained methods; None: their own.
        methods: Names; None: all.
        config: Of our decomposition.
    """

    seeds: int
    steps: int | None
    methods: tuple[str, ...] | None
    config: Config


FULL = Effort(3, None, None, Config())
_SLOW = ("sae mdl", "sae end-to-end", "sae end-to-end + downstream", "spd")
QUICK = Effort(3, 600, tuple(name for name in baselines.NAMES if name not in _SLOW), Config())
SMOKE = Effort(1, 100, ("neurons", "pca", "ica", "sae topk", "svd"), Config(steps=10, sample=512))


class Cell(NamedTuple):
    """One task, method and seed."""

    task: Task
    method: str
    seed: int


def cells(effort: Effort) -> list[Cell]:
    """All cells, seeds outermost, so that a stopped run has something to show of every task."""
    names = [OURS, ORACLE, RANDOM, *(effort.methods or baselines.NAMES)]
    return [Cell(task, name, seed) for seed in range(effort.seeds) for task in TASKS for name in names]


def scored(cell: Cell, effort: Effort) -> dict[str, Any]:
    """The best setting's score of one cell, averaged over the task's traps, or why there is none."""
    before = time.process_time()
    settings: list[tuple[float, list[list[float]], str, int]] = []
    reason = ""
    traps = cell.task.build(cell.seed)
    for choice in range(_n_settings(cell.method)):
        try:
            found = [_on_trap(trap, cell, choice, effort) for trap in traps]
        except Inapplicable as error:
            reason = str(error)
            continue
        scores = [one for one, _, _ in found]
        mean = sum(sum(one) / len(one) for one in scores) / len(scores)
        settings.append((mean, scores, found[0][1], found[0][2]))
    result = {"task": cell.task.name, "method": cell.method, "seed": cell.seed, "reason": reason}
    if settings:
        mean, scores, setting, units = max(settings, key=lambda one: one[0])
        result |= {"score": mean, "scores": scores, "setting": setting, "units": units}
    return result | {"cpu_seconds": time.process_time() - before}


def _n_settings(name: str) -> int:
    return 1 if name in (OURS, RANDOM, ORACLE) else len(_method(name).grid())


def _method(name: str) -> Method:
    return next(method for method in baselines.ALL if method.name == name)


def _on_trap(trap: Trap, cell: Cell, choice: int, effort: Effort) -> tuple[list[float], str, int]:
    x, _ = trap.sample(_FIT, torch.Generator().manual_seed(2 * cell.seed))
    held, truth = trap.sample(_SCORED, torch.Generator().manual_seed(2 * cell.seed + 1))
    sites, _ = find_sites(trap.model, x, trap.sites)
    divergence = named("mse", "outputs are real-valued")
    data = Data(trap.model, [x], sites, divergence, 0.02)
    fitted = _fitted(data, trap, cell, choice, effort)
    trial = protocols.trial(trap.model, held, sites, divergence)
    return effect_matching(trial, fitted, truth, trap.most), fitted.setting, fitted.n


def _fitted(data: Data, trap: Trap, cell: Cell, choice: int, effort: Effort) -> Fitted:
    if cell.method == OURS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unmet tolerance shows in the score
            found = decompose(
                trap.model, data.batches, sites=trap.sites, seed=cell.seed, config=effort.config, progress=False
            )
        return as_fitted(found)
    if cell.method == RANDOM:
        return _random(data, cell.seed)
    if cell.method == ORACLE:
        return oracle(data, trap)
    method: Any = list(_method(cell.method).grid())[choice]
    if effort.steps and hasattr(method, "training"):
        method = replace(method, training=replace(method.training, steps=effort.steps))
    return method.fit(data, cell.seed)


def _random(data: Data, seed: int) -> Fitted:
    """Random orthonormal frames times W, twice as many pieces as the rank: they sum to W and can mean nothing."""
    rng, banks = torch.Generator().manual_seed(seed), []
    for site in data.sites:
        x = data.inputs(site.path)
        power, basis = torch.linalg.eigh((x.T @ x).double())
        reach = Reach(site.matrix(), power.clamp_min(0).sqrt()[:, None] * basis.T)
        pieces = random_directions(Place(site, 2 * min(site.shape), 0.0, reach), rng)
        banks.append(components(site, pieces.v, pieces.u))
    return Fitted(RANDOM, "twice the rank", data.sites, banks)


def oracle(data: Data, trap: Trap) -> Fitted:
    """The true shares of the weights as units, one a mechanism and site.

    Raises:
        Inapplicable: For a control, whose mechanisms are not in the weights.
    """
    if not trap.parts:
        raise Inapplicable("the mechanisms are features of the data, not parts of the weights")
    banks = []
    for site in data.sites:
        reads, writes, owner = [], [], []
        for number, part in enumerate(trap.parts):
            left, sizes, right = torch.linalg.svd(part[site.path], full_matrices=False)
            rank = int((sizes > 1e-6 * sizes[0]).sum())
            reads.append(right[:rank])
            writes.append((left[:, :rank] * sizes[:rank]).T)
            owner += [number] * rank
        n = len(trap.parts)
        bank = components(site, torch.cat(reads), torch.cat(writes))
        ones = torch.ones(n)
        banks.append(
            replace(
                bank,
                numbers=ones,
                values=ones,
                owner=torch.tensor(owner),
                importance=lambda inner, n=n: inner.new_ones(*inner.shape[:-1], n),
            )
        )
    return Fitted(ORACLE, "", data.sites, banks)


def key(cell: Cell, effort: Effort) -> str:
    """The hash of all that a cell depends on: its names, the effort, and the code."""
    effort = effort._replace(seeds=0, methods=None)
    return hashlib.sha256(f"{cell.task.name}|{cell.method}|{cell.seed}|{effort}|{_code()}".encode()).hexdigest()[:24]


def _code() -> str:
    """The hash of the code that scores are made by; the page and this file's doorway are not part of it."""
    files = sorted(Path(weightdecomp.__file__).parent.rglob("*.py"))
    files += [Path(__file__).with_name(name) for name in ("trap_tasks.py", "trap_scores.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def run(effort: Effort, shard: tuple[int, int], cache: Path, progress: bool = True) -> list[dict[str, Any]]:
    """Make this shard's cells that are not there yet, and return all that are."""
    wanted = cells(effort)
    keys = [key(cell, effort) for cell in wanted]
    mine = [i for i in range(len(wanted)) if i % shard[1] == shard[0]]
    for i in tqdm(mine, disable=not progress, desc="traps", leave=False):
        file = cache / f"{keys[i]}.json"
        if not file.exists():
            write_json(file, scored(wanted[i], effort))
    files = [cache / f"{one}.json" for one in keys]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def summary(found: Sequence[dict[str, Any]]) -> str:
    """Tasks by methods: median score over seeds."""
    methods = list(dict.fromkeys(one["method"] for one in found))
    rows = []
    for method in methods:
        row = [method]
        for task in TASKS:
            scores = [r["score"] for r in found if (r["task"], r["method"]) == (task.name, method) and "score" in r]
            row.append(spread(scores).text(".2f") if scores else "n/a")
        rows.append(row)
    return table(["method", *(task.name for task in TASKS)], rows)


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
    parser.add_argument("--quick", action="store_true", help="600 training steps, without the four slowest methods")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="only every n-th cell (1/1)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    effort, name = (SMOKE, "traps-smoke") if given.smoke else (QUICK, "traps-quick") if given.quick else (FULL, "traps")
    found = run(effort, given.shard, CACHE)
    missing = len(cells(effort)) - len(found)
    text = summary(found) + (f"\n\n{missing} cells are still missing.\n" if missing else "\n")
    write_json(given.out / f"{name}.json", {"provenance": provenance(), "missing": missing, "cells": found})
    write(given.out / f"{name}.md", text)
    write(given.out / f"{name}.html", page(found, TASKS, PASS))
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
