"""Verification: the attack finds what is there, says no when it must, and certified bounds hold above it."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from weightdecomp import _certified, _verify
from weightdecomp._attack import Ablation, Part, attacked
from weightdecomp._batches import Batch, read_batches
from weightdecomp._climb import Climb
from weightdecomp._divergence import Divergence, choose
from weightdecomp._forward import Masks, Record
from weightdecomp._pieces import Pieces, rank_one_pieces
from weightdecomp._regimes import ladder
from weightdecomp._sites import Site, find_sites
from weightdecomp._trade import opened
from weightdecomp._verify import Verification, verification

OPEN, CLOSED = -math.inf, math.inf


@dataclass
class Result:
    """What `verification` needs of a decomposition."""

    target: nn.Module
    sites: tuple[Site, ...]
    pieces: dict[str, Pieces]
    threshold: float
    divergence: Divergence
    tolerance: float = 0.02

    def ablation(self) -> Ablation:
        left = {site.path: site.matrix() - self.pieces[site.path].total() for site in self.sites}
        real = {path: matrix for path, matrix in left.items() if matrix.norm() > 1e-6}
        return Ablation(self.target, self.sites, self.pieces, self.divergence, real)

    def gates_on(self, record: Record) -> Masks:
        return {
            site.path: [self._gates(site, operands) for operands in record.operands[site.path]] for site in self.sites
        }

    def _gates(self, site: Site, operands: tuple) -> Tensor:
        own = self.pieces[site.path]
        return opened(own.activations(site.read(operands, own.v)), torch.full((2, own.n), self.threshold))

    def read(self, batches: Iterable[Batch]) -> list[Batch]:
        return read_batches(batches, self.target)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in double precision and eval mode with weights drawn by seed."""
    rng = generator(seed)
    model = model.double().eval()
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        parameter.data = drawn / max(parameter[0].numel(), 1) ** 0.5
    return model


def random_pieces(site: Site, n: int, seed: int = 0) -> Pieces:
    """Random pieces that sum to the weight, of which one component has two."""
    v = normal(n, site.shape[1], seed=seed)
    u = torch.linalg.lstsq(v.T, site.matrix().T, driver="gelsd").solution
    u = u + torch.linalg.pinv(v.T) @ (site.matrix().T - v.T @ u)
    return Pieces(v, u, torch.tensor([0, *range(n - 1)]))


def result(
    model: nn.Module,
    batch: Batch,
    threshold: float,
    pieces: Callable[[Site], Pieces] | None = None,
    divergence: str | Callable[[Any, Any], Tensor] = "mse",
) -> Result:
    sites, _ = find_sites(model, batch)
    make = pieces or (lambda site: random_pieces(site, max(site.shape) + 1))
    first = batch[0] if isinstance(batch, tuple) else batch
    chosen = choose(divergence, normal(1, 2), not first.is_floating_point())
    return Result(model, sites, {site.path: make(site) for site in sites}, threshold, chosen)


