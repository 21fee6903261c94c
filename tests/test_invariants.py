"""The invariants of SPEC.md that belong to no single part of the engine."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import QUICK, Calls, drawn, mlp, seeded, sparse
from weightdecomp import _gatekeeper, _trade
from weightdecomp._attack import Ablation
from weightdecomp._divergence import choose, mse
from weightdecomp._fit import chosen_start
from weightdecomp._gatekeeper import Gatekeeper
from weightdecomp._pieces import Pieces
from weightdecomp._sample import taken
from weightdecomp._sites import find_sites

pytestmark = pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")

X = sparse(64, 5)


def lived_in() -> nn.Module:
    """A target with everything that a user may have done to a model."""
    model = mlp(widths=(5, 8, 8, 3))
    model[0].register_forward_hook(lambda m, args, output: output)
    model[2].register_forward_pre_hook(lambda m, args: args)
    model[2].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones(3, 8)
    model[1].train()
    model[0].remark = "mine"
    model.register_buffer("steps", torch.tensor(7))
    return model


def state_of(model: nn.Module) -> list[Any]:
    """All of a model that anyone could look at."""
    found: list[Any] = []
    for path, module in model.named_modules():
        found.append((path, type(module), {k: v for k, v in module.__dict__.items() if not isinstance(v, dict)}))
        hooks = {k: dict(v) for k, v in module.__dict__.items() if isinstance(v, dict) and "hooks" in k}
        found.append((path, hooks, list(module._modules), list(module._parameters)))
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if x.grad is None else (id(x.grad), x.grad.tolist())
        found.append((name, id(x), x.data_ptr(), x._version, x.tolist(), grad, x.requires_grad))
    return found


def state_of_the_process() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        [str(part) for part in numpy.random.get_state()],  # noqa: NPY002
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_anomaly_enabled(),
    ]


@contextmanager
def nothing_changes(model: nn.Module) -> Iterator[None]:
    before = state_of(model), state_of_the_process()
    yield
    assert state_of(model) == before[0]
    assert state_of_the_process() == before[1]


def test_decomposing_changes_neither_the_target_nor_the_process(quick: None):
    model = lived_in()

    with nothing_changes(model):
        wd.decompose(model, [X], config=QUICK, progress=False)


@pytest.mark.parametrize("grad", [True, False])
def test_the_mode_of_gradients_is_the_callers(grad: bool, quick: None):
    model = lived_in()

    with torch.set_grad_enabled(grad), nothing_changes(model):  # noqa: TID251
        wd.decompose(model, [X], config=QUICK, progress=False)


def test_no_module_of_the_engine_draws_from_pythons_own_generator():
    """The shape checks do, in the tests, so that its state says nothing here."""
    modules = [module for name, module in sys.modules.items() if name.startswith("weightdecomp")]

    assert len(modules) > 20
    assert not [module.__name__ for module in modules if random in vars(module).values()]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
def test_a_callback_that_raises_leaves_everything_as_it_was(error: type[BaseException], quick: None):
    model = lived_in()

    def stop(step: int, terms: dict[str, float]) -> None:
        raise error

    with nothing_changes(model), pytest.raises(error):
        wd.decompose(model, [X], config=QUICK, progress=False, on_step=stop)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 1, 3, 20, 60, 100])
def test_a_divergence_that_raises_leaves_everything_as_it_was(calls: int, error: type[BaseException], quick: None):
    """At the first call, and wherever in the run the others fall."""
    model, left = lived_in(), iter(range(calls))

    def failing(output: Tensor, target: Tensor) -> Tensor:
        if next(left, None) is None:
            raise error
        return mse(output, target)

    with nothing_changes(model), pytest.raises(error):
        wd.decompose(model, [X], config=QUICK, progress=False, divergence=failing)


@pytest.mark.parametrize(("error", "told"), [(RuntimeError, ValueError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_target_that_fails_in_the_middle_is_left_as_it_was(
    error: type[BaseException], told: type[BaseException], quick: None
):
    """The error is the model's own, raised while its sites are replaced; one of its inputs is told by their batch."""
    left = iter(range(9))

    def forward(m: Calls, x: Tensor) -> Tensor:
        hidden = m.first(x)
        if next(left, None) is None:
            raise error
        return m.second(hidden)

    model = seeded(Calls(forward, first=nn.Linear(5, 4), second=nn.Linear(4, 3)))

    with nothing_changes(model), pytest.raises(told):
        wd.decompose(model, [X], config=QUICK, progress=False)


def test_no_question_changes_the_target_or_the_process(decomposed: wd.Decomposition, tmp_path: Path):
    with nothing_changes(decomposed.target):
        masks = decomposed.importances(X)
        decomposed.ablate(X, masks)
        decomposed.top_inputs("0", 0, [X])
        decomposed.edit(remove=[decomposed.circuits[0]])
        decomposed.save(tmp_path)
        wd.load(tmp_path, decomposed.target)
        with pytest.raises(ValueError, match="mask of '0'"):
            decomposed.ablate(X, {"0": torch.ones(64, 99)})


