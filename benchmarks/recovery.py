"""Does `decompose` find known mechanisms? One configuration, the default, on eleven tasks.

1. Per task five targets that hold the claimed mechanism, and an untrained network of the same shapes.
2. Decompose each in a process of its own: CPU seconds, wall seconds and peak memory of `decompose` alone.
3. Score it against the known answer, and attack it beside the oracle: the true components with true gates.
4. One JSON file a run, written whole; a run that has one is not repeated. Then a summary and a table.

A run passes with no error in its importance pattern at any site and with adversarial damage of at most the
tolerance, or at most 1.2 times the oracle's where that is higher: a toy's own interference puts a floor under
the damage.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.report import (
    RESULTS,
    Spread,
    peak_bytes,
    provenance,
    reset_peak,
    resident_bytes,
    spread,
    table,
    write,
    write_json,
)
from benchmarks.scoring import (
    Factors,
    active_per_input,
    dense_errors,
    matching,
    mean_max_cosine,
    neuron_null,
    oracle_components,
    oracle_importances,
    pattern_errors,
    random_null,
    svd_null,
    true_active_per_input,
)
from benchmarks.targets import CACHE, TASKS, PerFeature, Target, make, verified_targets
from weightdecomp import Config, Decomposition, decompose
from weightdecomp._attack import Ablation, Part
from weightdecomp._pieces import Pieces
from weightdecomp._regimes import RUNGS, Trial, all_at, ladder, ledger, mean_divergence, rounded, stochastic

N_TARGETS = 5
TOLERANCE = 0.02
JUDGED = 320  # attack steps at which a run is judged
SLACK = 1.2  # times the oracle's damage that is accepted
UNTRAINED = tuple(task for task in TASKS if not task.endswith("_rotated"))  # a rotation of noise is noise
_TRAIN, _EVALUATE = 1, 2  # seeds of the inputs to decompose on and of those to score on


def rungs(steps: int) -> list[int]:
    """Attack steps up to some number at which the damage is read."""
    return sorted({rung for rung in RUNGS if rung < steps} | {steps})


@dataclass(frozen=True)
class Budget:
    """How much a benchmark run spends; nothing here is a setting of the decomposition except `config`.

    Attributes:
        inputs: Inputs to decompose on.
        evaluated: Fresh inputs to score on.
        attack: Largest number of attack steps.
        long_attack: The same for one more attack, with shared sources on our own components alone.
        restarts: Searches side by side.
        config: Settings of the decomposition.
        training: Training steps of a target; None for the published number.
        cache: Directory of trained targets.
    """

    inputs: int = 32768
    evaluated: int = 1024
    attack: int = JUDGED
    long_attack: int = 1280
    restarts: int = 3
    config: Config = Config()
    training: int | None = None
    cache: Path | None = CACHE


SMOKE = Budget(
    inputs=512,
    evaluated=64,
    attack=20,
    long_attack=40,
    config=Config(steps=2, sample=256),
    training=200,
    cache=None,
)
Kind = Literal["trained", "untrained"]


# ------------------------------------------------------------ one run


def run(task: str, seed: int, kind: Kind, budget: Budget) -> dict[str, Any]:
    """Decompose one target and score the result; plain values for JSON."""
    target = make(task, seed, budget.cache, 0 if kind == "untrained" else budget.training)
    inputs = target.batches(budget.inputs, _TRAIN)
    before = resident_bytes()
    reset_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unmet tolerance is in the record
        found = decompose(
            target.model,
            inputs,
            sites=list(target.mechanisms),
            tolerance=TOLERANCE,
            config=budget.config,
            progress=False,
        )
    record: dict[str, Any] = {
        "task": task,
        "seed": seed,
        "kind": kind,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_bytes": peak_bytes(),
        "bytes_before": before,
        "target": {"verified": target.verified, "reason": target.reason, **target.stats},
        "outcome": outcome(found),
        "settings": settings(budget),
        "provenance": provenance(),
    }
    if kind == "trained":
        record |= scores(target, found, budget)
    return record


def settings(budget: Budget) -> dict[str, Any]:
    """The budget and the constants of the benchmark as plain values."""
    values = asdict(budget)
    del values["cache"]
    return {**values, "tolerance": TOLERANCE, "train_seed": _TRAIN, "evaluation_seed": _EVALUATE, "seed": 0}


def outcome(found: Decomposition) -> dict[str, Any]:
    """What the run says of itself."""
    own = found.outcome
    return {
        "converged": own.converged,
        "reason": own.reason,
        "damage": own.damage,
        "compresses": own.compresses,
        "verdict": own.verdict,
        "steps": own.steps,
        "circuits": len(found.groups),
        "starts": {path: parts.start for path, parts in found.parts.items()},
    }


def scores(target: Target, found: Decomposition, budget: Budget) -> dict[str, Any]:
    """Every score of one run."""
    (inputs,) = target.batches(budget.evaluated, _EVALUATE, size=budget.evaluated)
    on_probes, on_inputs = found.importances(target.probes()), found.importances(inputs)
    truth = oracle_components(target)
    sites = {
        path: site_scores(target, path, _factors(found, path), on_probes[path], on_inputs[path], truth[path])
        for path in target.mechanisms
    }
    true_active = true_active_per_input(target, inputs)
    verified = found.verify(
        [inputs], steps=budget.attack, restarts=budget.restarts, inputs=len(inputs), nulls=True, bound=False
    ).to_dict()
    oracle = oracle_figures(target, found, inputs, truth, budget)
    own = trial(target, found.ablation(), inputs, on_inputs)
    rng = torch.Generator().manual_seed(1)
    long = ladder(own, rungs(budget.long_attack), budget.restarts, False, rng)
    names = ("shared", "per_input", "stochastic", "gates", "unmasked", "ledger")
    ours = {name: verified[name] for name in names}
    at = judged(verified["shared"]["steps"])
    damages = [figures["shared"]["damages"][at] for figures in (ours, oracle)]
    errors = sum(one["pattern_errors"] for one in sites.values())
    return {
        "sites": sites,
        "pattern_errors": errors,
        "active": sum(one["active"] for one in sites.values() if one["kind"] == "per feature"),
        "true_active": true_active * sum(one["kind"] == "per feature" for one in sites.values()),
        "damage": damages[0],
        "oracle_damage": damages[1],
        "judged_at": verified["shared"]["steps"][at],
        "passed": errors == 0 and damages[0] <= max(TOLERANCE, SLACK * damages[1]),
        "verification": {
            **ours,
            "long": asdict(long),
            "live": {one["path"]: one["live"] for one in verified["sites"]},
        },
        "oracle": oracle,
        "nulls": {"ours": verified["ours"], **{one["name"]: one for one in verified["nulls"]}},
        "dense": verified["dense"],
        "bits_per_input": found.ledger.per_input,
        "verified": {"converged": verified["converged"], "reason": verified["reason"]},
    }


def judged(steps: Sequence[int]) -> int:
    """The rung that decides: the one at 320 steps, or the last of a shorter ladder."""
    return steps.index(JUDGED) if JUDGED in steps else len(steps) - 1


def _factors(found: Decomposition, path: str) -> Factors:
    pieces = found.parts[path].pieces
    return Factors(pieces.u, pieces.v, pieces.owner)


def site_scores(
    target: Target,
    path: str,
    found: Factors,
    on_probes: Float[Tensor, "probe component"],
    on_inputs: Float[Tensor, "batch component"],
    truth: Factors,
) -> dict[str, Any]:
    """Scores of one site; weights are compared where the answer has a piece per feature."""
    mechanism = target.mechanisms[path]
    common = {"components": found.n, "active": active_per_input(on_inputs)}
    if not isinstance(mechanism, PerFeature):
        ranks = torch.bincount(found.owner, minlength=found.n)
        errors = dense_errors(on_probes, ranks, mechanism.rank)
        return {"kind": "dense", **common, "true_rank": mechanism.rank, "pattern_errors": errors}
    matched = matching(found, truth)
    close = ((matched.norm_ratio >= 0.95) & (matched.norm_ratio <= 1.05)).double().mean()
    mmcs, ml2r = mean_max_cosine(found, truth)
    return {
        "kind": "per feature",
        **common,
        "true_components": truth.n,
        "pattern_errors": pattern_errors(on_probes),
        "relative_error_median": float(matched.relative_error.median()),
        "relative_error_max": float(matched.relative_error.max()),
        "norm_ratio_median": float(matched.norm_ratio.median()),
        "norm_ratio_within_5_percent": float(close),
        "mmcs": mmcs,
        "ml2r": ml2r,
        "mmcs_nulls": cosine_nulls(truth, found.n),
    }


def cosine_nulls(truth: Factors, n: int) -> dict[str, float]:
    """Mean max cosines of decompositions of the same matrix that cannot be right."""
    matrix = truth.total
    nulls = {
        "random": random_null(matrix, max(n, min(matrix.shape)), seed=0),
        "svd": svd_null(matrix),
        "rows": neuron_null(matrix, rows=True),
        "columns": neuron_null(matrix, rows=False),
    }
    return {name: mean_max_cosine(one, truth)[0] for name, one in nulls.items()}


def oracle_figures(
    target: Target, found: Decomposition, inputs: Tensor, truth: Mapping[str, Factors], budget: Budget
) -> dict[str, Any]:
    """The true components with true gates under the same attack on the same inputs."""
    pieces = {path: Pieces(one.v, one.u, one.owner) for path, one in truth.items()}
    left = {site.path: site.matrix() - pieces[site.path].total() for site in found.sites}
    real = {s.path: left[s.path] for s in found.sites if left[s.path].norm() > 1e-5 * s.matrix().norm()}
    ablation = Ablation(target.model, found.sites, pieces, found.divergence, real)
    known = trial(target, ablation, inputs, oracle_importances(target, inputs))
    rng = torch.Generator().manual_seed(0)
    random = stochastic(known, rng)
    return {
        "shared": asdict(ladder(known, rungs(budget.attack), budget.restarts, False, rng)),
        "per_input": asdict(ladder(known, rungs(budget.attack), budget.restarts, True, rng)),
        "stochastic": asdict(random),
        "gates": asdict(rounded(known)),
        "ledger": asdict(ledger(known, TOLERANCE, random.divergence)),
    }


def trial(target: Target, ablation: Ablation, inputs: Tensor, importances: Mapping[str, Tensor]) -> Trial:
    """Components with their importances on some inputs, ready for an attack."""
    with torch.no_grad():
        output = target.model(inputs)
    parts = [Part(inputs, output, {path: [one] for path, one in importances.items()})]
    return Trial(ablation, parts, mean_divergence(Trial(ablation, parts, 1.0), all_at(0.0)))


# ------------------------------------------------------------ all runs


@dataclass(frozen=True)
class Job:
    """One run: a task, a target seed, and whether the target is trained."""

    task: str
    seed: int
    kind: Kind = "trained"

    def path(self, results: Path) -> Path:
        """Its record."""
        suffix = "" if self.kind == "trained" else f"-{self.kind}"
        return results / "recovery" / f"{self.task}-{self.seed}{suffix}.json"


def work(job: Job, results: Path) -> str:
    """Run a job in this process and write its record; returns a line about it."""
    torch.set_num_threads(1)
    record = run(job.task, job.seed, job.kind, Budget())
    write_json(job.path(results), record)
    return line(record)


def line(record: Mapping[str, Any]) -> str:
    """One record in one line."""
    head = f"{record['task']} {record['seed']} {record['kind']}: {record['cpu_seconds']:.1f} CPU s"
    if record["kind"] == "untrained":
        return f"{head}, {record['outcome']['verdict']}"
    errors = [one["pattern_errors"] for one in record["sites"].values()]
    verdict = "passed" if record["passed"] else "FAILED"
    damages = f"damage {record['damage']:.4f}, oracle {record['oracle_damage']:.4f}"
    return f"{head}, pattern errors {errors}, {damages}, {verdict}; {record['outcome']['verdict']}"


def jobs(tasks: Sequence[str]) -> tuple[list[Job], dict[str, int]]:
    """All runs of some tasks, and how many targets of each were rejected."""
    found: list[tuple[tuple[bool, bool, int], Job]] = []
    rejected = {}
    for task in tasks:
        targets, refused = verified_targets(task, N_TARGETS)
        rejected[task] = len(refused)
        slow = task.startswith("resid")
        found += [((i > 0, slow, i), Job(task, target.seed)) for i, target in enumerate(targets)]
        found += [((True, slow, 0), Job(task, 0, "untrained"))] * (task in UNTRAINED)
    # Every task's first target comes first and slow ones come last: a table that is not yet full says most.
    return [job for _, job in sorted(found, key=lambda pair: pair[0])], rejected


def run_all(tasks: Sequence[str], results: Path, fresh: bool) -> int:
    """Run what has no record yet, each in a process of its own, and summarise; returns how many failed."""
    wanted, rejected = jobs(tasks)
    failures = 0
    for job in wanted:
        if fresh:
            job.path(results).unlink(missing_ok=True)
    for job in [job for job in wanted if not job.path(results).exists()]:
        # A process each: peak memory means something, and a crash ends one run only.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                print(pool.submit(work, job, results).result(), flush=True)
            except Exception:
                failures += 1
                print(f"{job} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        summarise(results, rejected)
    summarise(results, rejected)
    return failures


# ------------------------------------------------------------ summary

_SPREADS = (
    *("cpu_seconds", "wall_seconds", "peak_bytes", "pattern_errors", "active", "true_active"),
    *("damage", "oracle_damage", "bits_per_input"),
)
_SITE_SPREADS = (
    *("relative_error_median", "relative_error_max", "norm_ratio_median", "norm_ratio_within_5_percent"),
    *("mmcs", "ml2r"),
)


def summarise(results: Path, rejected: Mapping[str, int]) -> dict[str, Any]:
    """Write `recovery.json` and `recovery.md` from all records."""
    before = results / "recovery.json"
    known = json.loads(before.read_text())["rejected"] if before.exists() else {}
    records = [json.loads(path.read_text()) for path in sorted((results / "recovery").glob("*.json"))]
    by_task = {task: [one for one in records if one["task"] == task and one["kind"] == "trained"] for task in TASKS}
    summary = {
        "bar": f"no pattern error and damage at {JUDGED} steps <= max({TOLERANCE}, {SLACK} x oracle)",
        "rejected": {**known, **rejected},
        "tasks": {task: task_summary(runs) for task, runs in by_task.items() if runs},
        "untrained": {
            one["task"]: {**one["outcome"], "cpu_seconds": one["cpu_seconds"]}
            for one in records
            if one["kind"] == "untrained"
        },
        "settings": settings(Budget()),
        "commits": sorted({one["provenance"]["commit"] for one in records}),
        "provenance": provenance(),
    }
    write_json(before, summary)
    write(results / "recovery.md", markdown(summary) + "\n")
    return summary


def task_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One task's figures over its runs."""
    found: dict[str, Any] = {
        "seeds": [one["seed"] for one in runs],
        "passed": sum(one["passed"] for one in runs),
        "converged": sum(one["verified"]["converged"] for one in runs),
        "compresses": sum(one["outcome"]["compresses"] for one in runs),
        "errors_by_run": [one["pattern_errors"] for one in runs],
    }
    found |= {name: spread([one[name] for one in runs])._asdict() for name in _SPREADS}
    matched = [site for one in runs for site in one["sites"].values() if site["kind"] == "per feature"]
    found |= {name: spread([site[name] for site in matched])._asdict() for name in _SITE_SPREADS}
    for null in ("random", "svd", "rows", "columns"):
        found[f"mmcs_{null}"] = spread([site["mmcs_nulls"][null] for site in matched])._asdict()
    found["per_input_damage"] = _rung(runs, "verification", "per_input")
    found["oracle_per_input_damage"] = _rung(runs, "oracle", "per_input")
    found["null_damage"] = {}
    for name in runs[0]["nulls"]:
        damages = [one["nulls"][name]["adversarial"] for one in runs]
        scored = [one["damage"] for one in damages if one]
        found["null_damage"][name] = spread(scored)._asdict() if scored else None
    return found