def mlp(threshold: float = 0.5, **options: Any) -> tuple[Result, Tensor]:
    model = filled(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    batch = normal(16, 4, seed=1)
    return result(model, batch, threshold, **options), batch


def linear(d_out: int = 3, threshold: float = 1.0) -> tuple[Result, Tensor]:
    """One linear site with ten components, a remainder, and gates that are open on some inputs."""
    model, batch = filled(nn.Linear(5, d_out, bias=False)), normal(6, 5, seed=1)

    def pieces(site: Site) -> Pieces:
        whole = random_pieces(site, 11)
        return whole._replace(u=0.9 * whole.u)

    return result(model, batch, threshold, pieces), batch


def small(decomposition: Result, batch: Batch, **options: Any) -> Verification:
    settings = {"steps": 8, "nulls": False, "bound": False} | options
    return verification(decomposition, [batch], **settings)


def worst_of_all_vertices(decomposition: Result, batch: Tensor, per_input: bool) -> float:
    """Damage of the worst vertex of a single linear site's mask box, by trying all of them."""
    (site,) = decomposition.sites
    own = decomposition.pieces[site.path]
    gates = decomposition._gates(site, (batch,))
    weights = torch.stack([own.weight(c) for c in range(own.n)])
    parts = torch.einsum("coi,bi->bco", weights, batch)
    left = batch @ (site.matrix() - own.total()).T
    found = []
    for vertex in product([0.0, 1.0], repeat=own.n + 1):
        off = (1 - gates) * (1 - torch.tensor(vertex[:-1], dtype=torch.float64))
        change = (off[..., None] * parts).sum(1) + (1 - vertex[-1]) * left
        found.append(change.square().mean(1))
    by_vertex = torch.stack(found)
    worst = by_vertex.amax(0).mean() if per_input else by_vertex.mean(1).amax()
    return float(worst / (batch @ site.matrix().T).square().mean())


# --- the attack ---


def test_the_attack_finds_the_worst_vertex_of_a_linear_site_for_all_inputs_at_once():
    decomposition, batch = linear()

    found = small(decomposition, batch, steps=30)

    assert_close(found.damage, worst_of_all_vertices(decomposition, batch, per_input=False))


def test_the_attack_finds_the_worst_vertex_of_a_linear_site_for_every_input():
    decomposition, batch = linear()

    found = small(decomposition, batch, steps=40)

    assert_close(found.per_input.plateau, worst_of_all_vertices(decomposition, batch, per_input=True))


@pytest.mark.parametrize("sources", ["shared", "per_input"])
def test_the_ladder_never_falls(sources: str):
    decomposition, batch = mlp()

    found = getattr(small(decomposition, batch, steps=45, restarts=1), sources).damages

    assert list(found) == sorted(found)
    assert found[0] > 0


def test_the_attack_is_stronger_than_chance_and_than_the_gates_alone():
    decomposition, batch = mlp()

    found = small(decomposition, batch)

    assert found.damage > 1.5 * found.stochastic.damage
    assert found.damage >= found.gates.damage * (1 - 1e-12)


def test_sources_of_their_own_do_more_damage_to_inputs_than_shared_ones():
    decomposition, batch = mlp()

    found = small(decomposition, batch)

    assert found.per_input.plateau > 1.1 * found.shared.plateau


@pytest.mark.parametrize("per_input", [False, True])
def test_inputs_in_several_parts_are_attacked_as_if_in_one(per_input: bool):
    decomposition, batch = linear()
    ablation = decomposition.ablation()

    def part(x: Tensor) -> Part:
        return Part(x, decomposition.target(x).detach(), {"": [decomposition._gates(ablation.sites[0], (x,))]})

    whole = attacked(ablation, [part(batch)], [40], 3, per_input, generator())
    parts = attacked(ablation, [part(batch[:2]), part(batch[2:])], [40], 3, per_input, generator())

    assert_close(parts.ladder[:, -1], whole.ladder[:, -1])


def test_a_table_with_as_many_positions_as_there_are_inputs_is_not_taken_for_inputs():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.table(torch.arange(x.shape[1])))

    batch = normal(5, 5, 4)
    decomposition = result(filled(Positions()), batch, 0.5)

    found = small(decomposition, batch)

    assert found.damage >= found.gates.damage * (1 - 1e-12) > 0


def test_a_search_that_stands_still_stops_and_says_so():
    decomposition, batch = linear()
    trial = _verify._trial(decomposition, [batch], 1024, 1)

    found = ladder(trial, [20, 640, 1280], 1, False, generator())

    assert found.spent < 300
    assert found.damages[-1] == found.damages[-2]
    assert f"at a plateau after {found.spent}" in found.budget


def test_the_second_restart_starts_from_zeros():
    climb = Climb(3, 2, 4, torch.zeros(()), generator())

    assert not climb.sources[1].any()
    assert climb.sources[0].any() and climb.sources[2].any()


def test_an_undefined_output_counts_as_the_worst_there_is():
    climb = Climb(1, 1, 2, torch.zeros(()), generator())

    climb.step(torch.tensor([[torch.nan]]), torch.full((1, 1, 2), torch.nan))

    assert climb.best.item() == torch.inf
    assert climb.sources.isfinite().all()


# --- regimes ---


def test_open_gates_do_no_damage():
    decomposition, batch = mlp(OPEN)

    found = small(decomposition, batch)

    figures = (found.unmasked.damage, found.stochastic.damage, found.gates.damage, found.damage)
    assert max(*figures, found.per_input.plateau) < 1e-20
    assert found.converged


def test_closed_gates_lose_everything_at_zero_sources():
    decomposition, batch = mlp(CLOSED)

    found = small(decomposition, batch)

    assert_close(found.gates.damage, 1.0)
    assert found.damage >= 1 - 1e-12


def test_a_verdict_against_a_result_names_the_damage_the_tolerance_and_the_budget():
    decomposition, batch = mlp(CLOSED)

    found = small(decomposition, batch)

    assert not found.converged
    assert f"damage {found.damage:.4g} exceeds the tolerance 0.02 (8 steps x 3 restarts" in found.reason


