"""Run: the model with some components ablated, in the ways that an ablation can be meant."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphs._select import Masks
from weightdecomp import Decomposition
from weightdecomp.engine import (
    Ablation,
    Batch,
    Operands,
    Part,
    Pieces,
    Record,
    Site,
    ablated_divergence,
    attacked,
    call,
    recorded,
    replaced,
    size,
)

REGIMES = ("zero", "mean", "resample", "stochastic", "adversarial")
DRAWS = 8  # of sources, and of other inputs


class Stage(NamedTuple):
    """Inputs with what the target does on them.

    Attributes:
        decomposition: The decomposition.
        pieces: Components, and remainders beyond rounding.
        batch: The inputs.
        record: What the target did on them.
        reference: Inner activations per site and call on other inputs, for mean and resampled values.
        n_reference: Number of those inputs.
        nothing: Divergence with everything ablated.
    """

    decomposition: Decomposition
    pieces: Mapping[str, Pieces]
    batch: Batch
    record: Record
    reference: Mapping[str, list[Tensor]] | None
    n_reference: int
    nothing: float


class Damage(NamedTuple):
    """One damage and how it is known; see `weightdecomp.Verification`."""

    damage: float
    divergence: float
    evidence: str
    budget: str
    error: float | None = None


@torch.no_grad()
def staged(decomposition: Decomposition, pieces: Mapping[str, Pieces], batch: Batch, reference: Batch | None) -> Stage:
    """Run the target on inputs, and on others where they are given.

    Raises:
        ValueError: If ablating everything changes nothing.
    """
    model, sites = decomposition.target, decomposition.sites
    record = recorded(model, batch, sites)
    other = None if reference is None else _inner(decomposition, pieces, recorded(model, reference, sites))
    stage = Stage(decomposition, pieces, batch, record, other, 0 if reference is None else size(reference), 1.0)
    masks = {
        site.path: [
            torch.zeros(*site.read(x, pieces[site.path].v[:1]).shape[:-1], pieces[site.path].n).to(pieces[site.path].v)
            for x in record.operands[site.path]
        ]
        for site in sites
    }
    nothing = _mean_divergence(stage, masks)
    if not nothing > 0:
        raise ValueError("ablating everything changes nothing on these inputs, so no damage can be measured")
    return stage._replace(nothing=nothing)


def _inner(decomposition: Decomposition, pieces: Mapping[str, Pieces], record: Record) -> dict[str, list[Tensor]]:
    return {
        site.path: [site.read(x, pieces[site.path].v) for x in record.operands[site.path]]
        for site in decomposition.sites
    }


def _ablation(stage: Stage) -> Ablation:
    one = stage.decomposition
    return Ablation(one.target, one.sites, stage.pieces, one.divergence, {})


def _mean_divergence(stage: Stage, masks: Masks) -> float:
    found = ablated_divergence(_ablation(stage), stage.batch, stage.record.output, masks)
    return float(found.double().mean())


def damage(stage: Stage, kept: Masks, regime: str, budget: tuple[int, int], rng: torch.Generator) -> Damage:
    """Damage with everything ablated that is not kept.

    Args:
        stage: The inputs.
        kept: 1 for what stays.
        regime: "zero", "mean" (over other inputs), "resample" (values of another input), "stochastic" (uniform sources
            for every input) or "adversarial" (the worst sources found, shared by all inputs).
        budget: Steps and restarts of the attack.
        rng: For draws.
    """
    return _REGIMES[regime](stage, kept, budget, rng)


@torch.no_grad()
def _zero(stage: Stage, kept: Masks, budget: tuple[int, int], rng: torch.Generator) -> Damage:
    found = _mean_divergence(stage, kept)
    return Damage(found / stage.nothing, found, "exact", "1 pass")


@torch.no_grad()
def _mean(stage: Stage, kept: Masks, budget: tuple[int, int], rng: torch.Generator) -> Damage:
    found = _patched(stage, kept, _others(stage, lambda inner: inner.mean(0, keepdim=True)))
    return Damage(found / stage.nothing, found, "exact", "1 pass")


@torch.no_grad()
def _resample(stage: Stage, kept: Masks, budget: tuple[int, int], rng: torch.Generator) -> Damage:
    def drawn() -> float:
        index = torch.randint(stage.n_reference, (size(stage.batch),), generator=rng, device=rng.device)
        return _patched(stage, kept, _others(stage, lambda inner: inner[index]))

    return _averaged(stage, drawn, f"{DRAWS} draws of another input each")


def _others(stage: Stage, of: Callable[[Tensor], Tensor]) -> dict[str, list[Tensor]]:
    """Values from the reference; rows that no single input owns (positions, say) are the same on all inputs."""
    assert stage.reference is not None
    n = stage.n_reference
    return {path: [of(x) if len(x) == n else x for x in calls] for path, calls in stage.reference.items()}


@torch.no_grad()
def _stochastic(stage: Stage, kept: Masks, budget: tuple[int, int], rng: torch.Generator) -> Damage:
    def drawn() -> float:
        masks = {
            path: [mask + (1 - mask) * _source(mask, stage, rng) for mask in calls] for path, calls in kept.items()
        }
        return _mean_divergence(stage, masks)

    return _averaged(stage, drawn, f"{DRAWS} draws per input")


def _source(mask: Tensor, stage: Stage, rng: torch.Generator) -> Tensor:
    """One uniform source for every input and component, the same at all positions."""
    own = mask.ndim > 1 and len(mask) == size(stage.batch)
    shape = (len(mask) if own else 1, *[1] * (mask.ndim - 2), mask.shape[-1])
    return torch.rand(shape, generator=rng, device=mask.device, dtype=mask.dtype)


def _averaged(stage: Stage, draw: Callable[[], float], budget: str) -> Damage:
    found = torch.tensor([draw() for _ in range(DRAWS)], dtype=torch.float64)
    error = float(found.std() / DRAWS**0.5) / stage.nothing
    return Damage(float(found.mean()) / stage.nothing, float(found.mean()), "estimate", budget, error)


def _adversarial(stage: Stage, kept: Masks, budget: tuple[int, int], rng: torch.Generator) -> Damage:
    steps, restarts = budget
    part = Part(stage.batch, stage.record.output, kept)
    found = float(attacked(_ablation(stage), [part], [steps], restarts, False, rng).ladder[-1, -1])
    return Damage(found / stage.nothing, found, "counterexample", f"{steps:,} steps x {restarts} restarts")


_REGIMES = {
    "zero": _zero,
    "mean": _mean,
    "resample": _resample,
    "stochastic": _stochastic,
    "adversarial": _adversarial,
}


class _Patched(NamedTuple):
    """Runs a site with the values of other inputs where nothing is kept."""

    pieces: Mapping[str, Pieces]
    kept: Masks
    other: Mapping[str, Sequence[Tensor]]

    def __call__(self, site: Site, index: int, operands: Operands) -> Any:
        own, kept = self.pieces[site.path], self.kept[site.path][index][..., self.pieces[site.path].owner]
        inner = site.read(operands, own.v) * kept + self.other[site.path][index] * (1 - kept)
        return site.write(inner @ own.u, operands)


def _patched(stage: Stage, kept: Masks, other: Mapping[str, Sequence[Tensor]]) -> float:
    one = stage.decomposition
    with replaced(one.sites, _Patched(stage.pieces, kept, other)):
        output = call(one.target, stage.batch)
    return float(one.divergence(output, stage.record.output).double().mean())
