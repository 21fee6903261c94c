"""What a run costs on one and on two processes: operations, CPU time, memory and stored bytes of every stage.

A language model of random weights is decomposed stage by stage, as `decompose` does, by jobs of one process, of two,
and of two that shard their components, which torchrun starts on this machine; then comes a step on wide matrices and
few inputs, where components take more memory than activations. Operations and memory are measured in a run apart from
the timed one; all are those of the busiest process.
"""

import argparse
import ctypes
import ctypes.util
import gc
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
from torch import Tensor, nn
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
from weightdecomp._fit import Start, chosen_start
from weightdecomp._forward import recorded
from weightdecomp._frame import Frame, frame
from weightdecomp._gatekeeper import Gatekeeper
from weightdecomp._pieces import Pieces
from weightdecomp._processes import Processes, job, local
from weightdecomp._refine import Refiner
from weightdecomp._sample import dealt, taken
from weightdecomp._sharded import stored
from weightdecomp._sites import Site, find_sites
from weightdecomp._starts import Reach, svd_start

POSITIONS, VOCABULARY, TOLERANCE, STEPS = 32, 256, 0.02, 10
WIDE = 768
JOBS = {"1": (1, False), "2": (2, False), "2 sharded": (2, True)}  # processes, and whether they shard


class Meter:
    """Costs of the stages of one process, by name."""

    def __init__(self, counting: bool) -> None:
        self.counting = counting
        self.stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        _trim()
        reset_peak()
        before, cpu, wall = resident_bytes(), time.process_time(), time.perf_counter()
        counter = FlopCounterMode(display=False) if self.counting else None
        with counter or nullcontext():
            yield
        if counter:
            self.stages[name] = {"operations": counter.get_total_flops(), "peak_bytes": peak_bytes() - before}
        else:
            cost = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
            self.stages[name] = cost


