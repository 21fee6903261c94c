from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.models import drawn
from weightdecomp._divergence import choose, kl, mse, named, output_tensor


@given(shape=st.lists(st.integers(1, 3), max_size=2), n=st.integers(1, 5), seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_mse_is_torchs_own_per_input_and_position(shape: list[int], n: int, seed: int):
    output, target = drawn(*shape, n, seed=seed), drawn(*shape, n, seed=seed + 1)

    found = mse(output, target)

    assert_close(found, F.mse_loss(output, target, reduction="none").mean(-1))


@given(shape=st.lists(st.integers(1, 3), max_size=2), n=st.integers(1, 5), seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_kl_is_the_divergence_of_the_masked_from_the_targets_distribution(shape: list[int], n: int, seed: int):
    output, target = drawn(*shape, n, seed=seed), drawn(*shape, n, seed=seed + 1)

    found = kl(output, target)

    q, p = torch.distributions.Categorical(logits=output), torch.distributions.Categorical(logits=target)
    assert_close(found, torch.distributions.kl_divergence(p, q))


@pytest.mark.parametrize("metric", [mse, kl])
def test_a_divergence_of_half_precision_outputs_is_computed_in_single(metric):
    output, target = drawn(4, 3).bfloat16(), drawn(4, 3, seed=2).bfloat16()

    found = metric(output, target)

    assert_close(found, metric(output.float(), target.float()), rtol=0, atol=0)


@pytest.mark.parametrize("metric", [mse, kl])
def test_equal_outputs_have_no_divergence(metric):
    logits = 50 * drawn(64, 9).float()

    found = metric(logits, logits)

    assert (found >= 0).all()
    assert found.max() < 1e-6


LOGITS = SimpleNamespace(logits=torch.zeros(4, 3))


@pytest.mark.parametrize(
    "output, of_ids, name, reason",
    [
        (torch.zeros(4, 3), False, "mse", "nothing marks it as logits; pass divergence='kl' if it is"),
        (torch.zeros(4), True, "mse", "nothing marks it as logits"),
        (torch.zeros(4, 3), True, "kl", "token ids"),
        (LOGITS, False, "kl", "the model returns .logits"),
    ],
)
def test_the_automatic_choice_says_why(output: object, of_ids: bool, name: str, reason: str):
    divergence = choose("auto", output, of_ids)

    assert divergence.name == name
    assert reason in divergence.reason


def test_a_named_divergence_is_taken_whatever_the_output():
    divergence = choose("mse", LOGITS, True)

    assert divergence.name == "mse"
    assert divergence.reason == "set in the call"


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="divergence must be 'auto', 'mse', 'kl' or a callable, got 'l2'"):
        choose("l2", torch.zeros(4, 3), False)


def test_a_callable_is_used_as_it_is_and_keeps_its_name():
    def largest(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().amax(-1)

    divergence = choose(largest, torch.zeros(4, 3), False)

    assert divergence.name == "largest"
    assert_close(divergence(torch.tensor([[1.0, -3.0]]), torch.zeros(1, 2)), torch.tensor([3.0]))


@pytest.mark.parametrize("returned, came", [(torch.tensor(1.0), "a single number"), (None, "NoneType"), (0.5, "float")])
def test_a_callable_that_returns_no_number_per_input_is_named(returned: object, came: str):
    divergence = choose(lambda output, target: returned, torch.zeros(4, 3), False)

    with pytest.raises(ValueError, match=f"divergence '<lambda>' must return .* one number per input, got {came}"):
        divergence(torch.zeros(4, 3), torch.zeros(4, 3))


def test_one_number_per_input_is_a_last_dimension_of_one():
    divergence = choose("auto", torch.zeros(4), False)

    found = divergence(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4))

    assert found.tolist() == [1, 4, 9, 16]


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), None),
        [torch.ones(2, 3), torch.zeros(1)],
        {"logits": torch.ones(2, 3)},
        SimpleNamespace(logits=torch.ones(2, 3), loss=torch.zeros(())),
        SimpleNamespace(last_hidden_state=torch.ones(2, 3)),
    ],
    ids=["tensor", "tuple", "list", "dict", "logits", "last_hidden_state"],
)
def test_the_output_tensor_is_found_in_what_models_return(output: object):
    assert_close(output_tensor(output), torch.ones(2, 3))


@pytest.mark.parametrize("output", [None, 1.0, (), ("a",), {"other": torch.ones(2, 3)}])
def test_an_output_without_a_tensor_says_what_to_do(output: object):
    with pytest.raises(
        TypeError, match=r"the model returned \w+, from which no output tensor can be taken; wrap the model"
    ):
        output_tensor(output)


def test_a_model_that_returns_its_loss_is_told_so():
    with pytest.raises(TypeError, match="a single number for the whole batch"):
        output_tensor(torch.tensor(0.3))


def test_a_users_own_divergence_cannot_be_loaded_by_name():
    with pytest.raises(ValueError, match="the run used the divergence 'largest' of its own; pass it as divergence="):
        named("largest", "set in the call")