def test_settings_and_inputs_stay_as_they_were(quick: None):
    inputs = [{"input": X.clone().requires_grad_()}]
    config = replace(QUICK)

    wd.decompose(Calls(lambda m, input: m.net(input), net=mlp()).eval(), inputs, config=config, progress=False)

    assert config == QUICK
    assert list(inputs[0]) == ["input"]
    assert torch.equal(inputs[0]["input"], X) and inputs[0]["input"].grad is None


@given(d_in=st.integers(1, 6), hidden=st.integers(1, 6), d_out=st.integers(1, 4), seed=st.integers(0, 2**16))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_components_and_remainder_are_the_weights(d_in: int, hidden: int, d_out: int, seed: int, quick: None):
    """F1, F2: whatever the shapes; all masks on is the target, and on the run's inputs nothing is left over."""
    model = mlp(torch.float64, (d_in, hidden, d_out), seed)
    inputs = drawn(48, d_in, seed=seed)
    try:
        decomposition = wd.decompose(model, [inputs], config=QUICK, progress=False)
    except ValueError as error:
        assert "nothing to decompose" in str(error)  # every hidden unit may be off on every input
        return

    for site in decomposition.sites:
        parts = [decomposition.component(site.path, c).weight for c in range(decomposition.parts[site.path].pieces.n)]
        assert_close(torch.stack(parts).sum(0) + decomposition.remainders[site.path], site.matrix(), rtol=0, atol=1e-10)
    keep = {path: torch.ones(parts.pieces.n) for path, parts in decomposition.parts.items()}
    target = model(inputs)
    assert_close(decomposition.ablate(inputs, keep, remainder=True), target, rtol=1e-10, atol=1e-10)
    # Up to the least share of the inputs' power that counts as reached.
    assert_close(decomposition.ablate(inputs, keep), target, rtol=1e-3, atol=1e-3)


def assert_same(one: wd.Decomposition, other: wd.Decomposition) -> None:
    assert one.outcome == other.outcome
    assert one.groups == other.groups
    for path, parts in one.parts.items():
        tensors = (*parts.pieces, parts.thresholds, parts.frequencies)
        others = (*other.parts[path].pieces, other.parts[path].thresholds, other.parts[path].frequencies)
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def _two_inputs() -> nn.Module:
    return seeded(Calls(lambda m, x, y: m.a(x) * m.b(y), a=nn.Linear(5, 3), b=nn.Linear(5, 3)))


def test_the_same_seed_gives_the_same_result_whatever_the_global_generators(quick: None):
    """R1."""
    first = wd.decompose(mlp(), [X], config=QUICK, seed=3, progress=False)

    with torch.random.fork_rng(devices=[]):
        torch.rand(7)
        again = wd.decompose(mlp(), iter([X]), config=QUICK, seed=3, progress=False)

    assert_same(again, first)


def test_another_seed_draws_other_numbers(quick: None):
    """R1 would hold for a seed that is not used at all."""
    seen: dict[int, list[dict[str, float]]] = {0: [], 1: []}

    for seed, terms in seen.items():
        wd.decompose(
            mlp(),
            [X],
            config=QUICK,
            seed=seed,
            progress=False,
            on_step=lambda step, found, terms=terms: terms.append(found),
        )

    assert seen[0] != seen[1]


def test_the_order_of_named_inputs_does_not_matter(quick: None):
    """R1."""
    x, y = sparse(64, 5), sparse(64, 5, seed=2)

    first = wd.decompose(_two_inputs(), [{"x": x, "y": y}], config=QUICK, progress=False)
    second = wd.decompose(_two_inputs(), [{"y": y, "x": x}], config=QUICK, progress=False)

    assert_same(first, second)


def gatekeeper_of(model: nn.Module, inputs: Tensor, scale: float) -> Gatekeeper:
    """The gates of a model in float64 whose starts are written in another gauge."""
    sites, _ = find_sites(model, inputs)
    metric = choose("mse", model(inputs), False)
    sample = taken(model, [inputs], sites, metric, 256, torch.Generator().manual_seed(0))
    pieces = {}
    for site in sites:
        own = chosen_start(model, sample, site, metric, 0.02, wd.Config(), 0.02).pieces
        pieces[site.path] = Pieces(own.v * scale, own.u / scale, own.owner)
    return Gatekeeper(Ablation(model, sites, pieces, metric, {}), sample, 0.02, 0)


