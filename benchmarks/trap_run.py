"""One cell of the trap suite: a method is fitted to a task's models, and its units are matched to the exact answer."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.trap_parts import Effects, Trap
from benchmarks.trap_tasks import Task
from weightdecomp import Config, baselines, decompose
from weightdecomp._cost import Cost, Meter
from weightdecomp._divergence import named
from weightdecomp._nulls import Place, random_directions
from weightdecomp._sites import Site, find_sites
from weightdecomp._starts import Reach
from weightdecomp.baselines import Bank, Data, Fitted, Inapplicable, Matched, Method, effect_matching, protocols
from weightdecomp.baselines._ours import as_fitted
from weightdecomp.baselines._weights import components

OURS, RANDOM, ORACLE = "weight decomposition", "null: random directions", "oracle: the known answer"


class Effort(NamedTuple):
    """How much a run spends.

    Attributes:
        seeds: Of every task.
        steps: Gradient steps of trained methods; None: their own.
        methods: Names; None: all.
        config: Of our decomposition.
        tune: Whether all settings of a method's grid are tried, or its defaults alone.
        fit: Inputs to fit on.
        scored: Inputs to score on.
    """

    seeds: int
    steps: int | None
    methods: tuple[str, ...] | None
    config: Config
    tune: bool = True
    fit: int = 4096
    scored: int = 512


class Cell(NamedTuple):
    """One task, method and seed."""

    task: Task
    method: str
    seed: int


class Found(NamedTuple):
    """What one setting of a method found on one trap."""

    score: float
    matched: Matched
    truth: Effects
    fitted: Fitted


def scored(cell: Cell, effort: Effort) -> dict[str, Any]:
    """The best setting's score of one cell, averaged over the task's traps, or why there is none."""
    before = time.process_time()
    best, costs, top, reason = tuple[Found, ...](), tuple[Cost, ...](), -1.0, ""
    traps = cell.task.build(cell.seed)
    for setting in _settings(cell.method, effort):
        try:
            found, spent = zip(*[_on_trap(trap, cell, setting, effort) for trap in traps], strict=True)
        except Inapplicable as error:
            reason = str(error)
            continue
        mean = sum(one.score for one in found) / len(found)
        if mean > top:
            best, costs, top = found, spent, mean
    result = {"task": cell.task.name, "method": cell.method, "seed": cell.seed, "reason": reason}
    if best:
        result |= {
            "score": top,
            "scores": [one.matched.scores for one in best],
            "sizes": [one.matched.sizes for one in best],
            "claims": [one.matched.claims for one in best],
            "setting": best[0].fitted.setting,
            "units": [one.fitted.n for one in best],
            "parameters": sum(one.fitted.parameters for one in best),
            "fit_seconds": sum(one.cpu_seconds for one in costs),
            "peak_bytes": max((one.peak_bytes for one in costs if one.peak_bytes is not None), default=None),
            "pictures": [curves(one.truth, one.matched.effects) for one in best],
        }
    return result | {"cpu_seconds": time.process_time() - before}


def _settings(name: str, effort: Effort) -> list[Method | None]:
    """A baseline's settings; None for ours, the null and the answer."""
    if name in (OURS, RANDOM, ORACLE):
        return [None]
    method: Any = next(method for method in baselines.ALL if method.name == name)
    return [_hurried(one, effort) for one in (method.grid() if effort.tune else [method])]


def _hurried(method: Any, effort: Effort) -> Method:
    if effort.steps and hasattr(method, "training"):
        return replace(method, training=replace(method.training, steps=effort.steps))
    return method


def prepared(trap: Trap, seed: int, fit: int, held: int) -> tuple[Data, protocols.Trial, Effects]:
    """What methods are fitted on, what they are scored on, and the exact effects there."""
    x, _ = trap.sample(fit, torch.Generator().manual_seed(2 * seed))
    unseen, truth = trap.sample(held, torch.Generator().manual_seed(2 * seed + 1))
    sites, _ = find_sites(trap.model, x, trap.sites)
    data = Data(trap.model, [x], sites, named("mse", "outputs are real-valued"), 0.02)
    return data, protocols.trial(trap.model, unseen, sites, data.divergence), truth


