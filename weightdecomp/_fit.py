"""The fit of one site: the start that does the least work among the portfolio's."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._config import Config
from weightdecomp._divergence import Divergence
from weightdecomp._effects import alone
from weightdecomp._forward import inner_activations, masked
from weightdecomp._ledger import price, value_bits, wires
from weightdecomp._pieces import Pieces
from weightdecomp._portfolio import READINGS, Member, portfolio, turned
from weightdecomp._sample import Sample, site_rows
from weightdecomp._sites import Site
from weightdecomp._starts import Reach
from weightdecomp._trade import affordable, frequency, n_rows, opened, traded
from weightdecomp._upstream import Upstream

_FALL = 0.2  # how much the fall of density says beside bits: one by e is worth as much as a fifth fewer bits
_PLAIN = 2 / 3  # work of exemplars over the best member's, each with all of the tolerance, below which they replace it
_HARDER = 1.1  # work that readings may do over that of the start they would replace
_DEARER = 1.1  # bits that a start may cost over those of singular pairs, which refinement takes further than others


class Start(NamedTuple):
    """The start that the ledger chose for a site.

    Attributes:
        name: Which member of the portfolio.
        pieces: Its components.
        bits: Naming and values per input of the portfolio's cheapest member.
        work: Bits that every member of the portfolio moves per input, the least first.
        origin: What its frame is made from: the basis of the site's inputs, their power along it, and what is held.
        readings: Of a site whose readings do little more work, their components and what is held of them.
        gain: Bits per input that these cost less than the chosen start, this site alone masked.
    """

    name: str
    pieces: Pieces
    bits: float
    work: dict[str, float]
    origin: dict[str, Tensor]
    readings: tuple[Pieces, Tensor] | None
    gain: float

    def read(self) -> "Start":
        """The same site with its readings in place of the chosen start."""
        assert self.readings is not None
        pieces, held = self.readings
        return self._replace(name=READINGS, pieces=pieces, origin={**self.origin, "held": held}, readings=None)


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
    Readings are none either: whether they are worth it shows at all sites together.
    """
    known = priced(model, sample, site, divergence, tolerance, config, share)
    reach, members, spent, size, upstream = known
    work = {name: _work(members[name].pieces, size, one, tolerance) for name, one in spent.items()}
    candidates = {name: one for name, one in members.items() if spent[name].bits <= _DEARER * spent["svd"].bits}
    candidates.pop(READINGS, None)
    best = _best(candidates, work)
    if members[best].fall is None:

        def whole(name: str) -> float:
            pieces, near = members[name].pieces, spent[name].price
            one = _spent(sample, upstream, pieces, divergence, tolerance, tolerance, near)
            return _work(pieces, size, one, tolerance)

        best = _plainer(members, best, whole)
    origin = {"basis": reach.basis, "power": reach.power, "held": members[best].held}
    ordered = dict(sorted(work.items(), key=lambda item: item[1]))
    near = work.get(READINGS, math.inf) <= _HARDER * work[best]
    readings = (members[READINGS].pieces, members[READINGS].held) if near else None
    gain = spent[best].bits - spent[READINGS].bits if near else 0.0
    return Start(best, members[best].pieces, known.bits, ordered, origin, readings, gain)


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


class Priced(NamedTuple):
    """The portfolio of a site with what each member costs.

    Attributes:
        reach: The span of the site's inputs.
        members: By name.
        spent: By name, singular pairs first.
        size: Root mean square of the inputs.
        upstream: Of the site, on the sample.
    """

    reach: Reach
    members: dict[str, Member]
    spent: dict[str, _Spent]
    size: Float[Tensor, " d_in"]
    upstream: Upstream

    @property
    def bits(self) -> float:
        """Naming and values per input of the cheapest member."""
        return min(one.bits for one in self.spent.values())


@torch.no_grad()
def priced(
    model: nn.Module,
    sample: Sample,
    site: Site,
    divergence: Divergence,
    tolerance: float,
    config: Config,
    share: float,
) -> Priced:
    """Make the portfolio of a site, and price every member at a damage of `share`, this site alone masked."""
    matrix = site.matrix()
    rows, hits = site_rows(model, sample, site, divergence)
    reach = Reach(matrix, rows)
    most = max(2, int(config.capacity * min(matrix.shape)))
    sensitivity = torch.cat([calls.flatten(0, -2) for calls in sample.sensitivity[site.path]])
    members = portfolio(matrix, reach, rows, hits, sensitivity, most)
    upstream = Upstream(model, sample.batch, site)
    singular = members["svd"]
    first = _spent(sample, upstream, singular.pieces, divergence, tolerance, share, None)
    members |= turned(singular.pieces, rows, first.frequency, singular.held)
    spent = {"svd": first}
    for name, one in members.items():
        if name not in spent:
            spent[name] = _spent(sample, upstream, one.pieces, divergence, tolerance, share, first.price)
    return Priced(reach, members, spent, rows.square().mean(0).sqrt(), upstream)


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


def _spent(
    sample: Sample,
    upstream: Upstream,
    pieces: Pieces,
    divergence: Divergence,
    tolerance: float,
    share: float,
    near: float | None,
) -> _Spent:
    site = upstream.site
    inner = inner_activations(sample.record, site, pieces)
    sizes = [pieces.activations(h) for h in inner]
    trade = traded(sizes, alone(pieces, inner, sample.sensitivity[site.path]))

    def damage(price: float) -> float:
        thresholds = trade.thresholds(price)
        masks = {site.path: [opened(a, thresholds) for a in sizes]}
        with upstream.kept():
            output = masked(upstream.model, upstream.batch, [site], {site.path: pieces}, masks)
        return float(divergence(output, sample.record.output).mean())

    best = affordable(damage, share * sample.nothing, trade.typical, near)
    thresholds = trade.thresholds(best)
    used = frequency([opened(a, thresholds) for a in sizes])
    bits = price(n_rows(sizes), tolerance, [used], [pieces.ranks()], [site.shape]).per_input
    return _Spent(used, bits, best)


def _work(pieces: Pieces, size: Float[Tensor, " d_in"], spent: _Spent, tolerance: float) -> float:
    """Bits that active components move per input: those of names and values, and a value over every wire in and out.

    A component that reads or writes few coordinates does less. Without the wires, components that mix everything cost
    no more than ones that each do one thing.
    """
    held = 1 - tolerance
    moved = spent.frequency[pieces.owner] * (wires(pieces.v * size, held) + wires(pieces.u, held))
    return spent.bits + float(moved.sum()) * value_bits(tolerance)
