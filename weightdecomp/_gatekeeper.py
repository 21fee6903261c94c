"""The gatekeeper: gates at the highest price of an open one that the tolerance can afford under attack."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._attack import Ablation, Part, attacked, strongest
from weightdecomp._batches import Batch, select, size, tensors
from weightdecomp._blame import blamed
from weightdecomp._effects import alone
from weightdecomp._forward import Masks, inner_activations, masked, recorded
from weightdecomp._ledger import Ledger, price
from weightdecomp._processes import ALONE, Processes
from weightdecomp._sample import Sample, ablated_entirely
from weightdecomp._trade import Trade, affordable, excess, frequency, n_rows, opened, traded

_SCOUT = (4, 1, 4096)  # steps, restarts and inputs of the attack inside the bisection: many inputs, as damage varies
_PLAY = (20, 2)  # steps and restarts of each attack whose blame gates are chosen by
_PLAYS = 3  # such attacks, each on the gates that those before have led to
REVIEW = (20, 3, 2048)  # and of the attack, on held-out inputs, that a result must withstand
_LONG = 4  # times as many steps that gates must withstand which hardening would make much dearer,
_INSURANCE = 1.2  # which is by so many times the bits
_AGAIN = 3  # further prices where the first one's damage is not near the aim; twice as many until one is affordable
_NEAR = 1  # the same between rounds of refinement, after which components move on and no price lasts,
_LAST = 5  # and for gates that stay
_LITTLE = 0.85  # share of the aim from which a damage below it is near enough
_SLOPE = 1.5  # power of the price by which damage usually rises
_SLOPES = (0.5, 4.0)  # and least and largest that are believed
_MARGIN = 0.2  # share of the way between two prices that the next one keeps from either
_SHARE = 0.7  # share of the tolerance aimed at, so that longer attacks on other inputs still meet it


Hits = dict[str, list[Tensor]]  # per site and call, divergence per input and component, in the shape of importances


class Gated(NamedTuple):
    """Gates of all sites and what they cost.

    Attributes:
        thresholds: Per site, where each arm opens.
        importances: On the sample.
        price: Divergence that one open gate on one input was worth.
        damage: Adversarial damage under the run's own review attack.
        ledger: Bits of the sample.
    """

    thresholds: dict[str, Float[Tensor, "arm=2 component"]]
    importances: Masks
    price: float
    damage: float
    ledger: Ledger


class Attacked(NamedTuple):
    """Inputs of an attack: the target's output, every component's contributions, and what a damage of 1 is there."""

    batch: Batch
    target: Any
    sizes: dict[str, list[Tensor]]
    nothing: float
    attack: tuple[int, int, int]


class Gatekeeper:
    """Finds the highest price of an open gate at which the adversarial damage still meets the tolerance."""

    def __init__(self, ablation: Ablation, sample: Sample, tolerance: float, seed: int) -> None:
        """Compute every component's activations and effects on the sample."""
        self.ablation, self.sample, self.tolerance, self.seed = ablation, sample, tolerance, seed
        with torch.no_grad():
            self.reviewed = self._attacked(sample.held, REVIEW)
        self.sizes: dict[str, list[Tensor]] = {}
        self.alone: Hits = {}
        with torch.no_grad():
            for site in ablation.sites:
                pieces = ablation.pieces[site.path]
                inner = inner_activations(sample.record, site, pieces)
                self.sizes[site.path] = [pieces.activations(h) for h in inner]
                self.alone[site.path] = alone(pieces, inner, sample.sensitivity[site.path])
        self.trades = self._trades(self.alone)

    def _trades(self, hits: Hits) -> dict[str, Trade]:
        processes = self.ablation.processes
        return {path: traded(self.sizes[path], calls, processes) for path, calls in hits.items()}

    def _attacked(self, batch: Batch, attack: tuple[int, int, int]) -> Attacked:
        """The inputs that one of the attacks uses, with the target's output and the contributions on them."""
        processes = self.ablation.processes
        first = processes.count(min(attack[2], processes.total(size(batch))))
        index = torch.arange(first, device=tensors(batch)[0].device)
        record = recorded(self.ablation.model, select(batch, index), self.ablation.sites)
        sizes = {}
        for site in self.ablation.sites:
            pieces = self.ablation.pieces[site.path]
            sizes[site.path] = [pieces.activations(h) for h in inner_activations(record, site, pieces)]
        nothing = ablated_entirely(
            self.ablation.model, select(batch, index), self.ablation.sites, self.ablation.divergence, record.output
        )
        # Few inputs may be ones on which nothing matters; damage is then a share of what it is on the others.
        scale = float(processes.mean(nothing)) or self.sample.nothing
        return Attacked(select(batch, index), record.output, sizes, scale, attack)

    def gates(self, near: float | None = None) -> Gated:
        """Seek the price at which the damage under a longer attack on held-out inputs is near what is aimed at.

        Args:
            near: A price of similar components, to begin at; None begins where a short attack does the damage.
        """
        if near is None:
            return self._sought(self._affordable(_SHARE * self.tolerance), _AGAIN)
        return self._sought(near, _NEAR)

    def hardened(self, found: Gated) -> Gated:
        """Gates that hold against attacks on these ones, unless such gates only exceed the tolerance.

        Components then count half for what they do alone, half for the most that an attack blames on them. Alone, each
        may do little where many together, as an adversary chooses them, set off what was to stay off. Where that costs
        many bits and the gates as they were hold against a long attack, they stay.
        """
        self._harden(found.price)
        other = self._sought(found.price, _LAST)
        if other.damage > self.tolerance >= found.damage:
            return found
        dear = other.ledger.per_input > _INSURANCE * found.ledger.per_input
        return found if dear and self._holds(found) else other

    def _holds(self, found: Gated) -> bool:
        """Whether the damage of a longer attack than the review, from other sources, is not above the aim."""
        steps, restarts, inputs = REVIEW
        on = self.reviewed._replace(attack=(_LONG * steps, restarts, inputs))
        return self._done(found.thresholds, on, self.seed + 1) <= _SHARE * self.tolerance

    def _sought(self, first: float, again: int) -> Gated:
        aim = _SHARE * self.tolerance
        tried = [self.at(first)]
        while not self._enough(aim, tried, again):
            price, known = _price_of(aim, tried), min(one.price for one in tried)
            # Damage that rises in steps is on no power law, and then smaller steps may never end.
            tried.append(self.at(price if self._within(tried) or len(tried) == 1 else min(price, known / 2)))
        within = self._within(tried)
        return max(within, key=lambda one: one.price) if within else min(tried, key=lambda one: one.price)

    def _harden(self, price: float) -> None:
        rng = torch.Generator(device=tensors(self.sample.batch)[0].device).manual_seed(self.seed)
        (steps, restarts), sources = _PLAY, None
        worst = _combined(lambda x, _: torch.zeros_like(x), self.alone, self.alone)
        for _ in range(_PLAYS):
            with torch.no_grad():
                part = Part(self.sample.batch, self.sample.record.output, self._opened(price)[1])
            sources = attacked(self.ablation, [part], [steps], restarts, False, rng, begin=sources).sources
            worst = _combined(torch.maximum, worst, blamed(self.ablation, part, sources))
            self.trades = self._trades(_combined(lambda x, y: (x + y) / 2, self.alone, worst))

    def _within(self, tried: Sequence[Gated]) -> list[Gated]:
        return [one for one in tried if one.damage <= self.tolerance]

    def _enough(self, aim: float, tried: Sequence[Gated], again: int) -> bool:
        """Whether some damage is within the tolerance and not far below the aim, or enough prices were tried."""
        within = self._within(tried)
        if not within:
            return len(tried) > 2 * again
        return len(tried) > again or max(one.damage for one in within) >= _LITTLE * aim

    def at(self, price: float) -> Gated:
        """The gates of a known price, with their damage and their bits."""
        return Gated(*self._opened(price), price, self._damage(price, self.reviewed), self._ledger(price))

    def _affordable(self, limit: float) -> float:
        """The highest price at which a short attack does no more damage than the limit."""
        with torch.no_grad():
            scouted = self._attacked(self.sample.batch, _SCOUT)

        def damage(price: float) -> float:
            return self._damage(price, scouted)

        return affordable(damage, limit, max(trade.typical for trade in self.trades.values()))

    def _opened(self, price: float) -> tuple[dict[str, Tensor], Masks]:
        thresholds = {path: trade.thresholds(price) for path, trade in self.trades.items()}
        return thresholds, {path: [opened(a, thresholds[path]) for a in calls] for path, calls in self.sizes.items()}

    def _damage(self, price: float, on: Attacked) -> float:
        return self._done({path: trade.thresholds(price) for path, trade in self.trades.items()}, on, self.seed)

    def _done(self, thresholds: Mapping[str, Tensor], on: Attacked, seed: int) -> float:
        """The damage that an attack does to gates."""
        steps, restarts, _ = on.attack
        masks = {path: [opened(a, thresholds[path]) for a in calls] for path, calls in on.sizes.items()}
        rng = torch.Generator(device=tensors(on.batch)[0].device).manual_seed(seed)
        found = strongest(self.ablation, on.batch, on.target, masks, [steps], restarts, False, rng)
        return float(found.max()) / on.nothing

    def _ledger(self, best: float) -> Ledger:
        importances = self._opened(best)[1]
        sites, processes = self.ablation.sites, self.ablation.processes
        masks = {path: [g + (1 - g) / 2 for g in calls] for path, calls in importances.items()}
        with torch.no_grad():
            output = masked(self.ablation.model, self.sample.batch, sites, self.ablation.pieces, masks)
            divergence = float(processes.mean(self.ablation.divergence(output, self.sample.record.output)))
        return price(
            max(processes.total(n_rows(calls)) for calls in importances.values()),
            self.tolerance,
            [frequency(importances[site.path], processes) for site in sites],
            [self.ablation.pieces[site.path].ranks() for site in sites],
            [site.shape for site in sites],
            divergence,
        )