def matched(trap: Trap, trial: protocols.Trial, fitted: Fitted, truth: Effects) -> Found:
    """A method's units beside the exact answer."""
    sites = [set(part) for part in trap.parts] or None
    found = effect_matching(trial, fitted, truth, sites, trap.most)
    score = sum(found.scores) / len(truth)
    if trap.exclusive:
        score *= min(1.0, len(truth) / max(1, found.claims))
    return Found(score, found, truth, fitted)


def _on_trap(trap: Trap, cell: Cell, setting: Method | None, effort: Effort) -> tuple[Found, Cost]:
    data, trial, truth = prepared(trap, cell.seed, effort.fit, effort.scored)
    meter = Meter(fresh=True)
    fitted = _fitted(data, trap, cell, setting, effort)
    cost = meter.cost
    return matched(trap, trial, fitted, truth), cost


def curves(truth: Effects, found: Effects, mechanisms: int = 12, inputs: int = 24) -> list[list[list[int]]]:
    """Small curves for a picture: the first mechanisms' exact and found effects, along their leading output direction.

    Inputs are the strongest and some others, in the order of the exact effect; values are hundredths of its largest.
    """
    drawn = []
    for goal, change in zip(truth[:mechanisms].flatten(2), found[:mechanisms].flatten(2), strict=True):
        along = torch.linalg.svd(goal, full_matrices=False).Vh[0]
        exact, got = goal @ along, change @ along
        order = exact.abs().argsort(descending=True)
        some = torch.cat([order[: inputs // 2], order[inputs // 2 :: max(1, len(order) * 2 // inputs)]])[:inputs]
        some = some[exact[some].argsort()]
        scale = 100 / float(exact.abs().max())
        drawn.append([[round(v) for v in (line[some] * scale).clamp(-150, 150).tolist()] for line in (exact, got)])
    return drawn


def _fitted(data: Data, trap: Trap, cell: Cell, setting: Method | None, effort: Effort) -> Fitted:
    if setting is not None:
        return setting.fit(data, cell.seed)
    if cell.method == OURS:
        return _ours(data, trap, cell, effort)
    return _random(data, cell.seed) if cell.method == RANDOM else oracle(data, trap)


def _ours(data: Data, trap: Trap, cell: Cell, effort: Effort) -> Fitted:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unmet tolerance shows in the score
        try:
            found = decompose(
                trap.model, data.batches, sites=trap.sites, seed=cell.seed, config=effort.config, progress=False
            )
        except ValueError as refusal:
            raise Inapplicable(str(refusal)) from refusal
    return as_fitted(found)


def _random(data: Data, seed: int) -> Fitted:
    """Random orthonormal frames times W, at least twice as many pieces as the rank: they sum to W and mean nothing."""
    rng, banks = torch.Generator().manual_seed(seed), []
    for site in data.sites:
        reach = Reach(site.matrix(), data.inputs(site.path))
        rank = int(torch.linalg.matrix_rank(reach.weight, rtol=1e-5))
        pieces = random_directions(Place(site, max(8, 2 * rank), 0.0, reach), rng)
        banks.append(components(site, pieces.v, pieces.u))
    return Fitted(RANDOM, "twice the rank", data.sites, banks)


def oracle(data: Data, trap: Trap) -> Fitted:
    """The true shares of the weights as units, one a mechanism and site.

    Raises:
        Inapplicable: For a control, whose mechanisms are not in the weights.
    """
    if not trap.parts:
        raise Inapplicable("the mechanisms are features of the data, not parts of the weights")
    banks = [components_of(site, [part[site.path] for part in trap.parts if site.path in part]) for site in data.sites]
    return Fitted(ORACLE, "", data.sites, banks)


def components_of(site: Site, shares: Sequence[Tensor]) -> Bank:
    """Each share of a weight as one unit."""
    reads, writes, owner = [], [], []
    for number, share in enumerate(shares):
        left, sizes, right = torch.linalg.svd(share, full_matrices=False)
        rank = int((sizes > 1e-6 * sizes[0]).sum())
        reads.append(right[:rank])
        writes.append((left[:, :rank] * sizes[:rank]).T)
        owner += [number] * rank
    ranks = torch.bincount(torch.tensor(owner)).float()
    return replace(
        components(site, torch.cat(reads), torch.cat(writes)),
        numbers=ranks * sum(site.shape),
        values=ranks,
        owner=torch.tensor(owner),
        importance=lambda inner: inner.new_ones(*inner.shape[:-1], len(shares)),
    )