def _rung(runs: Sequence[Mapping[str, Any]], whose: str, sources: str) -> dict[str, float]:
    ladders = [one[whose][sources] for one in runs]
    return spread([one["damages"][judged(one["steps"])] for one in ladders])._asdict()


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables of a summary."""
    head = (
        *("task", "passed", "pattern errors", "damage", "oracle", "per input", "oracle p.i."),
        *("random", "SVD", "active", "true", "MMCS", "null", "weight error", "CPU s", "peak MB"),
    )
    rows = [_row(task, one) for task, one in summary["tasks"].items()]
    compared = [
        [task, "yes" if one["compresses"] else "no", one["verdict"]] for task, one in summary["untrained"].items()
    ]
    where = summary["provenance"]
    passed = sum(one["passed"] for one in summary["tasks"].values())
    runs = sum(len(one["seeds"]) for one in summary["tasks"].values())
    legend = (
        f"{passed} of {runs} runs pass ({summary['bar']}). Medians over target seeds, ranges in brackets. "
        f"Damage: worst found in {JUDGED} steps x 3 restarts on 1,024 fresh inputs, sources shared or per "
        "input; `random` and `SVD` are nulls at the same number active, 160 steps. Active: components on per "
        "input at the sites with a piece per feature. MMCS null: random directions. Weight error: relative "
        "Frobenius error of matched pieces.\n\n"
        f"{where['machine']}, 1 thread, torch {where['torch']}, {where['date'][:10]}, "
        f"commits {', '.join(commit[:9] for commit in summary['commits'])}."
    )
    untrained = table(("untrained", "claims mechanisms", "verdict"), compared) if compared else ""
    return "\n\n".join(part for part in (table(head, rows), legend, untrained) if part)


def _row(task: str, one: Mapping[str, Any]) -> list[str]:
    def median(name: str, form: str = ".4f") -> str:
        return f"{one[name]['median']:{form}}"

    nulls = [one["null_damage"].get(name) for name in ("random directions", "SVD")]
    peak = Spread(**{key: value / 2**20 for key, value in one["peak_bytes"].items()})
    return [
        task,
        f"{one['passed']}/{len(one['seeds'])}",
        " ".join(map(str, one["errors_by_run"])),
        median("damage"),
        median("oracle_damage"),
        median("per_input_damage"),
        median("oracle_per_input_damage"),
        *(f"{null['median']:.3f}" if null else "-" for null in nulls),
        median("active", ".2f"),
        median("true_active", ".2f"),
        median("mmcs", ".3f"),
        median("mmcs_random", ".3f"),
        median("relative_error_median", ".3f"),
        Spread(**one["cpu_seconds"]).text(".1f"),
        f"{peak.median:.0f}",
    ]


# ------------------------------------------------------------ command line


def smoke(results: Path) -> dict[str, Any]:
    """A tiny run of every kind, and its summary; figures mean nothing."""
    for job in (Job("tms_5_2_id", 0), Job("tms_5_2_id", 0, "untrained")):
        write_json(job.path(results), run(job.task, job.seed, job.kind, SMOKE))
    return summarise(results, {"tms_5_2_id": 0})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny run in seconds; figures mean nothing")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that have a record")
    parser.add_argument("--only", metavar="TASK[,TASK]", help=f"some of {', '.join(TASKS)}")
    chosen = parser.parse_args(arguments)
    if chosen.smoke:
        with tempfile.TemporaryDirectory() as folder:
            print(markdown(smoke(Path(folder))))
        return 0
    tasks = chosen.only.split(",") if chosen.only else list(TASKS)
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        parser.error(f"argument --only: no tasks {unknown}; expected some of {list(TASKS)}")
    failures = run_all(tasks, RESULTS, chosen.fresh)
    print((RESULTS / "recovery.md").read_text())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
