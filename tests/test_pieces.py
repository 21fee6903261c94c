import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.models import drawn
from weightdecomp._pieces import Pieces, rank_one_pieces

sizes = {
    "n": st.integers(1, 5),
    "rank": st.integers(1, 3),
    "d_in": st.integers(1, 4),
    "d_out": st.integers(1, 4),
    "seed": st.integers(0, 2**16),
}


def drawn_pieces(n: int, rank: int, d_in: int, d_out: int, seed: int) -> Pieces:
    """Components of ranks 1, 2, ... up to `rank`, in turn."""
    owner = torch.cat([torch.full((1 + c % rank,), c) for c in range(n)])
    return Pieces(drawn(len(owner), d_in, seed=seed), drawn(len(owner), d_out, seed=seed + 1), owner)


def slow_weight(pieces: Pieces, index: int) -> Tensor:
    weight = torch.zeros(pieces.u.shape[1], pieces.v.shape[1], dtype=torch.float64)
    for u, v, owner in zip(pieces.u, pieces.v, pieces.owner, strict=True):
        if owner == index:
            weight += torch.outer(u, v)
    return weight


@given(**sizes)
@settings(max_examples=30)
def test_the_components_weights_sum_to_the_total(n: int, rank: int, d_in: int, d_out: int, seed: int):
    pieces = drawn_pieces(n, rank, d_in, d_out, seed)

    weights = [pieces.weight(c) for c in range(pieces.n)]

    assert pieces.n == n
    assert_close(weights, [slow_weight(pieces, c) for c in range(n)])
    assert_close(torch.stack(weights).sum(0), pieces.total())


@given(**sizes)
@settings(max_examples=30)
def test_contracting_adds_the_masked_outputs_of_the_components(n: int, rank: int, d_in: int, d_out: int, seed: int):
    pieces = drawn_pieces(n, rank, d_in, d_out, seed)
    x, mask = drawn(3, d_in, seed=seed), drawn(3, n, seed=seed + 2)

    rows = pieces.contract(x @ pieces.v.T, mask)

    expected = sum(mask[:, c, None] * (x @ slow_weight(pieces, c).T) for c in range(n))
    assert_close(rows, expected)


@given(**sizes)
@settings(max_examples=30)
def test_an_activation_is_the_size_of_a_components_contribution(n: int, rank: int, d_in: int, d_out: int, seed: int):
    pieces = drawn_pieces(n, rank, d_in, d_out, seed)
    x = drawn(3, d_in, seed=seed)

    activations = pieces.activations(x @ pieces.v.T)

    expected = torch.stack([(x @ slow_weight(pieces, c).T).norm(dim=-1) for c in range(n)], -1)
    assert_close(activations.abs(), expected, rtol=1e-6, atol=1e-7)  # a norm by way of its square


def test_an_activation_of_rank_one_has_the_sign_of_its_reading():
    pieces = rank_one_pieces(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]]))

    activations = pieces.activations(torch.tensor([[-1.0, 0.5]]) @ pieces.v.T)

    assert activations.tolist() == [[-5.0, 1.0]]


@given(**sizes, scale=st.floats(1e-3, 1e3))
@settings(max_examples=30)
def test_activations_do_not_depend_on_the_gauge(n: int, rank: int, d_in: int, d_out: int, seed: int, scale: float):
    """G1: scaling, and a change of basis inside every component."""
    pieces = drawn_pieces(n, rank, d_in, d_out, seed)
    x = drawn(3, d_in, seed=seed)
    v, u = pieces.v * scale, pieces.u / scale
    for c in range(n):
        own = pieces.owner == c
        basis = (
            torch.linalg.qr(drawn(int(own.sum()), int(own.sum()), seed=seed + 3))[0]
            if own.sum() > 1
            else torch.ones(1, 1).double()
        )
        v[own], u[own] = basis @ v[own], basis @ u[own]
    turned = Pieces(v, u, pieces.owner)

    activations = turned.activations(x @ turned.v.T)

    assert_close(activations, pieces.activations(x @ pieces.v.T), rtol=1e-6, atol=1e-7)


@given(**sizes)
@settings(max_examples=30)
def test_balancing_changes_no_component(n: int, rank: int, d_in: int, d_out: int, seed: int):
    pieces = drawn_pieces(n, rank, d_in, d_out, seed)

    balanced = pieces.balanced()

    assert_close([balanced.weight(c) for c in range(n)], [pieces.weight(c) for c in range(n)])
    assert_close(balanced.u.norm(dim=1), balanced.v.norm(dim=1), rtol=1e-6, atol=1e-6)
    for c in range(n):
        own = balanced.u[balanced.owner == c]
        gram = own @ own.T
        assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)


def test_balancing_keeps_pieces_that_are_zero():
    pieces = rank_one_pieces(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))

    balanced = pieces.balanced()

    assert_close(balanced.v, pieces.v)
    assert_close(balanced.u, pieces.u)


def test_selected_components_are_renumbered():
    pieces = drawn_pieces(4, 2, 3, 3, seed=0)

    some = pieces.select(torch.tensor([True, False, True, True]))

    assert some.owner.tolist() == [0, 1, 2, 2]
    assert_close([some.weight(c) for c in range(3)], [pieces.weight(c) for c in (0, 2, 3)])
    assert some.ranks().tolist() == [1, 1, 2]
