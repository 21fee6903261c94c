import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tests.models import Calls, case, drawn, seeded
from weightdecomp import _effects
from weightdecomp._divergence import kl, mse
from weightdecomp._effects import effects, sensitivities
from weightdecomp._forward import inner_activations, masked, recorded
from weightdecomp._pieces import Pieces, rank_one_pieces
from weightdecomp._sites import find_sites
from weightdecomp._trade import Trade, highest_price, opened
from weightdecomp._upstream import Upstream


def estimated(model: nn.Module, x: Tensor, path: str, pieces: Pieces) -> Tensor:
    """What the engine expects of ablating each component alone."""
    sites, _ = find_sites(model, x, [path])
    record = recorded(model, x, sites)
    rng = torch.Generator().manual_seed(0)
    (sensitivity,) = sensitivities(model, x, sites[0], record, "mse", rng)
    (inner,) = inner_activations(record, sites[0], pieces)
    return effects(inner, pieces, sensitivity)


@torch.no_grad()
def measured(model: nn.Module, x: Tensor, path: str, pieces: Pieces) -> Tensor:
    """The same by doing it, one component after the other."""
    sites, _ = find_sites(model, x, [path])
    hits = []
    for c in range(pieces.n):
        mask = torch.ones(pieces.n, dtype=torch.float64)
        mask[c] = 0
        hits.append(mse(masked(model, x, sites, {path: pieces}, {path: [mask]}), model(x)))
    return torch.stack(hits, -1)


def test_effects_before_a_linear_readout_are_the_damage_of_single_ablations():
    """Intervention. One output, so that the random output directions leave no sampling error."""
    model = seeded(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))).double()
    v, owner = drawn(5, 4), torch.tensor([0, 0, 1, 2, 2])
    u = (model[0].weight @ torch.linalg.pinv(v)).T.detach()
    pieces = Pieces(v, u, owner)

    found = estimated(model, drawn(9, 4, seed=2), "0", pieces)

    assert_close(found, measured(model, drawn(9, 4, seed=2), "0", pieces))


def test_effects_of_neurons_before_a_relu_are_the_damage_of_single_ablations():
    """Intervention: exact across the kink, since the gradient is averaged on the way from off to on."""
    model = seeded(nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 1))).double()
    pieces = rank_one_pieces(model[0].weight.detach(), torch.eye(6).double())

    found = estimated(model, drawn(9, 4, seed=2), "0", pieces)

    assert_close(found, measured(model, drawn(9, 4, seed=2), "0", pieces))
    assert (found > 0).any() and (found == 0).any()


def test_effects_of_neurons_before_a_square_are_the_damage_of_single_ablations():
    """A gradient at full strength alone would be wrong by a factor of four here."""
    square = Calls(lambda m, h: h.square())
    model = seeded(nn.Sequential(nn.Linear(4, 6, bias=False), square, nn.Linear(6, 1))).double()
    pieces = rank_one_pieces(model[0].weight.detach(), torch.eye(6).double())

    found = estimated(model, drawn(9, 4, seed=2), "0", pieces)

    assert_close(found, measured(model, drawn(9, 4, seed=2), "0", pieces))


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_probes_measure_a_small_change_of_the_output(divergence: str, monkeypatch: pytest.MonkeyPatch):
    """E[(r . df)^2] is the divergence to second order; 4,000 probes leave 5 % of sampling error."""
    logits, change = drawn(1, 5), 1e-3 * drawn(1, 5, seed=2)
    rng = torch.Generator().manual_seed(0)

    probes = torch.cat([_effects._probe(divergence, logits, rng) for _ in range(4000)])

    expected = (kl if divergence == "kl" else mse)(logits + change, logits)
    assert_close((probes @ change[0]).square().mean(0, keepdim=True), expected, rtol=0.15, atol=0)


