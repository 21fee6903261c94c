import copy
import dataclasses
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import QUICK, case, drawn, mlp, seeded, sparse
from weightdecomp._edit import _member

pytestmark = pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def decomposed_case(name: str, dtype: torch.dtype = torch.float32) -> wd.Decomposition:
    target = case(name, dtype)
    return wd.decompose(target.model, [target.batch], config=QUICK, progress=False)


def joined(decomposition: wd.Decomposition, path: str) -> wd.Decomposition:
    """A copy whose first two components of a site are one."""
    twin, parts = copy.copy(decomposition), decomposition.parts[path]
    pieces = parts.pieces._replace(owner=(parts.pieces.owner - 1).clamp_min(0))
    own = dataclasses.replace(
        parts, pieces=pieces, thresholds=parts.thresholds[:, 1:], frequencies=parts.frequencies[1:]
    )
    twin.parts = decomposition.parts | {path: own}
    return twin


def test_removing_takes_the_component_out_of_the_weight(decomposed: wd.Decomposition):
    before = weights(decomposed.target)

    edited = decomposed.edit(remove=[("0", 1)])

    assert_close(edited[0].weight, before["0.weight"] - decomposed.component("0", 1).weight)
    assert torch.equal(edited[2].weight, before["2.weight"])
    assert torch.equal(edited[0].bias, before["0.bias"])


def test_the_target_stays_as_it_is(decomposed: wd.Decomposition):
    before = weights(decomposed.target)

    edited = decomposed.edit(remove=[("0", 1)], scale={("2", 0): 3.0})

    assert all(torch.equal(value, before[name]) for name, value in decomposed.target.state_dict().items())
    assert edited is not decomposed.target
    assert {p.data_ptr() for p in edited.parameters()}.isdisjoint(p.data_ptr() for p in decomposed.target.parameters())


def test_scaling_multiplies_the_component(decomposed: wd.Decomposition):
    edited = decomposed.edit(scale={("0", 0): 2.5, ("0", 2): -1.0})

    change = 1.5 * decomposed.component("0", 0).weight - 2 * decomposed.component("0", 2).weight
    assert_close(edited[0].weight.detach(), decomposed.target[0].weight.detach() + change)


def test_writing_changes_what_a_component_writes_and_not_what_it_reads(decomposed: wd.Decomposition):
    vector = torch.arange(8.0)

    edited = decomposed.edit(write={("0", 1): vector})

    one = decomposed.component("0", 1)
    expected = decomposed.target[0].weight.detach() - one.weight + torch.outer(vector, one.right[0])
    assert_close(edited[0].weight.detach(), expected)


def test_a_component_of_higher_rank_is_rewritten_piece_by_piece(decomposed: wd.Decomposition):
    merged = joined(decomposed, "0")
    vectors = drawn(2, 8).float()

    edited = merged.edit(write={("0", 0): vectors})

    one = merged.component("0", 0)
    expected = merged.target[0].weight.detach() - one.weight + vectors.T @ one.right
    assert_close(edited[0].weight.detach(), expected)


def test_a_circuit_is_edited_at_all_its_sites(decomposed: wd.Decomposition):
    one = max(decomposed.circuits, key=lambda circuit: len(circuit.members))

    edited = decomposed.edit(remove=[one])

    for path, weight in one.weights.items():
        before = decomposed.target.get_submodule(path).weight.detach()
        assert_close(edited.get_submodule(path).weight.detach(), before - weight)


@torch.no_grad()
def test_removing_everything_leaves_the_remainder(decomposed: wd.Decomposition):
    """F1."""
    edited = decomposed.edit(remove=decomposed.circuits)

    for path, remainder in decomposed.remainders.items():
        assert_close(edited.get_submodule(path).weight, remainder, rtol=0, atol=1e-6)


@torch.no_grad()
def test_editing_a_linear_model_is_ablating_it(quick: None):
    """Intervention: predicted by masks, done in the weights."""
    model = seeded(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)))
    decomposition = wd.decompose(model, [drawn(64, 5).float()], config=QUICK, progress=False)
    masks = {path: torch.ones(parts.pieces.n) for path, parts in decomposition.parts.items()}
    masks["0"][1], masks["1"][0] = 0, 0.25

    edited = decomposition.edit(remove=[("0", 1)], scale={("1", 0): 0.25})

    inputs = drawn(20, 5, seed=4).float()
    expected = decomposition.ablate(inputs, masks, remainder=True)
    assert_close(edited(inputs), expected, rtol=1e-4, atol=1e-5)
    assert float((edited(inputs) - model(inputs)).abs().max()) > 0.01


def test_editing_one_of_two_tied_weights_unties_them(quick: None):
    decomposition = decomposed_case("tied embedding and head")
    target = decomposition.target

    edited = decomposition.edit(remove=[("head", 0)])

    change = decomposition.component("head", 0).weight
    assert_close(edited.head.weight.detach(), target.head.weight.detach() - change)
    assert torch.equal(edited.embed.weight, target.embed.weight)
    assert target.head.weight is target.embed.weight


