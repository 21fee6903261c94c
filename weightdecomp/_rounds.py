"""Rounds: refinement in rounds, each kept only if the ledger got smaller at the same tolerance."""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch

from weightdecomp._attack import Ablation
from weightdecomp._batches import Batch, select, size, tensors
from weightdecomp._checkpoint import Checkpoint
from weightdecomp._config import Config
from weightdecomp._frame import Frame
from weightdecomp._gatekeeper import Gated, Gatekeeper
from weightdecomp._pieces import Pieces
from weightdecomp._progress import Progress
from weightdecomp._refine import Refiner
from weightdecomp._sample import Sample
from weightdecomp._sharded import stored

_BETTER = 0.99  # a round must save at least one bit in a hundred to be kept
_YIELD = 0.15  # power of the damage by which bits fall; .12 to .17 over prices in the digits
_LEAST = 0.1  # share of the tolerance below which less damage counts as nothing more
_PATIENCE = 2  # rounds in a row that may fail before refinement ends
_FEWEST = 8  # inputs of many rows in a step: four for each source of the adversary's pool


class Refined(NamedTuple):
    """Components and gates after the rounds that were kept.

    Attributes:
        ablation: With the refined components.
        gated: Their gates.
        steps: Steps that were kept.
    """

    ablation: Ablation
    gated: Gated
    steps: int


def refined(
    ablation: Ablation,
    frames: Mapping[str, Frame],
    gated: Gated | None,
    sample: Sample,
    tolerance: float,
    config: Config,
    seed: int,
    bar: Progress,
    saved: Checkpoint,
) -> Refined:
    """Open the gates, refine in rounds until they no longer pay, and harden the gates of the cheapest round.

    Args:
        ablation: The starts.
        frames: Where their components may move.
        gated: Gates of the starts, where they were opened already.
        sample: Inputs.
        tolerance: Of damage.
        config: Settings.
        seed: Of what is drawn.
        bar: To show.
        saved: Progress of an earlier part of the run.
    """
    known = saved.document
    kept = ablation._replace(pieces=_loaded(saved, "best|", ablation)) if known.get("kept_steps") else ablation
    near = known.get("near")  # where the best round's price was sought, so that a resumed run finds the same
    if gated is None or kept is not ablation:
        gated = Gatekeeper(kept, sample, tolerance, seed).gates(near)
    best = Refined(kept, gated, known.get("kept_steps", 0))
    rng = torch.Generator(device=tensors(sample.batch)[0].device).manual_seed(seed + 1)
    refiner = Refiner(ablation, frames, sample.nothing, config, rng)
    thresholds, price = best.gated.thresholds, best.gated.price
    first, failed = known.get("step", 0), known.get("failed", 0)
    if first:
        refiner.restore(saved.under("refiner|"))
        thresholds, price = _on_device(saved.under("gates|"), thresholds), known["price"]
    if known.get("finished") or not refiner.factors:
        first = config.steps
    saved.forget()
    bar.now("refining", first)
    per_round = max(1, math.ceil(config.steps / config.rounds))
    inputs = _per_step(config.batch, sample.rows_per_input, ablation.processes.n)
    for step in range(first, config.steps):
        terms = refiner.step(_drawn(sample.batches, inputs, rng), thresholds, step, price / sample.nothing)
        bar.step(step, terms.as_dict())
        if (step + 1) % per_round == 0 or step + 1 == config.steps:
            trial = ablation._replace(pieces=refiner.detached())
            gated = Gatekeeper(trial, sample, tolerance, seed).gates(near=best.gated.price)
            thresholds, price, failed = gated.thresholds, gated.price, failed + 1
            if _cheaper(gated, best.gated, tolerance):
                near, best, failed = best.gated.price, Refined(trial, gated, step + 1), 0
            if failed == _PATIENCE:
                break
        # One write for all that a step changed: a run resumed between two would mix two steps.
        gates = {f"gates|{path}": x for path, x in thresholds.items()}
        known = {"step": step + 1, "kept_steps": best.steps, "failed": failed, "price": price, "near": near}
        saved.keep(gates, known, state=partial(_state, best, refiner))
    saved.keep({}, {"finished": True}, now=True, state=partial(_state, best, refiner))
    bar.now("hardening")
    return best._replace(gated=Gatekeeper(best.ablation, sample, tolerance, seed).hardened(best.gated))


def _state(best: Refined, refiner: Refiner) -> dict[str, torch.Tensor]:
    """What is too large to hand over at every step."""
    found = _tensors("best|", best.ablation.pieces) if best.steps else {}
    return found | {f"refiner|{name}": x for name, x in refiner.state().items()}


def _on_device(found: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {path: found[path].to(x.device) for path, x in like.items()}


def _cheaper(new: Gated, old: Gated, tolerance: float) -> bool:
    if new.damage > tolerance >= old.damage:
        return False
    return _at_tolerance(new, tolerance) < _BETTER * _at_tolerance(old, tolerance)


def _at_tolerance(gated: Gated, tolerance: float) -> float:
    """Bits per input as they would be if the damage were the tolerance: what is left unused by chance is no cost."""
    floor = _LEAST * tolerance  # damage that is none at all would make bits none as well
    return gated.ledger.per_input * (max(gated.damage, floor) / tolerance) ** _YIELD


def _per_step(rows: int, per_input: int, processes: int) -> int:
    """Inputs in a step of so many rows, at least a few and one for each process."""
    return max(rows // per_input, min(rows, max(_FEWEST, processes)))


def _drawn(batches: list[Batch], n: int, rng: torch.Generator) -> Batch:
    """Random inputs of one batch."""
    pick = int(torch.randint(len(batches), (1,), generator=rng, device=rng.device)) if len(batches) > 1 else 0
    index = torch.randint(size(batches[pick]), (n,), generator=rng, device=rng.device)
    return select(batches[pick], index)


def _tensors(prefix: str, pieces: Mapping[str, Pieces]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{path}|{name}": x for path, own in pieces.items() for name, x in own._asdict().items()}


def _loaded(saved: Checkpoint, prefix: str, ablation: Ablation) -> Mapping[str, Pieces]:
    found, device = saved.under(prefix), ablation.sites[0].weight.device
    every = ((path, [found[f"{path}|{name}"].to(device) for name in Pieces._fields]) for path in ablation.pieces)
    return stored(((path, Pieces(*one)) for path, one in every), ablation.processes)
