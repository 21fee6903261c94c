import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import weightdecomp as wd
from weightdecomp._circuits import Groups, activity, grouped

SHAPES = {"a": (4, 4), "b": (4, 4)}


def groups_of(a: Tensor, b: Tensor, tolerance: float = 0.02) -> Groups:
    """Groups of rank-one components of two sites, given on which inputs they are active."""
    on = {"a": a.bool(), "b": b.bool()}
    return grouped(on, {path: torch.ones(x.shape[1], dtype=torch.long) for path, x in on.items()}, SHAPES, tolerance)


def coins(n: int, k: int, frequency: float, seed: int) -> Tensor:
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < frequency


def test_components_that_always_act_together_are_one_circuit_across_sites():
    pattern = coins(400, 2, 0.1, seed=0)

    groups = groups_of(pattern, pattern)

    assert sorted(map(sorted, groups.members)) == [[("a", 0), ("b", 0)], [("a", 1), ("b", 1)]]
    assert_close(sorted(groups.frequencies), sorted(pattern.double().mean(0).tolist()))


@pytest.mark.parametrize("frequency", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_independent_components_are_never_merged(seed: int, frequency: float):
    groups = groups_of(coins(1000, 4, frequency, seed), coins(1000, 4, frequency, seed + 100))

    assert [len(members) for members in groups.members] == [1] * 8


def test_components_that_nearly_always_act_together_are_merged():
    """A merge pays for the inputs on which one member is active for nothing, and here saves more."""
    pattern = coins(1000, 1, 0.2, seed=0)
    other = pattern.clone()
    other[pattern.nonzero()[:4, 0]] = False

    groups = groups_of(pattern, other)

    assert groups.members == [[("a", 0), ("b", 0)]]


def test_a_component_inside_another_ones_inputs_stays_apart_where_that_is_cheaper():
    pattern = torch.arange(1000)[:, None] < 500

    groups = groups_of(pattern, torch.arange(1000)[:, None] < 20)

    assert groups.members == [[("a", 0)], [("b", 0)]]


def test_a_merge_that_saves_bits_is_found_by_trying_all_partitions_of_three():
    """Reference: the ledger of every partition, written out."""
    on = coins(300, 3, 0.3, seed=1)
    on[:, 1] = on[:, 0]
    groups = grouped({"a": on}, {"a": torch.ones(3, dtype=torch.long)}, {"a": (4, 4)}, 0.02)

    def bits(members: list[int]) -> float:
        f = float(on[:, members].any(1).double().mean())
        h = -f * torch.tensor(f).log2() - (1 - f) * torch.tensor(1 - f).log2()
        value = 0.5 * torch.tensor(50.0).log2()
        dictionary = 8 * len(members) * 0.5 * torch.tensor(1 + 300 * f).log2() / 300
        return float(h + f * len(members) * value + dictionary)

    partitions = [[[0], [1], [2]], [[0, 1], [2]], [[0, 2], [1]], [[1, 2], [0]], [[0, 1, 2]]]
    best = min(partitions, key=lambda partition: sum(map(bits, partition)))
    found = [[index for _, index in members] for members in groups.members]
    assert sorted(found) == sorted(best) == [[0, 1], [2]]


@given(n=st.integers(1, 5), m=st.integers(1, 5), rows=st.integers(1, 30), seed=st.integers(0, 2**16))
@settings(max_examples=40)
def test_groups_partition_all_components(n: int, m: int, rows: int, seed: int):
    a, b = coins(rows, n, 0.3, seed), coins(rows, m, 0.3, seed + 1)

    groups = groups_of(a, b)

    members = [member for group in groups.members for member in group]
    assert sorted(members) == [("a", i) for i in range(n)] + [("b", i) for i in range(m)]
    assert len(groups.frequencies) == len(groups.members)
    for group, frequency in zip(groups.members, groups.frequencies, strict=True):
        on = torch.stack([{"a": a, "b": b}[path][:, index] for path, index in group]).any(0)
        assert_close(frequency, float(on.double().mean()))


def test_groups_come_in_order_of_frequency_with_the_dead_last():
    a = torch.stack([torch.arange(100) < k for k in (5, 0, 40)], 1)

    groups = groups_of(a, torch.zeros(100, 2))

    assert groups.members == [[("a", 2)], [("a", 0)], [("a", 1), ("b", 0), ("b", 1)]]
    assert_close(groups.frequencies, [0.4, 0.05, 0.0])


def test_activity_is_per_position_where_all_sites_have_positions():
    on = activity({"a": [torch.ones(2, 3, 4)], "b": [torch.zeros(2, 3, 5)]})

    assert on["a"].shape == (6, 4) and on["a"].all()
    assert on["b"].shape == (6, 5) and not on["b"].any()


def test_activity_is_per_input_where_sites_have_different_rows():
    positions = torch.zeros(2, 3, 1)
    positions[1, 2] = 1

    on = activity({"a": [positions], "b": [torch.tensor([[1.0], [0.0]])]})

    assert on["a"].tolist() == [[False], [True]]
    assert on["b"].tolist() == [[True], [False]]


def test_activity_of_several_calls_is_that_of_any():
    on = activity({"a": [torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([[0.0], [0.0], [1.0]])]})

    assert on["a"].tolist() == [[True], [False], [True]]


def test_circuits_partition_the_components_and_their_weights_sum_to_the_target(decomposed: wd.Decomposition):
    """F1, F2."""
    circuits = decomposed.circuits

    members = [member for one in circuits for member in one.members]
    assert len(members) == len(set(members)) == sum(parts.pieces.n for parts in decomposed.parts.values())
    for site in decomposed.sites:
        parts = [one.weights[site.path] for one in circuits if site.path in one.weights]
        total = torch.stack(parts).sum(0) + decomposed.remainders[site.path]
        assert_close(total, site.matrix(), rtol=1e-5, atol=1e-6)


def test_a_circuit_has_the_weights_of_its_members(decomposed: wd.Decomposition):
    one = max(decomposed.circuits, key=lambda circuit: len(circuit.members))

    for path, weight in one.weights.items():
        own = [decomposed.component(site, index).weight for site, index in one.members if site == path]
        assert_close(weight, torch.stack(own).sum(0))
    assert set(one.weights) == {path for path, _ in one.members}


def test_circuits_cost_no_more_than_their_members_alone(decomposed: wd.Decomposition):
    ledger = decomposed.ledger

    live = sum(one.bits for one in decomposed.circuits if one.frequency > 0)

    assert live <= (ledger.naming + ledger.values + ledger.dictionary) / ledger.n_inputs * 1.0001
