from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from bilinear import BilinearMLP, GatedLayer, GatedMLP, bilinear_finetuned, read
from tests.bilinear_models import bilinear_layer, cases
from tests.models import drawn

GATES = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


@given(**cases, gate=st.sampled_from(sorted(GATES)))
def test_the_split_is_exact_and_the_remainder_within_its_bound(
    d_in: int, hidden: int, d_out: int, kind: str, seed: int, gate: str
):
    """B7."""
    full = bilinear_layer(d_in, hidden, d_out, kind, seed)
    layer, x = GatedLayer(full, gate), 2 * drawn(20, d_in, seed=seed)

    z = x if full.norm is None else full.norm(x)
    left, right = F.linear(z, full.w, full.w_bias), F.linear(z, full.v, full.v_bias)
    expected = F.linear(GATES[gate](left) * right, full.d, full.d_bias) + full.beside(x)
    scale = 1e-12 * (1 + float(((left * right).abs() @ full.d.abs().T).max()) + float(expected.abs().max()))
    assert_close(layer(x), expected, rtol=0, atol=scale)
    assert_close(layer.bilinear(x) + layer.remainder(x), expected, rtol=0, atol=scale)
    assert (layer.remainder(x).abs() <= layer.bound(x) + scale).all()


@pytest.mark.parametrize("gate", sorted(GATES))
def test_the_bound_is_reached_by_one_neuron_with_a_large_input(gate: str):
    full = bilinear_layer(1, 1, 1)
    layer, x = GatedLayer(full, gate), torch.tensor([[100.0]]).double()

    assert float(layer.remainder(x).abs()) == pytest.approx(float(layer.bound(x)), rel=1e-6)


def test_small_inputs_are_bilinear_and_large_ones_are_not():
    layer = GatedLayer(bilinear_layer(6, 12, 4), "silu")
    small, large = layer.share(0.001 * drawn(200, 6)), layer.share(100 * drawn(200, 6))

    assert small.explained > 0.999 and small.bound < 0.01
    assert large.explained < 0.9
    assert small.factor == pytest.approx(1, abs=0.01)
    for one in (small, large):
        assert 1 - one.explained <= one.bound * (1 + 1e-9)
        assert one.scaled >= one.explained - 1e-12
    assert "explains" in str(small)


def test_the_shares_are_what_they_say():
    layer, x = GatedLayer(bilinear_layer(5, 7, 3), "gelu"), drawn(50, 5)
    y, half = layer(x), layer.bilinear(x)

    found = layer.share(x)

    energy = float(y.square().sum(1).mean())
    assert found.output == pytest.approx(energy)
    assert found.explained == pytest.approx(1 - float((y - half).square().sum(1).mean()) / energy)
    best = float((y * half).sum() / half.square().sum())
    assert found.factor == pytest.approx(best)
    assert found.scaled == pytest.approx(1 - float((y - best * half).square().sum(1).mean()) / energy)


def test_an_annealed_gate_is_half_a_bilinear_layer():
    for gate in GATES:
        module = GatedMLP(4, 6, 3, gate=gate, bias=True).double()
        x = drawn(5, 4)
        assert_close(module(x), module.d(GATES[gate](module.w(x)) * module.v(x)))
        module.sharpness = 0.0
        assert_close(module(x), module.d(module.w(x) * module.v(x) / 2))


def test_finetuning_ends_at_a_bilinear_model_that_computes_what_was_trained():
    torch.random.default_generator.manual_seed(0)
    model = nn.Sequential(GatedMLP(5, 16, 4), nn.Linear(4, 3))
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(256, 5, generator=rng)
    with torch.no_grad():
        y = model(x)
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen: list[tuple[float, float]] = []

    tuned = bilinear_finetuned(
        model, [x] * 500, lambda m, batch: (m(batch) - y).square().mean(), rate=1e-2,
        on_step=lambda step, loss, sharpness: seen.append((loss, sharpness)),
    )  # fmt: skip

    assert isinstance(tuned[0], BilinearMLP) and isinstance(model[0], GatedMLP)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert seen[0][1] > 0.9 and all(sharpness == 0 for _, sharpness in seen[150:])
    final = float((tuned(x) - y).square().mean().detach())
    assert final < seen[149][0] and final < 0.1 * float(y.var())
    layer = read(tuned[0])
    assert_close(layer(x), tuned[0](x))


def test_what_cannot_be_finetuned_is_refused():
    with pytest.raises(ValueError, match="no bilinear.GatedMLP"):
        bilinear_finetuned(nn.Linear(2, 2), [1], lambda m, b: torch.zeros(()))
    with pytest.raises(ValueError, match="batches are empty"):
        bilinear_finetuned(GatedMLP(2, 3), [], lambda m, b: torch.zeros(()))
    with pytest.raises(ValueError, match=r"anneal must be in \(0, 1\], got 2"):
        bilinear_finetuned(GatedMLP(2, 3), [1], lambda m, b: torch.zeros(()), anneal=2.0)
    with pytest.raises(ValueError, match="gate must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', got 'tanh'"):
        GatedMLP(2, 3, gate="tanh")
    with pytest.raises(ValueError, match="x is empty"):
        GatedLayer(bilinear_layer(3, 4, 2), "silu").share(drawn(0, 3))
    with pytest.raises(ValueError, match="neither norm nor skip"):
        GatedLayer(bilinear_layer(3, 4, 2, "rms"), "silu").module()


def test_a_gated_layer_becomes_a_module_of_its_own():
    layer, x = GatedLayer(bilinear_layer(3, 4, 2, "biases"), "gelu"), drawn(5, 3)

    assert_close(layer.module()(x), layer(x))