def _combined(two: Callable[[Tensor, Tensor], Tensor], one: Hits, other: Hits) -> Hits:
    return {path: [two(x, y) for x, y in zip(calls, other[path], strict=True)] for path, calls in one.items()}


def _price_of(aim: float, tried: Sequence[Gated]) -> float:
    """Where the damage should be the aim: between tries on either side of it, else on a power law beyond them all."""
    ascending = sorted(tried, key=lambda one: one.price)
    first = next((i for i, one in enumerate(ascending) if excess(one.damage, aim) > 0), 0)
    if first:
        return _between(aim, ascending[first - 1], ascending[first])
    one, *others = sorted(tried, key=lambda one: abs(excess(one.damage, aim)))
    slope = _SLOPE
    if others and others[0].price != one.price:
        rise = excess(others[0].damage, aim) - excess(one.damage, aim)
        slope = min(max(rise / math.log(others[0].price / one.price), _SLOPES[0]), _SLOPES[1])
    return one.price * math.exp(-excess(one.damage, aim) / slope)


def _between(aim: float, below: Gated, above: Gated) -> float:
    """On the power law through both, but off either end, as damage may rise in a step."""
    low, high = excess(below.damage, aim), excess(above.damage, aim)
    share = min(max(low / (low - high), _MARGIN), 1 - _MARGIN)
    return below.price * (above.price / below.price) ** share


def frequencies(importances: Masks, processes: Processes = ALONE) -> Mapping[str, Float[Tensor, " component"]]:
    """Share of the sample's rows on which each component is active."""
    return {path: frequency(calls, processes) for path, calls in importances.items()}
