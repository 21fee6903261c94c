"""Trades: which gates open at what price of an open gate, and the price that a damage affords."""

import math
import sys
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._processes import ALONE, Processes

_PRICES = (1e-6, 10.0)  # least and highest price that is sought, in typical effects
_ROUNDS = 10  # bisections that the accuracy of a price is worth
_NONE = 1e-9  # share of the limit that stands in for no damage at all; its inverse for the worst there is
_LEAST = 1e-3  # least effect of a typical contribution, relative to a typical effect, so that none is free to close


class Trade:
    """Every way to close gates by a threshold on each arm, with its damage and its savings.

    Built once from activations and effects; `thresholds(price)` then is the exact minimiser, per component and arm, of
    (effects where closed) + price x (inputs where open), by running sums over sorted activations. Of several
    processes each does so for the components that it was given, and has the thresholds of all.
    """

    def __init__(
        self,
        activations: Float[Tensor, "row component"],
        effects: Float[Tensor, "row component"],
        processes: Processes = ALONE,
    ) -> None:
        """Sort both arms.

        Where what follows is off along the whole path, the estimated effect is 0; a small share of the contribution's
        square stands in for it, so that at low prices every gate opens.
        """
        power = activations.square()
        effect, size = processes.sums([effects.sum(1).mean(), power.sum(1).mean()])
        self.typical = float(effect) + 1e-30
        self._processes = processes
        effects = effects + _LEAST * self.typical / float(size + 1e-30) * power
        self._arms = []
        for sign in (1, -1):
            a, order = (sign * activations).clamp_min(0).sort(0)
            e = effects.gather(0, order).where(a > 0, 0)
            closed = torch.cat([torch.zeros_like(e[:1]), e.cumsum(0)])
            opened = torch.cat([(a > 0).flip(0).cumsum(0).flip(0), torch.zeros_like(order[:1])])
            # Of equal costs argmin takes the first, which in this order is the highest threshold.
            self._arms.append((a, closed.flip(0), opened.flip(0).to(a.dtype)))

    def thresholds(self, price: float) -> Float[Tensor, "arm=2 component"]:
        """The cheapest thresholds when an open gate on one input is worth `price` of divergence."""
        arms = []
        for a, closed, opened in self._arms:
            first_open = len(a) - torch.add(closed, opened, alpha=price).argmin(0, keepdim=True)
            below = a.gather(0, (first_open - 1).clamp_min(0)).where(first_open > 0, 0)
            above = a.gather(0, first_open.clamp_max(len(a) - 1))
            # An arm that never opens on the sample stays shut a little beyond the largest activation seen.
            arms.append(torch.where(first_open < len(a), (below + above) / 2, 1.05 * above + 1e-12)[0])
        return self._processes.rows(torch.stack(arms, 1)).T.contiguous()


def traded(sizes: Sequence[Tensor], hits: Sequence[Tensor], processes: Processes = ALONE) -> Trade:
    """The trade of a site's components over all calls and, of several processes, over the inputs of all."""
    sizes, hits = ([processes.columns(x).flatten(0, -2) for x in calls] for calls in (sizes, hits))
    return Trade(torch.cat(sizes), torch.cat(hits), processes)


def opened(
    activations: Float[Tensor, "*batch component"], thresholds: Float[Tensor, "arm=2 component"]
) -> Float[Tensor, "*batch component"]:
    """Importance 1 where an activation is beyond its arm's threshold, else 0."""
    return ((activations > thresholds[0]) | (-activations > thresholds[1])).to(activations.dtype)


def affordable(damage: Callable[[float], float], limit: float, typical: float, near: float | None = None) -> float:
    """The highest price at which the damage stays within the limit, sought in units of a typical effect.

    Effects need not be in the unit of the divergence, which may be the user's own.
    """
    return highest_price(damage, limit, typical * _PRICES[0], typical * _PRICES[1], _ROUNDS, near)


def highest_price(
    damage: Callable[[float], float], limit: float, low: float, high: float, rounds: int, near: float | None = None
) -> float:
    """The highest price at which the damage stays within the limit, as closely as so many bisections find it.

    Damage often rises about as a power of the price, so that a secant between logarithms saves half of the bisections;
    where it rises in steps, the search needs one or two more.

    Args:
        damage: At a price, rising with it.
        limit: Largest damage to accept.
        low: Least price, which is the answer where no damage is within the limit.
        high: Largest price.
        rounds: Bisections of the logarithm that set the accuracy.
        near: A first guess.

    Source:
        Oliveira and Takahashi 2020, "An enhancement of the bisection method average performance" (ITP).
    """
    low, high = math.log(low), math.log(high)
    fine = (high - low) / 2**rounds
    at = (low + high) / 2 if near is None else math.log(near)
    below: float | None = None
    above: float | None = None
    reach, left = 1.0, 0.0
    while high - low > fine:
        at = min(max(at, low + fine / 2), high - fine / 2)
        over = excess(damage(math.exp(at)), limit)
        if over <= 0:
            low, below = at, over
        else:
            high, above = at, over
        if below is None or above is None:
            at, reach = at - reach * over - math.copysign(fine, over), 2 * reach
            left = high - low  # twice the half width that the next step may leave
        else:
            at, left = _itp(low, high, below, above, left, fine), left / 2
    return math.exp(low)


def excess(damage: float, limit: float) -> float:
    """Logarithm of a damage over its limit; what is infinite or undefined counts as the worst there is."""
    share = damage / max(limit, sys.float_info.min)
    return math.log(max(share, _NONE) if share < 1 / _NONE else 1 / _NONE)


def _itp(low: float, high: float, below: float, above: float, left: float, fine: float) -> float:
    """The next point between two ends: the secant's, moved towards the middle so that bisection is never far better."""
    middle, secant = (low + high) / 2, low + (high - low) * below / (below - above)
    towards = math.copysign(1.0, middle - secant)
    point = secant + towards * min(0.45 * fine, abs(middle - secant))  # so that two points may enclose the answer
    most = max(left - (high - low) / 2, 0.0)
    return point if abs(point - middle) <= most else middle - towards * most


def frequency(importances: Sequence[Tensor], processes: Processes = ALONE) -> Float[Tensor, " component"]:
    """Mean importance of every component over all calls and rows."""
    return processes.mean(torch.cat([g.flatten(0, -2) for g in importances]), 0)


def n_rows(calls: Sequence[Tensor]) -> int:
    """Rows of all calls."""
    return sum(x[..., 0].numel() for x in calls)
