import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import QUICK, drawn, mlp, sparse
from weightdecomp import _rounds
from weightdecomp._attack import Ablation
from weightdecomp._divergence import choose
from weightdecomp._frame import frame
from weightdecomp._gate import gated
from weightdecomp._refine import Refiner, Terms
from weightdecomp._sites import find_sites
from weightdecomp._starts import Reach, column_start, row_start, svd_start

EXACT = {torch.float32: 2e-6, torch.float64: 1e-12}  # relative, after steps of a tenth of each factor's size


def refiner(start: str, dtype: torch.dtype) -> tuple[Refiner, nn.Module, Tensor]:
    """A refiner of a two-layer MLP, with large steps."""
    model, x = mlp(dtype), sparse(64, 5, dtype)
    sites, _ = find_sites(model, x)
    pieces, frames = {}, {}
    with torch.no_grad():
        for site, rows in zip(sites, (x, model[:2](x)), strict=True):
            reach = Reach(site.matrix(), rows)
            found = {"svd": svd_start(reach), "rows": row_start(reach), "columns": column_start(reach, site.matrix())}
            pieces[site.path] = found[start]
            frames[site.path] = frame(reach.basis, reach.power, reach.weight[:0], site.matrix(), pieces[site.path])
    ablation = Ablation(model, sites, pieces, choose("mse", x, False), {})
    config = wd.Config(steps=20, rate=0.1)
    return Refiner(ablation, frames, 1.0, config, torch.Generator().manual_seed(0)), model, x


def steps(state: Refiner, x: Tensor, n: int, first: int = 0) -> list[Terms]:
    thresholds = {path: torch.full((2, own.n), 0.1).to(own.v.dtype) for path, own in state.ablation.pieces.items()}
    return [state.step(x, thresholds, first + i, 0.01) for i in range(n)]


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("start", ["svd", "rows", "columns"])
def test_components_sum_to_the_weights_after_every_step(start: str, dtype: torch.dtype):
    """F1, by construction: nothing in the loss asks for it."""
    state, model, x = refiner(start, dtype)
    before = state.detached()

    for step in range(6):
        steps(state, x, 1, step)

        for path, pieces in state.detached().items():
            weight = model.get_submodule(path).weight.detach()
            on_inputs = state.frames[path].basis
            error = (pieces.total() - weight) @ on_inputs
            assert float(error.norm() / (weight @ on_inputs).norm()) < EXACT[dtype]
    moved = [float((state.detached()[path].weight(0) - before[path].weight(0)).norm()) for path in before]
    assert min(moved) > 1e-3


def test_kept_components_stay_as_they_were_while_the_refinement_goes_on():
    state, _, x = refiner("rows", torch.float32)
    steps(state, x, 1)
    kept = state.detached()
    copies = {path: (pieces.v.clone(), pieces.u.clone()) for path, pieces in kept.items()}

    steps(state, x, 2, 1)

    for path, (v, u) in copies.items():
        assert torch.equal(kept[path].v, v)
        assert torch.equal(kept[path].u, u)


def test_the_start_is_not_changed_by_the_steps():
    state, _, x = refiner("columns", torch.float32)
    before = {path: (pieces.v.clone(), pieces.u.clone()) for path, pieces in state.ablation.pieces.items()}

    steps(state, x, 2)

    for path, (v, u) in before.items():
        assert torch.equal(state.ablation.pieces[path].v, v)
        assert torch.equal(state.ablation.pieces[path].u, u)


def test_a_restored_refiner_goes_on_as_the_saved_one():
    """R1: every number that the next step depends on is in the state."""
    state, _, x = refiner("svd", torch.float32)
    steps(state, x, 3)
    saved = {name: value.clone() for name, value in state.state().items()}
    expected = steps(state, x, 6, 3)

    other, _, _ = refiner("svd", torch.float32)
    other.restore(saved)

    assert steps(other, x, 6, 3) == expected
    for path, pieces in state.detached().items():
        assert torch.equal(other.detached()[path].v, pieces.v)
        assert torch.equal(other.detached()[path].u, pieces.u)


def test_sources_stay_within_zero_and_one():
    state, _, x = refiner("svd", torch.float32)

    steps(state, x, 12)

    for source in state.sources.values():
        assert float(source.min()) >= 0 and float(source.max()) <= 1


