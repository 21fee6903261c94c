"""Sparse readings: found where inputs are sums, and where nothing is sparse not claimed."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import QUICK, drawn, mlp, sparse
from weightdecomp._attack import Ablation
from weightdecomp._begun import Begun, opened
from weightdecomp._checkpoint import Checkpoint
from weightdecomp._divergence import named
from weightdecomp._gatekeeper import Gated, Gatekeeper
from weightdecomp._ledger import Ledger
from weightdecomp._pieces import rank_one_pieces
from weightdecomp._readings import reading_start
from weightdecomp._sample import taken
from weightdecomp._sites import find_sites
from weightdecomp._starts import Reach

TOKENS, PLACES, WIDTH = 7, 5, 16


def sums(n: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that each are a token and a place, and which; no input is one of them alone."""
    rng = torch.Generator().manual_seed(0)
    token, place = torch.randint(TOKENS, (n,), generator=rng), torch.randint(PLACES, (n,), generator=rng)
    return drawn(TOKENS, WIDTH, seed=3)[token] + drawn(PLACES, WIDTH, seed=4)[place], token, place


def test_tokens_and_places_have_a_component_each_though_no_input_shows_one_alone():
    """Twelve readings of eleven dimensions: many u sum to the weight, and that which reads tokens reads no places."""
    rows, token, place = sums()
    weight = drawn(4, WIDTH, seed=5)
    matrix = weight @ (torch.eye(WIDTH).double() - _onto(drawn(PLACES, WIDTH, seed=4)))  # which no place gets through
    reach = Reach(matrix, rows)

    found = reading_start(reach, rows @ reach.basis, 64)

    assert found is not None
    pieces, _ = found
    assert_close(rows @ pieces.total().T, rows @ matrix.T, rtol=0, atol=1e-6)
    contributions = pieces.activations(rows @ pieces.v.T)
    clear = contributions.abs() > 1e-3 * contributions.abs().max()
    by_token = torch.stack([clear[token == i].double().mean(0) for i in range(TOKENS)])
    assert sorted(by_token.argmax(1).tolist()) == sorted(set(by_token.argmax(1).tolist())), "one each"
    assert_close(by_token.max(1).values, torch.ones(TOKENS).double())
    assert int(clear.sum(1).max()) == 1, "a place does nothing, so that its component is none"


def _onto(directions: Tensor) -> Tensor:
    """The projection onto their span."""
    return torch.linalg.pinv(directions) @ directions


def test_all_of_a_sum_is_read_where_all_of_it_counts():
    rows, token, place = sums()
    matrix = drawn(WIDTH, WIDTH, seed=5)
    reach = Reach(matrix, rows)

    found = reading_start(reach, rows @ reach.basis, 64)

    assert found is not None
    pieces, held = found
    assert pieces.n == TOKENS + PLACES == len(reach.power) + 1
    assert_close(rows @ pieces.total().T, rows @ matrix.T, rtol=0, atol=1e-6)
    assert len(held) == len(reach.power), "nothing is left to refine"
    read = rows @ pieces.v.T
    is_on = read.abs() > 1e-3 * read.abs().max(0).values
    assert is_on.sum(1).tolist() == [2] * len(rows)
    for which in (token, place):
        for i in which.unique():
            assert (is_on == (which == i)[:, None]).all(0).sum() == 1, "some component reads this and nothing else"


def test_readings_that_do_not_span_the_inputs_leave_the_rest_to_singular_pairs():
    rng = torch.Generator().manual_seed(0)
    switches = (torch.rand(4096, 3, generator=rng) < 0.1).double()
    rows = torch.cat([switches, torch.randn(4096, 5, generator=rng).double()], 1) @ drawn(8, 8, seed=2)
    matrix = drawn(6, 8, seed=5)
    reach = Reach(matrix, rows)

    found = reading_start(reach, rows @ reach.basis, 64)

    assert found is not None
    pieces, held = found
    assert len(held) == 3
    assert_close(pieces.total(), matrix, rtol=0, atol=1e-5)
    answers = held @ (pieces.v @ reach.basis).T
    answers /= answers.diagonal().clone()[:, None]
    assert_close(answers, torch.eye(3, pieces.n).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [4096, 100])
def test_dense_inputs_or_few_have_none(n: int):
    rows = drawn(n, 16, seed=0) if n > 1000 else sums(n)[0]
    reach = Reach(drawn(4, 16, seed=1), rows)

    assert reading_start(reach, rows @ reach.basis, 64) is None


def test_a_decomposition_starts_from_readings_where_that_is_shorter():
    rows, _, _ = sums(512)
    model = nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, WIDTH)).double()
    with torch.no_grad():
        for i, x in enumerate(model.parameters()):
            x.copy_(drawn(*x.shape, seed=i + 10))

    found = wd.decompose(model, [rows], sites=["0"], progress=False, config=dataclasses.replace(QUICK, steps=0))

    assert found.parts["0"].start == "readings"
    assert float(found.parts["0"].frequencies.sum()) < 2.1, "a token and a place an input"


@pytest.mark.parametrize(
    ("bits", "damage", "dictionary", "wins"),
    [
        (99.0, 0.015, 0.0, True),
        (101.0, 0.001, 0.0, False),
        (50.0, 0.021, 0.0, False),
        (99.0, 0.019, 0.0, True),
        (99.0, 0.015, 2.0, False),
    ],
)
def test_readings_must_be_cheaper_within_the_tolerance(
    bits: float, damage: float, dictionary: float, wins: bool, monkeypatch: pytest.MonkeyPatch
):
    model, x = mlp(), sparse(64, 5)
    sites, metric = find_sites(model, x, None)[0], named("mse", "")
    sample = taken(model, [x], sites, metric, 64, torch.Generator().manual_seed(0))
    pieces = {site.path: rank_one_pieces(torch.eye(site.shape[1]), site.matrix().T.contiguous()) for site in sites}
    known = iter([gated(100.0, 0.015), gated(bits, damage, dictionary)])
    monkeypatch.setattr(Gatekeeper, "gates", lambda self: next(known))
    saved, choice = Checkpoint(None, {}), [Begun(pieces, {}, {}, 0.0), Begun(pieces, {}, {"0": "readings"}, 0.0)]
    ablation = Ablation(model, sites, pieces, metric, {})

    start, found = opened(ablation, choice, sample, 0.02, 0, saved)
    again, none = opened(ablation, choice, sample, 0.02, 0, saved)

    assert (start is choice[1]) == wins
    assert found is not None
    assert found.ledger.per_input == (bits if wins else 100.0)
    assert again is start, "a resumed run asks once"
    assert none is None


def gated(bits: float, damage: float, dictionary: float = 0.0) -> Gated:
    return Gated({}, {}, 1.0, damage, Ledger(1, bits, 0.0, dictionary, 0.0))