def test_scores_do_not_depend_on_the_scale_of_the_factors():
    """G1: scaling u by s and v by 1/s changes no gate, no damage and no bit."""
    model, inputs = mlp(torch.float64), sparse(128, 5, torch.float64)

    plain, scaled = (gatekeeper_of(model, inputs, scale).gates() for scale in (1.0, 37.0))

    assert_close(scaled.damage, plain.damage, rtol=1e-9, atol=0)
    assert_close(scaled.ledger.total, plain.ledger.total, rtol=1e-9, atol=0)
    assert_close(scaled.thresholds, plain.thresholds, rtol=1e-9, atol=1e-12)
    for path, calls in plain.importances.items():
        assert all(torch.equal(a, b) for a, b in zip(calls, scaled.importances[path], strict=True))


def permuted(model: nn.Module, order: Tensor) -> nn.Module:
    """The same function with the hidden neurons in another order."""
    other = mlp(torch.float64)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
    return other


@pytest.mark.parametrize("seed", range(3))
def test_the_work_of_a_start_does_not_depend_on_the_order_of_neurons(seed: int):
    """G1, float64; every member of the portfolio, at both sites."""
    model, inputs = mlp(torch.float64), sparse(256, 5, torch.float64)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    works = []
    for target in (model, permuted(model, order)):
        sites, _ = find_sites(target, inputs)
        metric = choose("mse", target(inputs), False)
        sample = taken(target, [inputs], sites, metric, 256, torch.Generator().manual_seed(0))
        works.append([chosen_start(target, sample, site, metric, 0.02, wd.Config(), 0.01).work for site in sites])

    for one, other in zip(*works, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_close(other[name], value, rtol=1e-9, atol=0)


def test_the_result_does_not_depend_on_the_order_of_neurons(quick: None, monkeypatch: pytest.MonkeyPatch):
    """G1: same damage, bits and pattern of importances, component by component; without attacks, whose draws do."""
    monkeypatch.setattr(_gatekeeper, "_PLAYS", 0)
    monkeypatch.setattr(_trade, "_ROUNDS", 10)  # prices as accurate as in a run
    model, inputs = mlp(torch.float64), sparse(256, 5, torch.float64)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    config = wd.Config(steps=0, sample=256)

    one, other = (
        wd.decompose(target, [inputs], config=config, progress=False) for target in (model, permuted(model, order))
    )

    assert_close(other.outcome.damage, one.outcome.damage, rtol=1e-6, atol=0)
    assert_close(other.ledger.total, one.ledger.total, rtol=1e-9, atol=0)
    for path, importance in one.importances(inputs).items():
        columns = sorted(importance.T.tolist())
        assert sorted(other.importances(inputs)[path].T.tolist()) == columns


def test_damage_is_measured_at_the_final_output():
    """M1: the same site with the same inputs; only what comes after it differs."""
    model = mlp(torch.float64)
    deaf = mlp(torch.float64)
    with torch.no_grad():
        deaf[2].weight[:, 4:] = 0
    inputs = sparse(256, 5, torch.float64)
    found = []
    for target in (model, deaf):
        sites, _ = find_sites(target, inputs, ["0"])
        metric = choose("mse", target(inputs), False)
        sample = taken(target, [inputs], sites, metric, 256, torch.Generator().manual_seed(0))
        rows = Pieces(sites[0].matrix(), torch.eye(8).double(), torch.arange(8))
        gated = Gatekeeper(Ablation(target, sites, {"0": rows}, metric, {}), sample, 0.02, 0).gates()
        found.append(gated.importances["0"][0].any(0).tolist())

    assert any(found[0][4:]) and any(found[1][:4])
    assert not any(found[1][4:])


def test_importances_are_never_trained_on(decomposed: wd.Decomposition):
    """M2: they are functions of what was found, without a parameter or a gradient of their own."""
    x = X.clone().requires_grad_()

    found = decomposed.importances(x)

    assert not any(importance.requires_grad for importance in found.values())
    for parts in decomposed.parts.values():
        assert not any(tensor.requires_grad for tensor in (*parts.pieces, parts.thresholds, parts.frequencies))


def test_gates_used_as_masks_are_not_what_a_run_reports(quick: None, monkeypatch: pytest.MonkeyPatch):
    """M2: the damage of a result is what the adversary found, which importances alone as masks never show."""
    damages: list[float] = []
    measured = Gatekeeper._damage

    def kept(self: Gatekeeper, *args: Any) -> float:
        damages.append(measured(self, *args))
        return damages[-1]

    monkeypatch.setattr(Gatekeeper, "_damage", kept)
    model = mlp(widths=(5, 8, 8, 3))
    decomposition = wd.decompose(model, [X], config=QUICK, progress=False)

    inputs = X[48:]  # the inputs that the run held out
    output = decomposition.ablate(inputs, decomposition.importances(inputs))
    nothing = mse(decomposition.ablate(inputs, {}), model(inputs)).mean()
    as_masks = float((mse(output, model(inputs)).mean() / nothing).detach())
    assert decomposition.outcome.damage in damages
    assert decomposition.outcome.damage > 1.01 * as_masks