@pytest.mark.parametrize(
    "name", ["transformers Conv1D", "conv2d", "embedding", "bilinear", "weight norm", "one module twice"]
)
@torch.no_grad()
def test_every_kind_of_site_is_edited(name: str, quick: None):
    """Removing a component from the weight is masking it, whatever the module; nothing else is masked before it."""
    decomposition = decomposed_case(name, torch.float64)
    path, batch = decomposition.sites[0].path, case(name, torch.float64).batch
    masks = {p: torch.ones(parts.pieces.n) for p, parts in decomposition.parts.items()}
    masks[path][0] = 0

    edited = decomposition.edit(remove=[(path, 0)])

    output = edited(*batch) if isinstance(batch, tuple) else edited(batch)
    assert_close(output, decomposition.ablate(batch, masks, remainder=True), rtol=1e-7, atol=1e-9)
    assert type(edited.get_submodule(path)).__name__ in ("Conv1D", "Conv2d", "Embedding", "Bilinear", "Linear")


def test_an_edit_keeps_dtype_and_what_is_trained(quick: None):
    decomposition = decomposed_case("linear", torch.bfloat16)
    decomposition.target[0].weight.requires_grad_(False)

    edited = decomposition.edit(remove=[("0", 0), ("2", 0)])

    assert edited[0].weight.dtype == torch.bfloat16
    assert not edited[0].weight.requires_grad
    assert edited[2].weight.requires_grad


def test_an_edit_of_nothing_is_a_copy(decomposed: wd.Decomposition):
    edited = decomposed.edit()

    assert all(torch.equal(value, decomposed.target.state_dict()[name]) for name, value in edited.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"remove": [("0", 1)], "scale": {("0", 1): 2.0}},
        {"remove": [("0", 1), ("0", 1)]},
        {"remove": [("0", 1)], "write": {("0", 1): torch.zeros(8)}},
    ],
)
def test_a_component_edited_twice_is_refused(decomposed: wd.Decomposition, changes: dict):
    with pytest.raises(
        ValueError, match=r"component \('0', 1\) is edited twice; name it in one of remove, scale and write"
    ):
        decomposed.edit(**changes)


def test_a_component_is_the_same_whatever_kind_of_integer_names_it():
    named = [_member(("0", index)) for index in (1, torch.tensor(1), numpy.int64(1))]

    assert set(named) == {("0", 1)}
    assert all(type(index) is int for _, index in named)


@pytest.mark.parametrize("named", [("0", 0.0), ("0", True), ("0", "0"), ("0", None), (0, 0), "0", ("0", 1, 2)])
def test_what_names_no_component_is_refused(named: Any):
    # Not through `edit`, whose own types the suite checks first.
    with pytest.raises(TypeError, match=r"expected a circuit or a pair \(site, index\) of a text and an integer, got"):
        _member(named)


def test_a_circuit_and_its_member_are_the_same_component_twice(decomposed: wd.Decomposition):
    one = decomposed.circuits[0]

    with pytest.raises(ValueError, match="is edited twice"):
        decomposed.edit(remove=[one], scale={one.members[0]: 2.0})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"remove": [("7", 0)]}, "no site at '7'"),
        ({"scale": {("0", 99): 2.0}}, "'0' has components 0 to .*, got 99"),
        (
            {"write": {("0", 0): torch.zeros(5)}},
            r"the vectors for \('0', 0\) have shape \(1, 5\), expected \(1, 8\): one row for each row of its .left",
        ),
        ({"write": {("0", 99): torch.zeros(8)}}, "'0' has components 0 to .*, got 99"),
        ({"scale": {("0", 0): float("nan")}}, r"the factor for \('0', 0\) is nan, expected a finite number"),
        ({"write": {("0", 0): torch.full((8,), torch.inf)}}, r"the vectors for \('0', 0\) contain NaN or infinity"),
        ({"scale": {("0", 0): 1e300}}, "the edit of '0' is too large for its weights, which are torch.float32"),
    ],
)
def test_an_edit_that_cannot_be_made_is_refused(decomposed: wd.Decomposition, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        decomposed.edit(**changes)


@torch.no_grad()
def test_an_edited_model_can_be_decomposed_again(quick: None):
    decomposition = decomposed_case("weight norm")
    edited = decomposition.edit(remove=[("0", 0)])

    again = wd.decompose(edited, [case("weight norm").batch], config=QUICK, progress=False)

    assert [site.path for site in again.sites] == ["0", "2"]


def test_mlp_fixture_is_the_model_that_was_decomposed(decomposed: wd.Decomposition):
    """The other tests compare with this model's weights."""
    assert_close(decomposed.target(sparse(4, 5)), mlp()(sparse(4, 5)), rtol=0, atol=0)