def test_the_unmasked_damage_is_the_share_of_the_output_that_the_remainder_makes():
    decomposition, batch = linear(threshold=OPEN)

    found = small(decomposition, batch)

    assert_close(found.unmasked.damage, 0.1**2)
    assert_close(found.damage, 0.1**2)
    assert_close(found.sites[0].remainder, 0.1**2)


def test_stochastic_damage_has_the_mean_of_uniform_sources():
    """One component: E[(1 - s)^2] = 1/3, with a standard error that the mean stays within."""
    model, batch = filled(nn.Linear(1, 1, bias=False)), normal(400, 1)
    decomposition = result(model, batch, CLOSED, lambda site: rank_one_pieces(site.matrix(), torch.ones(1, 1).double()))

    found = small(decomposition, batch).stochastic

    assert found.error is not None
    assert 0 < found.error < 0.02
    assert abs(found.damage - 1 / 3) < 4 * found.error


def test_only_the_first_inputs_are_used():
    decomposition, batch = mlp()

    some = verification(decomposition, [batch[:6], batch[6:]], steps=2, inputs=9, nulls=False)

    assert some.n_inputs == 9
    assert some.gates == verification(decomposition, [batch[:9]], steps=2, nulls=False).gates


def test_inputs_that_do_not_fit_into_memory_at_once_give_the_same_figures(monkeypatch: pytest.MonkeyPatch):
    decomposition, batch = mlp()
    whole = small(decomposition, batch)

    monkeypatch.setattr(_verify, "_NUMBERS", 600)
    parts = small(decomposition, batch)

    assert_close(parts.gates.damage, whole.gates.damage)
    assert_close(parts.damage, whole.damage)


def test_a_target_in_half_precision_keeps_its_damages():
    decomposition, batch = mlp()
    whole = small(decomposition, batch)
    pieces = {path: Pieces(own.v.float(), own.u.float(), own.owner) for path, own in decomposition.pieces.items()}
    target, batch = decomposition.target.bfloat16(), batch.bfloat16()

    found = small(result(target, batch, 0.5, lambda site: pieces[site.path]), batch)

    # bfloat16 has 8 bits, so that gates open on a few other inputs.
    assert abs(found.damage - whole.damage) < 0.1 * whole.damage


def test_batches_of_different_lengths_are_verified_together():
    decomposition, _ = mlp()
    batches = [normal(3, 5, 4), normal(4, 2, 4)]

    found = verification(decomposition, batches, steps=2, nulls=False)

    assert found.n_inputs == 7
    assert found.ledger.n_inputs == 3 * 5 + 4 * 2


# --- certified bounds ---


def test_the_bound_of_one_linear_output_is_the_mean_of_every_inputs_worst_vertex():
    decomposition, batch = linear(d_out=1)

    found = small(decomposition, batch, bound=True).bound

    assert found is not None
    assert_close(found.damage, worst_of_all_vertices(decomposition, batch, per_input=True))


class Pair(nn.Module):
    """A bilinear site that reads the output of another site."""

    def __init__(self):
        super().__init__()
        self.first, self.pair = nn.Linear(3, 2), nn.Bilinear(2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.first(x), self.first(x))