def test_sensitivities_of_a_shared_module_count_the_way_through_its_later_calls():
    target = case("one module twice", torch.float64)
    sites, _ = find_sites(target.model, target.batch, ["mix"])
    record = recorded(target.model, target.batch, sites)
    outputs: list[Tensor] = []

    def kept(m: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(output)

    rng = torch.Generator().manual_seed(0)
    found = sensitivities(target.model, target.batch, sites[0], record, "mse", rng)

    handle = target.model.mix.register_forward_hook(kept)
    expected = [torch.zeros_like(one[0]) for one in found]
    probe = _effects._probe("mse", record.output, torch.Generator().manual_seed(0))
    weight = target.model.mix.weight.detach().clone()
    points = _effects._FEWEST
    for share in ((i + 0.5) / points for i in range(points)):
        outputs.clear()
        target.model.mix.weight.data = share * weight
        projection = (target.model(target.batch) * probe).sum()
        for total, grad in zip(expected, torch.autograd.grad(projection, outputs), strict=True):
            total += grad / points
    handle.remove()
    assert_close([one[0] for one in found], expected)


def test_neurons_that_only_most_of_the_contribution_switches_on_have_their_effects():
    """The first midpoints see no gradient at all: more are taken until they account for the change."""
    model = seeded(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))).double()
    x = drawn(9, 4, seed=2)
    with torch.no_grad():
        model[0].bias[:] = -0.96 * (x @ model[0].weight.T).amax(0)
    pieces = rank_one_pieces(model[0].weight.detach(), torch.eye(6).double())

    found = estimated(model, x, "0", pieces)

    assert_close(found, measured(model, x, "0", pieces), rtol=0.3, atol=1e-9)


def test_points_of_a_coarser_path_are_not_computed_again(monkeypatch: pytest.MonkeyPatch):
    """Reference: the mean over all midpoints of the path at which the search ends, written out."""
    model = seeded(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))).double()
    x = drawn(9, 4, seed=2)
    with torch.no_grad():
        model[0].bias[:] = -0.96 * (x @ model[0].weight.T).amax(0)
    (site,), _ = find_sites(model, x, ["0"])
    record, shares = recorded(model, x, [site]), list[float]()
    on_path = _effects._on_path

    def counted(upstream: Upstream, share: float) -> tuple[Tensor, list[Tensor]]:
        shares.append(share)
        return on_path(upstream, share)

    monkeypatch.setattr(_effects, "_on_path", counted)
    (found,) = sensitivities(model, x, site, record, "mse", torch.Generator().manual_seed(0))

    n = len(shares) - 1  # one pass is at share 0
    assert n > _effects._FEWEST and len(set(shares)) == n + 1
    probe = _effects._probe("mse", record.output, torch.Generator().manual_seed(0))
    expected = torch.zeros_like(found[0])
    for share in ((i + 0.5) / n for i in range(n)):
        rows = (share * x @ model[0].weight.T).detach().requires_grad_()
        expected += torch.autograd.grad((model[1:](rows + model[0].bias) * probe).sum(), rows)[0] / n
    assert_close(found[0], expected)


