"""What a run costs on one and on two processes: operations, CPU time, memory and stored bytes of every stage.

A language model of random weights is decomposed stage by stage, as `decompose` does, by jobs of one and of two
processes that torchrun starts on this machine. Operations are counted by torch's own counter, in a run apart from the
timed one; both are those of the busiest process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import (
    RESULTS,
    ROOT,
    peak_bytes,
    provenance,
    reset_peak,
    resident_bytes,
    table,
    write,
    write_json,
)
from benchmarks.speed import Transformer
from weightdecomp import Config
from weightdecomp._attack import Ablation
from weightdecomp._divergence import choose
from weightdecomp._fit import Gatekeeper, chosen_start
from weightdecomp._forward import recorded
from weightdecomp._frame import frame
from weightdecomp._processes import Processes, job, local
from weightdecomp._refine import Refiner
from weightdecomp._sample import dealt, taken
from weightdecomp._sites import find_sites

POSITIONS, VOCABULARY, TOLERANCE, STEPS = 32, 256, 0.02, 10
COUNTS = (1, 2)


class Meter:
    """Costs of the stages of one process, by name."""

    def __init__(self, counting: bool) -> None:
        self.counting = counting
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        reset_peak()
        before, cpu, wall = resident_bytes(), time.process_time(), time.perf_counter()
        counter = FlopCounterMode(display=False) if self.counting else None
        with counter or nullcontext():
            yield
        cost = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
        self.stages[name] = cost | {"peak_bytes": peak_bytes() - before}
        if counter:
            self.stages[name] = {"operations": counter.get_total_flops()}


def stored(values: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts, of sharded ones those in this process."""
    if isinstance(values, Tensor):
        return local(values).numel() * values.element_size()
    if isinstance(values, Mapping):
        return stored(list(values.values()))
    return sum(stored(one) for one in values) if isinstance(values, list | tuple) else 0


def worked(smoke: bool, counting: bool, processes: Processes) -> dict[str, Any]:
    """All stages in this process."""
    d, inputs = (16, 16) if smoke else (128, 64)
    config = Config(sample=inputs * POSITIONS // 2, batch=inputs // 2)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = Transformer(d, 2, VOCABULARY).eval()
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (inputs, POSITIONS), generator=rng)
    sites, _ = find_sites(model, tokens, ["blocks.0.*"])
    metric = choose("auto", recorded(model, tokens[:1], sites).output, True)
    meter = Meter(counting)
    batch = tokens[: config.batch]
    with meter.stage("target, forward"), torch.no_grad():
        model(batch)
    with meter.stage("sample, sensitivities"):
        sample = taken(model, [tokens], sites, metric, config.sample, rng, processes)
    with meter.stage("starts"):
        own = {site.path: chosen_start(model, sample, site, metric, TOLERANCE, config) for site in processes.own(sites)}
    sizes = {"sensitivities": stored(sample.sensitivity)}
    frames, pieces = {}, {}
    for index, site in enumerate(sites):
        start = own.get(site.path)
        tensors = {**start.pieces._asdict(), **start.origin} if start else None
        found, _ = processes.sent(index % processes.n, tensors)
        parts = type(next(iter(own.values())).pieces)(found["v"], found["u"], found["owner"])
        origin = {name: found[name] for name in ("basis", "power", "exemplars")}
        pieces[site.path], frames[site.path] = parts, frame(**origin, matrix=site.matrix(), pieces=parts)
    ablation = Ablation(model, sites, pieces, metric, {}, processes)
    sample = dealt(sample, model, sites, processes)
    with meter.stage("gates"):
        keeper = Gatekeeper(ablation, sample, TOLERANCE, 0)
        gated = keeper.gates()
    sizes["sorted arms"] = stored([trade._arms for trade in keeper.trades.values()])
    sizes["contributions"] = stored(keeper.sizes)
    del keeper
    refiner = Refiner(ablation, frames, sample.nothing, config, rng)
    refiner.step(batch, gated.thresholds, 0, 0.01)
    with meter.stage("step"):
        for step in range(1, 2 if counting else 1 + STEPS):
            refiner.step(batch, gated.thresholds, step, 0.01)
    sizes["factors and moments"] = stored([refiner.factors, refiner.moments])
    counts = {"rows": config.sample, "held": len(sample.held) * processes.n * POSITIONS, "batch": batch.numel()}
    numbers = [site.matrix().numel() for site in sites]
    shape = {"sites": len(sites), "weights": sum(numbers), "pieces": sum(len(one.owner) for one in pieces.values())}
    widths = sum(len(pieces[site.path].owner) * sum(site.shape) for site in sites)
    return {"stages": meter.stages, "stored": sizes, "tokens": counts, **shape, "factor_numbers": widths}