class Images(nn.Module):
    """A convolution that reads the output of another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 2, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).flatten(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), normal(8, 4)),
    "tokens": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)),
        torch.arange(15).reshape(5, 3) % 5,
    ),
    "bilinear": (Pair, normal(6, 3)),
    "images": (Images, normal(4, 1, 4, 3)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_the_bound_is_above_every_attack(name: str, divergence: str):
    model, batch = filled(MODELS[name][0]()), MODELS[name][1]
    decomposition = result(model, batch, 0.3, divergence=divergence)

    found = small(decomposition, batch, bound=True)

    assert found.bound is not None, found.bound_reason
    assert found.bound.evidence == "bound"
    assert found.bound.damage >= found.per_input.plateau > 0


@pytest.mark.parametrize("name", MODELS)
def test_with_every_gate_open_the_bound_is_nothing(name: str):
    model, batch = filled(MODELS[name][0]()), MODELS[name][1]

    found = small(result(model, batch, OPEN), batch, bound=True, steps=1).bound

    assert found is not None
    # The box widens by 1e-9 of its terms at every operation, and the damage is a square.
    assert found.damage < 1e-12


def own(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean(-1)


def mse(output: Tensor, target: Tensor) -> Tensor:
    return 2 * (output - target).square().mean(-1)


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@pytest.mark.parametrize(
    ("model", "divergence", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 2), Wave()), "mse", "operation 'sin'"),
        (nn.Linear(4, 2), own, "divergence 'own' has no rule"),
        (nn.Linear(4, 2), mse, "divergence 'mse' is the caller's own"),
    ],
)
def test_where_there_is_no_bound_the_reason_is_given(
    model: nn.Module, divergence: str | Callable[[Any, Any], Tensor], reason: str
):
    batch = normal(3, 4)
    decomposition = result(filled(model), batch, 0.5, divergence=divergence)

    found = small(decomposition, batch, bound=True, steps=1)

    assert found.bound is None
    assert reason in found.bound_reason


def test_a_model_too_large_for_a_bound_says_so(monkeypatch: pytest.MonkeyPatch):
    decomposition, batch = mlp()
    monkeypatch.setattr(_certified, "_MOST_PRODUCTS", 1000)

    found = small(decomposition, batch, bound=True, steps=1)

    assert found.bound is None
    assert "too large" in found.bound_reason


# --- sizes ---


def test_sizes_count_what_the_gates_do():
    decomposition, batch = mlp()
    gates = decomposition._gates(decomposition.sites[0], (batch,))

    found = small(decomposition, batch).sites[0]

    assert found.live == int(gates.any(0).sum())
    assert_close(found.active, float(gates.sum(1).mean()))


def test_every_row_of_a_site_is_named_and_the_residual_is_paid_once_per_output():
    """A token model has three rows an input and three outputs; the pooled one has one output."""

    class Pooled(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).mean(1)

    batch = MODELS["tokens"][1]
    layers = (nn.Embedding(5, 4), nn.Linear(4, 5))
    rows = small(result(filled(nn.Sequential(*layers)), batch, 0.3), batch).ledger
    pooled = small(result(filled(Pooled(*layers)), batch, 0.3), batch)

    assert_close(pooled.ledger.naming, rows.naming)
    assert_close(pooled.ledger.residual, 5 * pooled.stochastic.divergence / math.log(2))
    assert (rows.n_inputs, pooled.ledger.n_inputs) == (15, 5)


# --- contract ---


def test_the_same_seed_gives_the_same_result():
    decomposition, batch = mlp()

    assert small(decomposition, batch, nulls=True) == small(decomposition, batch, nulls=True)


def test_another_seed_draws_other_sources():
    decomposition, batch = mlp()

    assert small(decomposition, batch, seed=1).stochastic != small(decomposition, batch).stochastic


def test_the_target_and_the_global_random_state_are_as_before():
    decomposition, batch = mlp()
    target, random = decomposition.target, torch.get_rng_state()
    before = {name: value.clone() for name, value in target.state_dict().items()}

    small(decomposition, batch, nulls=True, bound=True)

    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all("forward" not in module.__dict__ and not module.training for module in target.modules())


def test_a_verification_prints_every_regime_with_its_evidence():
    decomposition, batch = mlp()

    printed = str(small(decomposition, batch, nulls=True, bound=True))

    for words in ("exact", "estimate", "counterexample", "bound", "8 steps x 3 restarts", "NOT CONVERGED"):
        assert words in printed
    for words in ("random directions", "SVD", "rows", "columns", "dense", "naming", "remainder", "per input"):
        assert words in printed


def test_a_verification_is_json():
    decomposition, batch = mlp()

    values = small(decomposition, batch, nulls=True, bound=True).to_dict()

    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["shared"]["plateau"] == values["shared"]["damages"][-1]


def test_progress_rises_to_its_total():
    decomposition, batch = mlp()
    seen: list[tuple[int, int]] = []

    small(decomposition, batch, nulls=True, on_progress=lambda *done: seen.append(done))

    counts = [done for done, _ in seen]
    assert counts == sorted(counts)
    assert seen[-1][0] == seen[-1][1] == 8 * 2 + 8 * 4


@pytest.mark.parametrize("name", ["steps", "restarts", "inputs"])
def test_a_setting_below_one_is_refused(name: str):
    decomposition, batch = mlp()

    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        small(decomposition, batch, **{name: 0})


def test_inputs_on_which_nothing_matters_are_refused():
    model = filled(nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU()))
    decomposition = result(model, normal(2, 4), 0.5)

    with pytest.raises(ValueError, match="ablating every component does not change the output"):
        small(decomposition, torch.zeros(2, 4, dtype=torch.float64))


def test_a_divergence_that_is_not_one_number_an_input_is_refused():
    decomposition, batch = mlp(divergence=lambda output, target: (output - target).square().mean(0))

    with pytest.raises(ValueError, match="one number per input or position"):
        small(decomposition, batch)
