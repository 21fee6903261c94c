"""Nulls sum to the weight, are as active as ours, and do worse than a known answer."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.test_verify import Result, filled, linear, mlp, normal, result
from weightdecomp import _nulls, _verify
from weightdecomp._nulls import NAMES, gated_by_size, null, places, random_directions
from weightdecomp._pieces import Pieces, rank_one_pieces
from weightdecomp._regimes import Trial, frequencies
from weightdecomp._sites import Site
from weightdecomp._verify import _trial, verification


def trial(decomposition: Result, batch: Tensor) -> Trial:
    return _trial(decomposition, [batch], 1024, 1)


def made(name: str, own: Trial, rng: torch.Generator) -> Trial:
    where = places(own)
    return gated_by_size(own, where, {place.site.path: _nulls._STARTS[name](place, rng) for place in where})


def narrow(batch_size: int = 12) -> tuple[Result, Tensor]:
    """A linear site whose inputs span four of its six dimensions."""
    batch = normal(batch_size, 4, seed=2) @ normal(4, 6, seed=3)
    return result(filled(nn.Linear(6, 5)), batch, 0.7), batch


@pytest.mark.parametrize("name", NAMES)
def test_a_null_sums_to_the_weight_on_the_inputs(name: str, rng: torch.Generator):
    decomposition, batch = narrow()
    site = decomposition.sites[0]

    null = made(name, trial(decomposition, batch), rng).ablation.pieces[site.path]

    assert_close(batch @ null.total().T, batch @ site.matrix().T)


def test_random_directions_are_as_many_as_ours(rng: torch.Generator):
    decomposition, batch = narrow()

    null = random_directions(places(trial(decomposition, batch))[0], rng)

    assert null.n == decomposition.pieces[""].n


def test_random_directions_are_never_fewer_than_the_rank(rng: torch.Generator):
    model, batch = filled(nn.Linear(4, 4)), normal(9, 4)
    whole = lambda site: Pieces(site.matrix(), torch.eye(4).double(), torch.zeros(4, dtype=torch.long))  # noqa: E731
    decomposition = result(model, batch, 0.0, whole)

    null = random_directions(places(trial(decomposition, batch))[0], rng)

    assert null.n == 4
    assert_close(null.total(), decomposition.sites[0].matrix())


@pytest.mark.parametrize("name", NAMES)
def test_a_null_is_as_active_as_ours(name: str, rng: torch.Generator):
    decomposition, batch = mlp(0.7)
    own = trial(decomposition, batch)
    ours = {path: float(f.sum()) for path, (f, _) in frequencies(own).items()}

    null = made(name, own, rng)

    for path, (frequency, rows) in frequencies(null).items():
        most = min(ours[path], null.ablation.pieces[path].n)
        assert abs(float(frequency.sum()) - most) <= 1 / rows


@pytest.mark.parametrize("name", NAMES)
def test_a_null_opens_its_largest_contributions(name: str, rng: torch.Generator):
    decomposition, batch = linear(threshold=1.0)

    null = made(name, trial(decomposition, batch), rng)

    own, gates = null.ablation.pieces[""], null.parts[0].importances[""][0] > 0
    sizes = own.activations(batch @ own.v.T).abs()
    assert sizes[gates].min() > sizes[~gates].max()


def test_what_the_inputs_never_reach_is_the_nulls_remainder(rng: torch.Generator):
    decomposition, batch = narrow()
    site = decomposition.sites[0]

    null = made("SVD", trial(decomposition, batch), rng).ablation

    assert_close(null.pieces[""].total() + null.remainders[""], site.matrix())
    assert null.remainders[""].norm() > 0.1 * site.matrix().norm()


def test_nulls_do_worse_than_a_known_mechanism_under_the_same_attack():
    """Sparse features through an identity: ours reads one feature a component, and loses nothing."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False)).double().eval()
    model[0].weight.data = torch.eye(6, dtype=torch.float64)
    batch = normal(40, 6) * (normal(40, 6, seed=1) > 1)
    decomposition = result(model, batch, 1e-6, lambda site: rank_one_pieces(site.matrix(), torch.eye(6).double()))

    found = verification(decomposition, [batch], steps=8, bound=False)

    damage = {one.name: one.adversarial.damage for one in found.nulls if one.adversarial}
    assert found.damage < 1e-20
    assert damage["random directions"] > 0.1
    # The neurons are the mechanism here, so these nulls are right.
    assert damage["rows (neurons out)"] < 1e-20


def test_nulls_and_ours_beside_them_are_read_at_the_same_smaller_budget(monkeypatch: pytest.MonkeyPatch):
    decomposition, batch = linear()
    monkeypatch.setattr(_verify, "STEPS", 20)

    found = verification(decomposition, [batch], steps=25, bound=False)

    budgets = {one.adversarial.budget for one in (found.ours, *found.nulls) if one.adversarial}
    assert budgets == {"20 steps x 3 restarts"}
    assert found.shared.steps == (20, 25)


def test_a_null_of_too_many_pieces_is_skipped_with_the_reason(rng: torch.Generator):
    model, batch = filled(nn.Linear(20, 2)), normal(30, 20)

    def pieces(site: Site) -> Pieces:
        return rank_one_pieces(site.matrix(), torch.eye(2).double())

    own = trial(result(model, batch, 0.1, pieces), batch)

    found = null("columns (neurons in)", own, places(own), 0.02, (1, 1), rng)

    assert found.ledger is None
    assert found.reason == "20 columns at '' are more than the 16 pieces scored at most"


def test_a_site_with_too_many_inputs_has_no_nulls(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    decomposition, batch = linear()
    monkeypatch.setattr(_nulls, "_WIDEST", 4)
    own = trial(decomposition, batch)

    found = null("SVD", own, places(own), 0.02, (1, 1), rng)

    assert "5 inputs, more than the 4" in found.reason


def test_spans_computed_in_chunks_are_the_spans_computed_at_once(monkeypatch: pytest.MonkeyPatch):
    decomposition, batch = narrow()
    whole = places(trial(decomposition, batch))[0].reach

    monkeypatch.setattr(_nulls, "_AT_ONCE", 20)
    chunks = places(trial(decomposition, batch))[0].reach

    assert_close(chunks.power, whole.power)


def test_nulls_are_made_from_the_inputs_after_those_that_are_scored():
    """As ours was made from others; where too few follow, from the scored ones. Ours is scored on the same ones."""
    decomposition, batch = narrow()
    stretched = normal(len(batch), batch.shape[1], seed=9) * torch.arange(1, batch.shape[1] + 1)

    def svd(*batches: Tensor) -> tuple[float, float]:
        found = verification(decomposition, batches, steps=1, inputs=len(batch), bound=False)
        (one,) = (candidate for candidate in found.nulls if candidate.name == "SVD")
        assert found.ours.gates is not None and one.gates is not None
        return found.ours.gates.damage, one.gates.damage

    ours, alone = svd(batch)
    assert svd(batch, stretched[:-1]) == (ours, alone)
    assert svd(batch, batch.flip(0)) == (ours, pytest.approx(alone))
    assert svd(batch, stretched)[0] == ours
    assert svd(batch, stretched)[1] != pytest.approx(alone, rel=0.01)


def test_the_dense_model_keeps_every_rank_on():
    """Naming costs nothing, and every value of every rank on every input is paid for."""
    decomposition, batch = narrow()

    found = verification(decomposition, [batch], steps=1, nulls=False, bound=False).dense

    assert found.active == 4
    assert found.ledger is not None
    assert found.ledger.naming == 0
    assert_close(found.ledger.values, 12 * 4 * 0.5 * math.log2(1 / 0.02))