def _trim() -> None:
    """Hand freed memory back to the system, so that what a stage takes next counts again."""
    gc.collect()
    trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def stored_bytes(values: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts, of sharded ones those in this process."""
    if isinstance(values, Tensor):
        return local(values).numel() * values.element_size()
    if isinstance(values, Mapping):
        return stored_bytes(list(values.values()))
    return sum(stored_bytes(one) for one in values) if isinstance(values, list | tuple) else 0


def worked(smoke: bool, counting: bool, processes: Processes) -> dict[str, Any]:
    """All stages in this process."""
    d, inputs = (16, 16) if smoke else (128, 64)
    config = Config(sample=inputs * POSITIONS // 2)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = Transformer(d, 2, VOCABULARY).eval()
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (inputs, POSITIONS), generator=rng)
    sites, _ = find_sites(model, tokens, ["blocks.0.*"])
    metric = choose("auto", recorded(model, tokens[:1], sites).output, True)
    meter = Meter(counting)
    batch = tokens[: inputs // 2]
    with meter.stage("target, forward"), torch.no_grad():
        model(batch)
    with meter.stage("sample, sensitivities"):
        sample = taken(model, [tokens], sites, metric, config.sample, rng, processes)
    with meter.stage("starts"):
        share = TOLERANCE / len(sites)
        own = {
            site.path: chosen_start(model, sample, site, metric, TOLERANCE, config, share)
            for site in processes.own(sites)
        }
    sizes = {"sensitivities": stored_bytes(sample.sensitivity)}
    frames = dict[str, Frame]()
    pieces = stored(_exchanged(sites, own, frames, processes), processes)
    ablation = Ablation(model, sites, pieces, metric, {}, processes)
    del own
    shape = {"sites": len(sites), "weights": sum(site.matrix().numel() for site in sites)}
    counts = {site.path: len(pieces[site.path].owner) for site in sites}
    shape |= {"pieces": sum(counts.values()), "factor_numbers": sum(counts[s.path] * sum(s.shape) for s in sites)}
    sample = dealt(sample, model, sites, processes)
    with meter.stage("gates"):
        keeper = Gatekeeper(ablation, sample, TOLERANCE, 0)
        gated = keeper.gates()
    sizes["sorted arms"] = stored_bytes([trade._arms for trade in keeper.trades.values()])
    sizes["contributions"] = stored_bytes(keeper.sizes)
    del keeper
    refiner = Refiner(ablation, frames, sample.nothing, config, rng)
    refiner.step(batch, gated.thresholds, 0, 0.01)
    with meter.stage("step"):
        for step in range(1, 2 if counting else 1 + STEPS):
            refiner.step(batch, gated.thresholds, step, 0.01)
    sizes["factors and moments"] = stored_bytes([refiner.factors, refiner.moments])
    sizes["the same, wide"] = _wide_step(meter, 16 if smoke else WIDE, processes)
    tokens_in = {"rows": config.sample, "held": len(sample.held) * processes.n * POSITIONS, "batch": batch.numel()}
    return {"stages": meter.stages, "stored": sizes, "tokens": tokens_in, **shape}


def _wide_step(meter: Meter, d: int, processes: Processes) -> int:
    """Measure a step on few inputs of eight wide matrices; returns the bytes that are kept from step to step."""
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(d, d), nn.ReLU())]).eval()
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, d, generator=rng)
    sites, _ = find_sites(model, inputs)
    frames = dict[str, Frame]()

    def starts() -> Iterator[tuple[str, Pieces]]:
        for site in sites:
            reach = Reach(site.matrix(), torch.randn(2 * d, d, generator=rng))
            pieces = svd_start(reach)
            frames[site.path] = frame(reach.basis, reach.power, reach.basis[:0], site.matrix(), pieces)
            yield site.path, pieces

    metric = choose("mse", recorded(model, inputs, sites).output, False)
    ablation = Ablation(model, sites, stored(starts(), processes), metric, {}, processes)
    refiner = Refiner(ablation, frames, 1.0, Config(batch=len(inputs)), rng)
    thresholds = {path: torch.full((2, own.n), 0.1) for path, own in ablation.pieces.items()}
    with meter.stage("step, wide"):
        refiner.step(inputs, thresholds, 1, 0.01)
    return stored_bytes([refiner.factors, refiner.moments])


def _exchanged(
    sites: Sequence[Site], own: Mapping[str, Start], frames: dict[str, Frame], processes: Processes
) -> Iterator[tuple[str, Pieces]]:
    """Components of every site, made by some process each, and their frames."""
    for index, site in enumerate(sites):
        start = own.get(site.path)
        tensors = {**start.pieces._asdict(), **start.origin} if start else None
        found, _ = processes.sent(index % processes.n, tensors)
        pieces = Pieces(found["v"], found["u"], found["owner"])
        origin = {name: found[name] for name in ("basis", "power", "held")}
        frames[site.path] = frame(**origin, matrix=site.matrix(), pieces=pieces)
        yield site.path, pieces


def job_of(n: int, shard: bool, smoke: bool, counting: bool) -> dict[str, Any]:
    """What the busiest of n processes costs."""
    with tempfile.TemporaryDirectory() as directory:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        words += ["-m", "benchmarks.processes", "--worker", directory]
        words += [*["--shard"] * shard, *["--smoke"] * smoke, *["--count"] * counting]
        # Large blocks from the system, and back to it at once, so that resident memory is what is in use.
        memory = {"MALLOC_MMAP_THRESHOLD_": "65536"} if counting else {}
        subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | memory, check=True)
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
    """All jobs, with where they were measured."""
    jobs = {}
    for name, (n, shard) in JOBS.items():
        jobs[name] = job_of(n, shard, smoke, False)
        for stage, cost in job_of(n, shard, smoke, True)["stages"].items():
            jobs[name]["stages"][stage] |= cost
    return {"jobs": jobs, "steps": STEPS, "load": os.getloadavg(), "provenance": provenance()}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result."""
    jobs = result["jobs"]
    one = jobs["1"]
    figures: dict[str, tuple[str, Callable[[dict], float]]] = {
        "Gflop": ("{:.2f}", lambda x: x["operations"] / 1e9),
        "CPU-s": ("{:.2f}", lambda x: x["cpu_seconds"]),
        "MiB": ("{:.0f}", lambda x: x["peak_bytes"] / 2**20),
    }
    head = [f"{unit}, {name}" if name == "1" else name for unit in figures for name in jobs]
    rows = [
        [stage, *(form.format(read(job["stages"][stage])) for form, read in figures.values() for job in jobs.values())]
        for stage in one["stages"]
    ]
    kept = [[name, *(f"{job['stored'][name] / 2**20:.1f}" for job in jobs.values())] for name in one["stored"]]
    return f"{table(['stage', *head], rows)}\n\n{table(['stored, MiB', *jobs], kept)}\n\n{_legend(result)}\n"


def _legend(result: Mapping[str, Any]) -> str:
    one, where = result["jobs"]["1"], result["provenance"]
    tokens, steps = one["tokens"], result["steps"]
    speeds = [
        f"{steps * tokens['batch'] / job['stages']['step']['wall_seconds']:,.0f} ({name})"
        for name, job in result["jobs"].items()
    ]
    return (
        f"{one['sites']} sites of a transformer with {one['weights']:,} weights and {one['pieces']} pieces; "
        f"{tokens['rows']:,} tokens in the sample, {tokens['batch']:,} in a step. The last row is one step on 32 "
        f"inputs of eight matrices of {WIDE} x {WIDE}. Figures of the busiest process of a job of one, of two, and of "
        f"two that shard their components. Operations: multiplications and additions in matrix products of one pass, "
        f"or one step (torch's counter); CPU-s: process time, of {steps} steps in the row of steps; MiB: peak resident "
        f"memory above what was there before the stage. Tokens a second in steps: {', '.join(speeds)}.\n\n"
        f"{where['machine']}, {where['cores']} cores, one thread a process, load {result['load'][0]:.1f} while "
        f"measuring, torch {where['torch']}, {where['date'][:10]}, commit {where['commit'][:9]}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny target, in seconds; figures mean nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        with job() as group:
            processes = Processes(group, given.shard)
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
