"""Curve: damage against the number active, while all thresholds of a decomposition move together."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from weightdecomp._batches import Batch
from weightdecomp._decomposition import Decomposition
from weightdecomp._regimes import Figure, frequencies, ladder, rounded, stochastic
from weightdecomp._verify import _trial

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_INPUTS = 256
_STEPS, _RESTARTS = 20, 3


class Point(NamedTuple):
    """A decomposition with its thresholds scaled.

    Attributes:
        factor: Of all thresholds; 1 is the decomposition itself.
        active: Mean number active per row, summed over sites.
        gates: Damage with the gates as masks.
        stochastic: Damage under uniform sources.
        adversarial: Damage found by attack, sources shared across the inputs.
    """

    factor: float
    active: float
    gates: Figure
    stochastic: Figure
    adversarial: Figure


def curve(
    decomposition: Decomposition, batches: Iterable[Batch], *, factors: Sequence[float] = FACTORS, seed: int = 0
) -> list[Point]:
    """Damage at fewer and at more active components than the gates' own: on at most 256 inputs, 20 attack steps.

    Raises:
        ValueError: For bad batches, or inputs on which ablating everything changes nothing.
    """
    kept = decomposition.read(batches)
    return [_point(decomposition, kept, factor, seed) for factor in factors]


def _point(decomposition: Decomposition, batches: Sequence[Batch], factor: float, seed: int) -> Point:
    trial = _trial(_scaled(decomposition, factor), batches, _INPUTS, _RESTARTS)
    rng = torch.Generator(device=next(decomposition.target.parameters()).device).manual_seed(seed)
    active = sum(float(frequency.sum()) for frequency, _ in frequencies(trial).values())
    found = ladder(trial, [_STEPS], _RESTARTS, False, rng)
    return Point(factor, active, rounded(trial), stochastic(trial, rng), found.at(_STEPS))


def _scaled(decomposition: Decomposition, factor: float) -> Decomposition:
    """The same components with all thresholds multiplied."""
    own = decomposition
    parts = {path: replace(one, thresholds=one.thresholds * factor) for path, one in own.parts.items()}
    return Decomposition(
        own.target,
        own.sites,
        own.skipped,
        parts,
        own.divergence,
        own.tolerance,
        own.config,
        own.outcome,
        own.groups,
        own.group_frequencies,
    )