def job_of(n: int, smoke: bool, counting: bool) -> dict[str, Any]:
    """What the busiest of n processes costs."""
    with tempfile.TemporaryDirectory() as directory:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        words += ["-m", "benchmarks.processes", "--worker", directory, *["--smoke"] * smoke, *["--count"] * counting]
        subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        found = [json.loads((Path(directory) / str(i)).read_text()) for i in range(n)]
    worst = dict(found[0])
    for key in ("stages", "stored"):
        worst[key] = _largest([one[key] for one in found])
    return worst


def _largest(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _largest([one[key] for one in values]) for key in values[0]}
    return max(values)


def compared(smoke: bool) -> dict[str, Any]:
    """Jobs of one and two processes, with where they were measured."""
    jobs = {}
    for n in COUNTS:
        jobs[str(n)] = job_of(n, smoke, False)
        for stage, cost in job_of(n, smoke, True)["stages"].items():
            jobs[str(n)]["stages"][stage] |= cost
    return {"jobs": jobs, "steps": STEPS, "load": os.getloadavg(), "provenance": provenance()}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result."""
    one, two = (result["jobs"][str(n)] for n in COUNTS)
    rows = []
    for name, cost in one["stages"].items():
        other = two["stages"][name]
        figures: list[tuple[str, Callable[[dict], float]]] = [
            ("{:.2f}", lambda x: x["operations"] / 1e9),
            ("{:.2f}", lambda x: x["cpu_seconds"]),
            ("{:.0f}", lambda x: x["peak_bytes"] / 2**20),
        ]
        rows.append([name, *(form.format(read(x)) for form, read in figures for x in (cost, other))])
    head = ["stage", "Gflop, 1", "2", "CPU-s, 1", "2", "MiB, 1", "2"]
    bytes_ = [[name, *(f"{x['stored'][name] / 2**20:.1f}" for x in (one, two))] for name in one["stored"]]
    where, tokens = result["provenance"], one["tokens"]
    legend = (
        f"{one['sites']} sites of a transformer with {one['weights']:,} weights and {one['pieces']} pieces; "
        f"{tokens['rows']:,} tokens in the sample, {tokens['batch']:,} in a step. Figures of the busiest process of a "
        f"job of one and of two. Operations: multiplications and additions in matrix products of one pass, or one "
        f"step (torch's counter); CPU-seconds: process time, of {result['steps']} steps in the last row; MiB: peak "
        f"resident memory above what was there before the stage.\n\n{where['machine']}, {where['cores']} cores, one "
        f"thread a process, load {result['load'][0]:.1f} while measuring, torch {where['torch']}, "
        f"{where['date'][:10]}, commit {where['commit'][:9]}."
    )
    return f"{table(head, rows)}\n\n{table(['stored, MiB', '1', '2'], bytes_)}\n\n{legend}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny target, in seconds; figures mean nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        with job() as group:
            processes = Processes(group)
            write_json(given.worker / str(processes.index), worked(given.smoke, given.count, processes))
        return 0
    result = compared(given.smoke)
    if not given.smoke:
        write_json(RESULTS / "processes.json", result)
        write(RESULTS / "processes.md", markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
