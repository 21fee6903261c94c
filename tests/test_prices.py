"""The price of an open gate: where it is sought between attacks, and what rounds of refinement are compared by."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightdecomp import _gatekeeper, _rounds
from weightdecomp._gatekeeper import Gated, Gatekeeper, _price_of
from weightdecomp._ledger import Ledger

TOLERANCE = 0.02
AIM = _gatekeeper._SHARE * TOLERANCE


def gated(price: float, damage: float, bits: float = 100.0) -> Gated:
    return Gated({}, {}, price, damage, Ledger(1, bits, 0.0, 0.0, 0.0))


def sought(damage: Callable[[float], float], first: float, again: int) -> tuple[Gated, list[float]]:
    """What the search finds where damage is a function of the price, and the prices it tries."""
    keeper, tried = Gatekeeper.__new__(Gatekeeper), list[float]()
    keeper.tolerance = TOLERANCE

    def at(price: float) -> Gated:
        tried.append(price)
        return gated(price, damage(price))

    keeper.at = at  # type: ignore[method-assign]
    return keeper._sought(first, again), tried


@given(power=st.floats(0.5, 4), off=st.floats(0.2, 5))
def test_a_power_law_is_met_near_the_aim(power: float, off: float):
    found, tried = sought(lambda price: AIM * price**power, off, 3)

    assert found.damage <= TOLERANCE
    assert found.damage >= 0.8 * AIM or len(tried) == 4


def test_the_next_price_lies_between_those_that_did_too_little_and_too_much():
    """Not on the law through the two nearest, which here are both too high and lead below what was affordable."""
    tried = [gated(0.8, 0.003), gated(2.6, 0.059), gated(1.6, 0.039)]

    price = _price_of(AIM, tried)

    law = math.log(AIM / 0.003) / math.log(0.039 / 0.003)
    assert price == pytest.approx(0.8 * 2**law)


@pytest.mark.parametrize(("damages", "share"), [((1e-9, 1.01 * AIM), 0.8), ((0.99 * AIM, 1e9), 0.2)])
def test_a_step_in_damage_is_not_taken_for_a_law(damages: tuple[float, float], share: float):
    price = _price_of(AIM, [gated(1.0, damages[0]), gated(2.0, damages[1])])

    assert price == pytest.approx(2**share)


def test_a_little_too_much_damage_does_not_halve_the_price():
    found, tried = sought(lambda price: 0.0205 * price**1.5, 1.0, 1)

    assert len(tried) == 2
    assert found.price > 0.7


def test_a_step_is_found_below_by_halving():
    found, tried = sought(lambda price: 0.5 if price > 0.01 else 0.001, 1.0, 3)

    assert found.price <= 0.01
    down = tried[1 : 1 + next(i for i, price in enumerate(tried) if price <= 0.01)]
    assert len(down) > 1
    assert all(later <= before / 2 for before, later in pairwise(down))


def test_rounds_are_compared_at_equal_damage():
    old = gated(1, 0.0195, 100.0)

    assert _rounds._cheaper(gated(1, 0.015, 100.0), old, TOLERANCE), "as many bits at less damage are fewer"
    assert not _rounds._cheaper(gated(1, 0.0195, 99.5), old, TOLERANCE)
    assert not _rounds._cheaper(gated(1, 0.0, 150.0), old, TOLERANCE), "no damage at all does not pay for any bits"
    assert not _rounds._cheaper(gated(1, 0.021, 50.0), old, TOLERANCE), "above the tolerance nothing is cheap"
