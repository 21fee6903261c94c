import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.models import drawn
from weightdecomp._ledger import Ledger, behaviour_bits, dictionary_bits, entropy, price, value_bits, wires


def test_the_parts_are_those_computed_by_hand():
    """Four inputs; at a 4 x 2 site one component on half of them, at a 1 x 3 site one of rank two always on."""
    ledger = price(
        4,
        1 / 16,
        [torch.tensor([0.5]), torch.tensor([1.0])],
        [torch.tensor([1]), torch.tensor([2])],
        [(4, 2), (1, 3)],
        divergence=math.log(2),
    )

    assert ledger.n_inputs == 4
    assert_close(ledger.naming, 4.0)  # 4 h(1/2) + 4 h(1)
    assert_close(ledger.values, 2 * 2 + 4 * 2 * 2.0)  # two bits a value at tolerance 1/16
    assert_close(ledger.dictionary, 6 * 0.5 * math.log2(3) + 2 * 4 * 0.5 * math.log2(5))
    assert_close(ledger.residual, 4.0)  # one bit an input
    assert_close(ledger.total, ledger.naming + ledger.values + ledger.dictionary + ledger.residual)
    assert_close(ledger.per_input, (4 + 20 + 4) / 4)


def test_a_component_that_is_never_active_is_free():
    with_dead = price(9, 0.1, [torch.tensor([0.2, 0.0])], [torch.tensor([1, 3])], [(5, 5)])

    assert with_dead == price(9, 0.1, [torch.tensor([0.2])], [torch.tensor([1])], [(5, 5)])


def test_one_component_that_is_always_on_is_not_free():
    dense = price(100, 0.02, [torch.tensor([1.0])], [torch.tensor([8])], [(8, 8)])
    sparse = price(100, 0.02, [torch.full((8,), 1 / 8)], [torch.ones(8, dtype=torch.long)], [(8, 8)])

    assert dense.naming == 0
    assert sparse.per_input < dense.per_input


@pytest.mark.parametrize(
    "frequency, bits", [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (0.25, 0.25 * 2 + 0.75 * math.log2(4 / 3))]
)
def test_the_entropy_of_a_gate_is_in_bits(frequency: float, bits: float):
    assert_close(float(entropy(torch.tensor(frequency).double())), bits)


def test_a_value_costs_half_the_logarithm_of_one_over_the_tolerance():
    assert_close(value_bits(0.25), 1.0)


def test_wires_count_the_coordinates_that_hold_a_share():
    vectors = torch.tensor([[0, 0, 2.0, 0], [1, -1, 1, 1], [3, 4, 0, 0], [0, 0, 0, 0]]).double()

    assert_close(wires(vectors, 0.98), torch.tensor([0.98, 3.92, 1 + (24.5 - 16) / 9, 0]).double())


@given(n=st.integers(1, 8), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
def test_wires_depend_neither_on_scale_nor_sign_nor_order(n: int, scale: float, seed: int):
    """G1."""
    vector = drawn(n, seed=seed).double()
    other = -scale * vector.flip(0)

    assert_close(wires(other, 0.98), wires(vector, 0.98))


def test_numbers_are_stored_at_the_precision_their_use_deserves():
    bits = dictionary_bits(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([10, 10, 10]), 6)

    assert_close(bits, torch.tensor([0, 10.0, 5 * math.log2(7)]))


def test_behaviour_is_priced_by_reverse_water_filling():
    """Powers 1 and 1/16: a tenth of both together, shared equally, stays below either."""
    angles = torch.arange(8).double() * math.pi / 4
    change = torch.stack([angles.cos(), angles.sin() / 4], 1) * 2**0.5

    bits = behaviour_bits(change, 0.1)

    water = 0.1 * (1 + 1 / 16) / 2
    assert_close(bits, 0.5 * math.log2(1 / water) + 0.5 * math.log2(1 / 16 / water))


def test_behaviour_below_the_water_costs_nothing():
    change = torch.diag(torch.tensor([1.0, 0.01])).double()

    bits = behaviour_bits(change, 0.25)

    # The weak direction (power 1e-4 / 2) drowns whole; the strong one is cut at what is left of the distortion.
    water = 0.25 * (1 + 1e-4) / 2 - 1e-4 / 2
    assert_close(bits, 0.5 * math.log2(0.5 / water))


@given(d=st.integers(1, 4), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_behaviour_does_not_depend_on_units_or_axes(d: int, scale: float, seed: int):
    """G1."""
    change = drawn(20, d, seed=seed)
    rotation = torch.linalg.qr(drawn(d, d, seed=seed + 1))[0]

    bits = behaviour_bits(scale * change @ rotation, 0.05)

    assert_close(bits, behaviour_bits(change, 0.05))


@pytest.mark.parametrize(
    "n_inputs, tolerance, message", [(0, 0.1, "n_inputs must be at least 1, got 0"), (5, 1.0, "got 1.0")]
)
def test_a_ledger_of_nothing_is_refused(n_inputs: int, tolerance: float, message: str):
    with pytest.raises(ValueError, match=message):
        price(n_inputs, tolerance, [], [], [])


def test_a_ledger_prints_a_line_a_part():
    text = str(Ledger(10, 20.0, 30.0, 40.0, 5.0))

    assert [line.split()[0] for line in text.splitlines()] == ["naming", "values", "dictionary", "residual", "total"]
    assert "95 bits      9.500 per input" in text