def test_steps_do_not_touch_the_target():
    state, model, x = refiner("svd", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    steps(state, x, 3)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def slow_gates(a: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Heights on the ramps and the arms they are on, as the glossary says: half way up at the threshold."""
    up = (a - thresholds[0]) / (0.5 * thresholds[0]) + 0.5
    down = (-a - thresholds[1]) / (0.5 * thresholds[1]) + 0.5
    arm = torch.where(up > down, 1 / (0.5 * thresholds[0]), -1 / (0.5 * thresholds[1]))
    return torch.maximum(up, down), arm


gate_sizes = {
    "shape": st.lists(st.integers(1, 4), max_size=1),
    "n": st.integers(1, 3),
    "attacked": st.integers(0, 5),
    "seed": st.integers(0, 2**16),
}


@given(**gate_sizes)
@settings(max_examples=30)
def test_masks_of_soft_gates_are_those_of_the_definition(shape: list[int], n: int, attacked: int, seed: int):
    a, thresholds = drawn(5, *shape, n, seed=seed), drawn(2, n, seed=seed + 1).abs()
    sources, pool = torch.rand_like(a), torch.rand(3, n + 1).double()

    mask, count = gated(a, thresholds, sources, pool, torch.zeros(attacked, dtype=torch.long))

    height, _ = slow_gates(a, thresholds)
    g = height.clamp(0, 1)
    assert_close(mask, g + (1 - g) * sources)
    assert_close(count, g.sum(-1).mean())


@given(**gate_sizes)
@settings(max_examples=30)
def test_gradients_of_soft_gates_are_those_of_the_definition(shape: list[int], n: int, attacked: int, seed: int):
    """Inside a ramp the true ones, and below it a leak where the loss wants the gate to rise."""
    a, thresholds = drawn(5, *shape, n, seed=seed).requires_grad_(), drawn(2, n, seed=seed + 1).abs()
    pool = torch.rand(3, n + 1).double().requires_grad_()
    group = torch.arange(attacked) % 3
    sources = torch.rand_like(a)
    rows = pool.detach()[group, :-1]
    sources[:attacked] = rows.reshape(attacked, *[1] * len(shape), n)
    by_mask, by_count = drawn(5, *shape, n, seed=seed + 2), 0.7

    mask, count = gated(a, thresholds, sources, pool, group)
    found, by_pool = torch.autograd.grad((mask * by_mask).sum() + by_count * count, [a, pool])

    height, arm = slow_gates(a.detach(), thresholds)
    g, n_rows = height.clamp(0, 1), a[..., 0].numel()
    by_g, inside = by_mask * (1 - sources), (height > 0) & (height < 1)
    by_height = by_g * inside + 0.01 * by_g.clamp_max(0) * (height <= 0)
    by_height = by_height + by_count / n_rows * inside
    assert_close(found, by_height * arm)
    leaf = pool.detach().requires_grad_()
    own = leaf[group, :-1].reshape(attacked, *[1] * len(shape), n)
    reference = ((1 - g[:attacked]) * own * by_mask[:attacked]).sum()
    expected = torch.autograd.grad(reference, leaf)[0] if attacked else torch.zeros_like(pool)
    assert_close(by_pool, expected)


def test_every_step_reports_every_term(quick: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_rounds, "_cheaper", lambda *_: True)
    seen: list[tuple[int, dict[str, float]]] = []

    wd.decompose(
        mlp(), [sparse(64, 5)], config=QUICK, progress=False, on_step=lambda step, terms: seen.append((step, terms))
    )

    assert [step for step, _ in seen] == [0, 1, 2, 3]
    for _, terms in seen:
        assert list(terms) == ["stochastic", "adversarial", "active", "price"]
        assert all(math.isfinite(value) and value >= 0 for value in terms.values())


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_a_round_that_does_not_pay_leaves_the_components_of_the_last_one_that_did(
    quick: None, monkeypatch: pytest.MonkeyPatch
):
    """F1 and F2 for the result of a refinement whose last steps were thrown away."""
    verdicts = iter([True, *[False] * 9])  # after the first round
    monkeypatch.setattr(_rounds, "_cheaper", lambda *_: next(verdicts))
    config = wd.Config(steps=20, sample=64, batch=32, rounds=4)

    decomposition = wd.decompose(mlp(), [sparse(64, 5)], config=config, progress=False)

    assert decomposition.outcome.steps == 5
    keep = {path: torch.ones(parts.pieces.n) for path, parts in decomposition.parts.items()}
    with torch.no_grad():
        assert_close(decomposition.ablate(sparse(64, 5), keep), mlp()(sparse(64, 5)), rtol=1e-5, atol=1e-6)


def test_a_step_has_as_many_rows_whatever_an_input_is():
    """1,024 rows are 1,024 inputs or 8 sequences of 128; longer sequences still come in eights."""
    assert [_rounds._per_step(1024, rows, 1) for rows in (1, 128, 512)] == [1024, 8, 8]
    assert _rounds._per_step(4, 128, 1) == 4
    assert _rounds._per_step(1024, 128, 12) == 12


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_steps_without_an_attacked_input_work_at_sites_with_positions(quick: None):
    model, seen = mlp(), list[float]()
    config = wd.Config(steps=2, sample=64, batch=16, adversarial=0.0)

    wd.decompose(
        model,
        [sparse(192, 5).reshape(64, 3, 5)],
        config=config,
        progress=False,
        on_step=lambda step, terms: seen.append(terms["adversarial"]),
    )

    assert seen == [0.0, 0.0]
