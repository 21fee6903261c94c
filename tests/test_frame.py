import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import drawn, mlp, sparse
from weightdecomp._attack import Ablation
from weightdecomp._divergence import choose
from weightdecomp._frame import Frame, exact, frame
from weightdecomp._pieces import Pieces, rank_one_pieces
from weightdecomp._refine import Refiner
from weightdecomp._sites import find_sites
from weightdecomp._starts import Reach, exemplar_start


@given(
    n=st.integers(1, 8),
    d_in=st.integers(1, 5),
    d_out=st.integers(1, 5),
    move_v=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50)
def test_pieces_that_span_the_weights_are_made_exact(n: int, d_in: int, d_out: int, move_v: bool, seed: int):
    """F1. Twice as many pieces as needed, so that they are well away from not spanning."""
    pieces = rank_one_pieces(
        drawn(2 * max(d_in, d_out) + n, d_in, seed=seed), drawn(2 * max(d_in, d_out) + n, d_out, seed=seed + 1)
    )
    weight = drawn(d_out, d_in, seed=seed + 2)

    fixed = exact(pieces, weight, move_v)

    assert_close(fixed.total(), weight, rtol=0, atol=1e-9)
    assert_close(fixed.u if move_v else fixed.v, pieces.u if move_v else pieces.v, rtol=0, atol=0)


@pytest.mark.parametrize("least", [1e-2, 1e-4, 1e-6])
def test_nearly_dependent_pieces_are_made_exact_in_single_precision(least: float):
    """F1. As where the start has singular pairs of all sizes, and steps have moved them."""
    axes = torch.linalg.qr(drawn(40, 40)).Q
    u = torch.logspace(0, math.log10(least), 40).double()[:, None] * axes
    weight = (u.T @ drawn(40, 9, seed=2)).float()
    moved = (u + 0.01 * u.norm(dim=1, keepdim=True) * drawn(40, 40, seed=3)).float()

    fixed = exact(rank_one_pieces(drawn(40, 9, seed=4).float(), moved), weight, move_v=True)

    assert float((fixed.total() - weight).norm() / weight.norm()) < 2e-5


def test_the_correction_is_the_smallest_there_is():
    pieces, weight = rank_one_pieces(drawn(9, 4), drawn(9, 3, seed=2)), drawn(3, 4, seed=3)

    change = exact(pieces, weight, move_v=True).v - pieces.v

    expected = torch.linalg.pinv(pieces.u.T) @ (weight - pieces.total())
    assert_close(change, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("move_v", [True, False])
def test_the_gradient_of_the_correction_is_that_of_the_formula(move_v: bool):
    """The hand-written backward pass against autograd through the pseudo-inverse."""
    v, u, weight = drawn(7, 4).requires_grad_(), drawn(7, 3, seed=2).requires_grad_(), drawn(3, 4, seed=3)
    by = [drawn(7, 4, seed=4), drawn(7, 3, seed=5)]

    fixed = exact(rank_one_pieces(v, u), weight, move_v)
    found = torch.autograd.grad((fixed.v * by[0]).sum() + (fixed.u * by[1]).sum(), [v, u])

    missing = weight - u.T @ v
    slow = (v + torch.linalg.pinv(u.T) @ missing, u) if move_v else (v, u + torch.linalg.pinv(v.T) @ missing.T)
    expected = torch.autograd.grad((slow[0] * by[0]).sum() + (slow[1] * by[1]).sum(), [v, u])
    assert_close(found, expected, rtol=1e-6, atol=1e-8)


def framed(n: int) -> tuple[Frame, Pieces, Reach, torch.Tensor, Refiner, torch.Tensor]:
    """The first layer of an MLP, started from `n` directions of its five inputs that are not orthogonal."""
    model, x = mlp(torch.float64), sparse(64, 5, torch.float64)
    site = find_sites(model, x)[0][0]
    reach = Reach(site.matrix(), x)
    directions = torch.nn.functional.normalize(drawn(n, len(reach.power), seed=3))
    pieces = exemplar_start(reach, directions)
    own = frame(reach.basis, reach.power, directions, site.matrix(), pieces)
    ablation = Ablation(model, (site,), {site.path: pieces}, choose("mse", x, False), {})
    config = wd.Config(steps=20, rate=0.1)
    refiner = Refiner(ablation, {site.path: own}, 1.0, config, torch.Generator().manual_seed(0))
    return own, pieces, reach, directions, refiner, x


@pytest.mark.parametrize("n", [2, 3])
def test_a_component_goes_on_answering_to_its_own_exemplar_alone(n: int):
    _, pieces, reach, directions, refiner, x = framed(n)
    (path,) = refiner.frames
    thresholds = {path: torch.full((2, pieces.n), 0.1, dtype=x.dtype)}

    for step in range(4):
        refiner.step(x, thresholds, step, 0.01)

    found = refiner.detached()[path]
    before, after = (one.v @ reach.basis @ directions.T for one in (pieces, found))
    assert_close(before[:n], before[:n].diagonal().diag(), rtol=0, atol=1e-9)
    assert_close(after, before, rtol=0, atol=1e-9)
    assert_close(found.u[:n], pieces.u[:n], rtol=0, atol=1e-9)
    assert_close(found.total() @ reach.basis, reach.weight, rtol=0, atol=1e-9)
    assert float((found.v - pieces.v).norm()) > 1e-3


def test_exemplars_that_span_the_inputs_leave_nothing_to_move():
    own, pieces, _, _, refiner, _ = framed(5)

    assert not own.moves
    assert refiner.factors == []
    assert torch.equal(refiner.detached()["0"].v, pieces.v)
