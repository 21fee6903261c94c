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


@given(st.integers(2, 5), st.integers(0, 2**16))
@settings(max_examples=20)
def test_planes_of_equal_strength_in_which_inputs_go_round_are_told_apart(n: int, seed: int):
    rng = torch.Generator().manual_seed(seed)
    angles = 2 * torch.pi * torch.rand(4000, n, generator=rng).double()
    codes = torch.stack([angles.cos(), angles.sin()], 2).flatten(1)
    mixed = torch.linalg.qr(drawn(2 * n, 2 * n, seed=seed))[0].double()

    found = independent(codes @ mixed)

    assert found is not None
    along = (found @ mixed.T).square().unflatten(1, (n, 2)).sum(2)  # share of each direction in each plane
    assert along.amax(1).min() > 0.97
    assert (along.argmax(1).bincount(minlength=n) == 2).all()


def test_sparse_and_even_coordinates_are_found_together():
    rng = torch.Generator().manual_seed(0)
    even = (2 * torch.rand(4000, 4, generator=rng) - 1).double()
    sparse = (torch.randn(4000, 4, generator=rng) * (torch.rand(4000, 4, generator=rng) < 0.2)).double()
    mixed = torch.linalg.qr(drawn(8, 8))[0].double()

    found = independent(torch.cat([even / even.std(), sparse / sparse.std()], 1) @ mixed)

    assert found is not None
    assert (found @ mixed.T).abs().amax(1).min() > 0.97
