"""The fit: components from the portfolio, and the gates that a given tolerance can afford."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._attack import Ablation, strongest
from weightdecomp._batches import Batch, select, size, tensors
from weightdecomp._config import Config
from weightdecomp._divergence import Divergence
from weightdecomp._effects import Trade, effects, excess, highest_price, opened
from weightdecomp._forward import Masks, inner_activations, masked, recorded
from weightdecomp._ledger import Ledger, price, value_bits, wires
from weightdecomp._pieces import Pieces
from weightdecomp._portfolio import Member, portfolio, turned
from weightdecomp._processes import ALONE, Processes
from weightdecomp._sample import Sample, ablated_entirely, site_rows
from weightdecomp._sites import Site
from weightdecomp._starts import Reach

_PRICES = (1e-6, 10.0)  # least and highest price that is sought, in typical effects
_ROUNDS = 10  # bisections that the accuracy of a price is worth
_SCOUT = (4, 1, 4096)  # steps, restarts and inputs of the attack inside the bisection: many inputs, as damage varies
REVIEW = (20, 3, 2048)  # and of the attack, on held-out inputs, that a result must withstand
_FALL = 0.2  # how much the fall of density says beside bits: one by e is worth as much as a fifth fewer bits
_PLAIN = 2 / 3  # work of exemplars over the best member's, each with all of the tolerance, below which they replace it
_DEARER = 1.1  # bits that a start may cost over those of singular pairs, which refinement takes further than others
_AGAIN = 3  # further prices where the first one's damage is not near the aim; twice as many until one is affordable
_LITTLE = 0.85  # share of the aim from which a damage below it is near enough
_SLOPE = 1.5  # power of the price by which damage usually rises
_SLOPES = (0.5, 4.0)  # and least and largest that are believed
_SHARE = 0.85  # share of the tolerance aimed at, so that longer attacks on other inputs still meet it


class Start(NamedTuple):
    """The start that the ledger chose for a site.

    Attributes:
        name: Which member of the portfolio.
        pieces: Its components.
        bits: Naming and values per input of the portfolio's cheapest member.
        work: Bits that every member of the portfolio moves per input, the least first.
        origin: What its frame is made from: the basis of the site's inputs, their power along it, and what is held.
    """

    name: str
    pieces: Pieces
    bits: float
    work: dict[str, float]
    origin: dict[str, Tensor]


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


@torch.no_grad()
def chosen_start(
    model: nn.Module,
    sample: Sample,
    site: Site,
    divergence: Divergence,
    tolerance: float,
    config: Config,
    share: float,
) -> Start:
    """Choose from the portfolio what does the least work per input at a damage of `share`, this site alone masked.

    Damages of sites that are masked together about add up, so that the share of each is the tolerance over their
    number. What costs the ledger clearly more bits than singular pairs is no candidate, however few wires it has.
    """
    matrix = site.matrix()
    rows, hits = site_rows(model, sample, site, divergence)
    reach = Reach(matrix, rows)
    most = max(2, int(config.capacity * min(matrix.shape)))
    sensitivity = torch.cat([calls.flatten(0, -2) for calls in sample.sensitivity[site.path]])
    members = portfolio(matrix, reach, rows, hits, sensitivity, most)
    singular = members["svd"]
    first = _spent(model, sample, site, singular.pieces, divergence, tolerance, share, None)
    members |= turned(singular.pieces, rows, first.frequency, singular.held)
    spent = {"svd": first}
    for name, one in members.items():
        if name not in spent:
            spent[name] = _spent(model, sample, site, one.pieces, divergence, tolerance, share, first.price)
    size = rows.square().mean(0).sqrt()
    work = {name: _work(members[name].pieces, size, one, tolerance) for name, one in spent.items()}
    best = _best({name: one for name, one in members.items() if spent[name].bits <= _DEARER * spent["svd"].bits}, work)
    if members[best].fall is None:

        def whole(name: str) -> float:
            one = _spent(model, sample, site, members[name].pieces, divergence, tolerance, tolerance, spent[name].price)
            return _work(members[name].pieces, size, one, tolerance)

        best = _plainer(members, best, whole)
    bits = min(one.bits for one in spent.values())
    origin = {"basis": reach.basis, "power": reach.power, "held": members[best].held}
    return Start(best, members[best].pieces, bits, dict(sorted(work.items(), key=lambda item: item[1])), origin)


def _best(members: Mapping[str, Member], work: Mapping[str, float]) -> str:
    """The member that does the least work, or of its family where that is exemplars."""
    best = min(members, key=lambda name: work[name])
    falls = {name: one.fall for name, one in members.items() if one.fall is not None}
    if best in falls:
        # Work hardly tells one exemplar more or less; where the density falls most, the mechanisms end.
        best = min(falls, key=lambda name: work[name] / falls[name] ** _FALL)
    return best


def _plainer(members: Mapping[str, Member], best: str, whole: Callable[[str], float]) -> str:
    """Exemplars that stand out where the site may do all of the damage, else the best member.

    Where inputs carry more than their mechanisms (what earlier layers leave of switched-off ones), lines that many of
    them share are dear at a small damage, since all the rest is then needed as well.
    """
    least = whole(best)
    if not least:  # which does without the site altogether
        return best
    found = {name: whole(name) for name, one in members.items() if one.fall is not None}
    if not found or min(found.values()) >= _PLAIN * least:
        return best
    return _best({name: members[name] for name in found}, found)


class _Spent(NamedTuple):
    """What one site's pieces cost at the gates that its share of the tolerance affords under zero-ablation.

    Attributes:
        frequency: Of every component.
        bits: Naming and values per input. The dictionary is left out: it is paid once, and every member of the
            portfolio stores the same weight.
        price: Divergence that one open gate on one input was worth.
    """

    frequency: Float[Tensor, " component"]
    bits: float
    price: float


def _spent(
    model: nn.Module,
    sample: Sample,
    site: Site,
    pieces: Pieces,
    divergence: Divergence,
    tolerance: float,
    share: float,
    near: float | None,
) -> _Spent:
    inner = inner_activations(sample.record, site, pieces)
    sizes = [pieces.activations(h) for h in inner]
    trade = _trade(pieces, inner, sizes, sample.sensitivity[site.path])

    def damage(price: float) -> float:
        thresholds = trade.thresholds(price)
        masks = {site.path: [opened(a, thresholds) for a in sizes]}
        output = masked(model, sample.batch, [site], {site.path: pieces}, masks)
        return float(divergence(output, sample.record.output).mean())

    low, high = trade.typical * _PRICES[0], trade.typical * _PRICES[1]
    best = highest_price(damage, share * sample.nothing, low, high, _ROUNDS, near)
    thresholds = trade.thresholds(best)
    frequency = _frequency([opened(a, thresholds) for a in sizes])
    bits = price(_n_rows(sizes), tolerance, [frequency], [pieces.ranks()], [site.shape]).per_input
    return _Spent(frequency, bits, best)


def _work(pieces: Pieces, size: Float[Tensor, " d_in"], spent: _Spent, tolerance: float) -> float:
    """Bits that active components move per input: those of names and values, and a value over every wire in and out.

    A component that reads or writes few coordinates does less. Without the wires, components that mix everything cost
    no more than ones that each do one thing.
    """
    held = 1 - tolerance
    moved = spent.frequency[pieces.owner] * (wires(pieces.v * size, held) + wires(pieces.u, held))
    return spent.bits + float(moved.sum()) * value_bits(tolerance)


def _trade(
    pieces: Pieces,
    inner: Sequence[Tensor],
    sizes: Sequence[Tensor],
    sensitivity: Sequence[Tensor],
    processes: Processes = ALONE,
) -> Trade:
    hits = [effects(h, pieces, s) for h, s in zip(inner, sensitivity, strict=True)]
    sizes, hits = ([processes.columns(x).flatten(0, -2) for x in calls] for calls in (sizes, hits))
    return Trade(torch.cat(sizes), torch.cat(hits), processes)


def _frequency(importances: Sequence[Tensor], processes: Processes = ALONE) -> Float[Tensor, " component"]:
    return processes.mean(torch.cat([g.flatten(0, -2) for g in importances]), 0)


def _n_rows(tensors_: Sequence[Tensor]) -> int:
    return sum(x[..., 0].numel() for x in tensors_)


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
        self.trades: dict[str, Trade] = {}
        with torch.no_grad():
            for site in ablation.sites:
                pieces = ablation.pieces[site.path]
                inner = inner_activations(sample.record, site, pieces)
                self.sizes[site.path] = [pieces.activations(h) for h in inner]
                sensitivity = sample.sensitivity[site.path]
                self.trades[site.path] = _trade(pieces, inner, self.sizes[site.path], sensitivity, ablation.processes)

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
        aim = _SHARE * self.tolerance
        tried = [self.at(self._affordable(aim) if near is None else near)]
        while not self._enough(aim, tried):
            price, known = _price_of(aim, tried), min(one.price for one in tried)
            # Damage that rises in steps is on no power law.
            tried.append(self.at(price if self._within(tried) else min(price, known / 2)))
        within = self._within(tried)
        return max(within, key=lambda one: one.price) if within else min(tried, key=lambda one: one.price)

    def _within(self, tried: Sequence[Gated]) -> list[Gated]:
        return [one for one in tried if one.damage <= self.tolerance]

    def _enough(self, aim: float, tried: Sequence[Gated]) -> bool:
        """Whether some damage is within the tolerance and not far below the aim, or enough prices were tried."""
        within = self._within(tried)
        if not within:
            return len(tried) > 2 * _AGAIN
        return len(tried) > _AGAIN or max(one.damage for one in within) >= _LITTLE * aim

    def at(self, price: float) -> Gated:
        """The gates of a known price, with their damage and their bits."""
        return Gated(*self._opened(price), price, self._damage(price, self.reviewed), self._ledger(price))

    def _affordable(self, limit: float) -> float:
        """The highest price at which a short attack does no more damage than the limit."""
        with torch.no_grad():
            scouted = self._attacked(self.sample.batch, _SCOUT)

        def damage(price: float) -> float:
            return self._damage(price, scouted)

        # Effects need not be in the unit of the divergence, which may be the user's own.
        typical = max(trade.typical for trade in self.trades.values())
        return highest_price(damage, limit, typical * _PRICES[0], typical * _PRICES[1], _ROUNDS)

    def _opened(self, price: float) -> tuple[dict[str, Tensor], Masks]:
        thresholds = {path: trade.thresholds(price) for path, trade in self.trades.items()}
        return thresholds, {path: [opened(a, thresholds[path]) for a in calls] for path, calls in self.sizes.items()}

    def _damage(self, price: float, on: Attacked) -> float:
        steps, restarts, _ = on.attack
        thresholds = {path: trade.thresholds(price) for path, trade in self.trades.items()}
        masks = {path: [opened(a, thresholds[path]) for a in calls] for path, calls in on.sizes.items()}
        rng = torch.Generator(device=tensors(on.batch)[0].device).manual_seed(self.seed)
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
            max(processes.total(_n_rows(calls)) for calls in importances.values()),
            self.tolerance,
            [_frequency(importances[site.path], processes) for site in sites],
            [self.ablation.pieces[site.path].ranks() for site in sites],
            [site.shape for site in sites],
            divergence,
        )


def _price_of(aim: float, tried: Sequence[Gated]) -> float:
    """Where the damage should be the aim: on the power law through the two nearest tries, or of a usual slope."""
    one, *others = sorted(tried, key=lambda one: abs(excess(one.damage, aim)))
    slope = _SLOPE
    if others and others[0].price != one.price:
        rise = excess(others[0].damage, aim) - excess(one.damage, aim)
        slope = min(max(rise / math.log(others[0].price / one.price), _SLOPES[0]), _SLOPES[1])
    return one.price * math.exp(-excess(one.damage, aim) / slope)


def frequencies(importances: Masks, processes: Processes = ALONE) -> Mapping[str, Float[Tensor, " component"]]:
    """Share of the sample's rows on which each component is active."""
    return {path: _frequency(calls, processes) for path, calls in importances.items()}