def test_a_neuron_that_only_the_whole_contribution_switches_on_is_never_free_to_close():
    """Its gradient is zero almost everywhere on the way; at a low price its gate opens all the same."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(20.1)
        model[0].bias.fill_(-20)
    x = torch.ones(4, 1)
    (site,), _ = find_sites(model, x, ["0"])
    record = recorded(model, x, [site])
    pieces = rank_one_pieces(torch.ones(1, 1), torch.full((1, 1), 20.1))
    (found,) = sensitivities(model, x, site, record, "mse", torch.Generator().manual_seed(0))

    trade = Trade(20.1 * x, effects(x, pieces, found))

    assert opened(20.1 * x, trade.thresholds(1e-6 * trade.typical)).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_site_that_the_output_does_not_depend_on_has_no_sensitivity(frozen: bool):
    model = Calls(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    x = drawn(5, 3).float()
    seeded(model).requires_grad_(not frozen)
    sites, _ = find_sites(model, x)

    (found,) = sensitivities(model, x, sites[1], recorded(model, x, sites), "mse", torch.Generator())

    assert not found.any()


@given(rows=st.integers(1, 7), n=st.integers(1, 3), price=st.floats(0.01, 3), seed=st.integers(0, 2**16))
@settings(max_examples=60)
def test_thresholds_are_the_best_of_all(rows: int, n: int, price: float, seed: int):
    """Reference: every set of gates that a threshold on each arm can open, tried one by one."""
    activations, hits = drawn(rows, n, seed=seed), drawn(rows, n, seed=seed + 1).abs()

    thresholds = Trade(activations, hits).thresholds(price)

    gates = opened(activations, thresholds)
    cost = (hits * (1 - gates) + price * gates).sum(0)
    for c in range(n):
        a, hit = activations[:, c], hits[:, c]
        limits = [*a.abs().tolist(), 0.0]
        costs = [float(torch.where((a > up) | (-a > down), price, hit).sum()) for up in limits for down in limits]
        assert_close(float(cost[c]), min(costs))


def test_an_arm_that_never_pays_stays_shut_beyond_what_was_seen():
    trade = Trade(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.1], [0.1]]))

    thresholds = trade.thresholds(1.0)

    assert not opened(torch.tensor([[2.0]]), thresholds).any()
    assert opened(torch.tensor([[2.2]]), thresholds).all()


def test_a_gate_opens_on_either_arm():
    thresholds = torch.tensor([[1.0, 1.0], [2.0, 0.5]])

    gates = opened(torch.tensor([[1.5, -0.7], [-1.5, 0.9]]), thresholds)

    assert gates.tolist() == [[1, 1], [0, 0]]


@given(edge=st.floats(1e-3, 1e3))
def test_the_highest_price_within_the_limit_is_found(edge: float):
    price = highest_price(lambda p: p, edge, 1e-4, 1e4, 30)

    assert_close(price, edge, rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_price_that_is_always_too_high_ends_at_the_lowest():
    assert_close(
        highest_price(lambda p: float(F.relu(torch.tensor(p))) + 1, 0.5, 1e-4, 1e4, 40), 1e-4, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("near", [None, 1e-6, 3e-3, 5.0])
@pytest.mark.parametrize("power", [0.5, 1.0, 1.3])
def test_a_price_is_found_with_few_trials_where_damage_is_a_power_of_it(power: float, near: float | None):
    tried = list[float]()

    def damage(price: float) -> float:
        tried.append(price)
        return (price / 7) ** power

    price = highest_price(damage, 0.02, 1e-7, 10.0, 10, near)

    step = 10 ** (8 / 2**10)  # what ten bisections of eight decades leave
    assert damage(price) <= 0.02 < damage(price * step * 1.001)
    assert len(tried) <= 8


@given(edges=st.lists(st.floats(-6.5, 0.5), min_size=1, max_size=5), near=st.none() | st.floats(-7, 1))
def test_a_price_is_found_as_by_bisection_where_damage_rises_in_steps(edges: list[float], near: float | None):
    """Reference: the last price before the step that passes the limit."""

    def damage(price: float) -> float:
        return sum((0.011 for edge in edges if math.log10(price) > edge), 0.0)

    price = highest_price(damage, 0.02, 1e-7, 10.0, 10, None if near is None else 10**near)

    passed = sorted(edges)[1] if len(edges) > 1 else 1.0
    assert passed - 8 / 2**10 * 1.001 <= math.log10(price) <= passed + 1e-9


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_damage_that_is_no_number_is_beyond_every_limit(worst: float):
    """A masked model may divide by what a mask has taken away; prices below are still told apart."""

    def damage(price: float) -> float:
        return worst if price > 1e-3 else price

    assert highest_price(damage, 0.02, 1e-7, 10.0, 10) == pytest.approx(1e-3, rel=0.02)
    assert highest_price(damage, 1e-4, 1e-7, 10.0, 10, near=1.0) == pytest.approx(1e-4, rel=0.02)
    assert highest_price(damage, 0.0, 1e-7, 10.0, 10) == pytest.approx(1e-7, rel=0.02)
