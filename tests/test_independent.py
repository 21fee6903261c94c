import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import drawn
from weightdecomp._independent import independent


def sums(d: int, seed: int, n: int = 4000) -> tuple[Tensor, Tensor]:
    """Directions that are not orthogonal, and inputs that are sums of a few of them."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.eye(d).double() + 0.2 * drawn(d, d, seed=seed))
    on = torch.rand(n, d, generator=rng) < 0.2
    codes = (2 * torch.rand(n, d, generator=rng) - 1) * on
    return truth, codes.double() @ truth


@given(st.integers(6, 16), st.integers(0, 2**16))
@settings(max_examples=20)
def test_directions_of_sparse_sums_are_found(d: int, seed: int):
    truth, rows = sums(d, seed)

    found = independent(rows)

    assert found is not None
    assert (truth @ found.T).abs().amax(1).min() > 0.97


def test_the_same_inputs_have_the_same_directions():
    _, rows = sums(6, 0)

    one, other = independent(rows), independent(rows)

    assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("rows", [drawn(30, 6), torch.zeros(400, 2).double(), drawn(400, 1) @ drawn(1, 2)])
def test_too_few_inputs_and_inputs_that_span_less_have_none(rows: Tensor):
    assert independent(rows) is None
