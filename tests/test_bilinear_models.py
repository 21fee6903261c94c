import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import weightdecomp as wd
from bilinear import (
    BilinearAttention,
    BilinearMLP,
    GatedLayer,
    GatedMLP,
    Layer,
    adversarial_directions,
    centred,
    data_metric,
    diagnosis,
    eigen,
    neuron_squares,
    norm,
    output_range,
    plot_spectra,
    plot_vectors,
    read,
    read_linears,
    read_packed,
    shared_squares,
    to_decomposition,
    truncate,
    write_back,
)
from bilinear._modules import NormModule
from tests.bilinear_models import KINDS, bilinear_layer
from tests.models import drawn, seeded


class Foreign(nn.Module):
    """A gated MLP in the names of Llama's, with any function of its two halves."""

    def __init__(self, act_fn: object = None, function: object = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down_proj = nn.Linear(6, 4, bias=False)
        self.act_fn, self.function = act_fn, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        gate = self.act_fn(gate) if self.act_fn is not None else gate  # type: ignore[operator]
        return self.down_proj(gate * self.up_proj(x))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(4, 12), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.linear_in(x).chunk(2, -1)
        return self.linear_out(left * right)


class PackedGate(nn.Module):
    """In the names of Phi-3's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(4, 12, bias=False), nn.Linear(6, 4, bias=False)
        self.activation_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * self.activation_fn(gate))


class Shifted(BilinearMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class OwnNorm(nn.Module):
    """An RMSNorm by no usual name, with gain offset + weight: offset 1 is Gemma's."""

    def __init__(self, d: int, offset: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = nn.Parameter(drawn(d)), 1e-5, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.offset + self.weight) * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@pytest.mark.parametrize(
    "module",
    [
        BilinearMLP(4, 6, bias=True, residual=True, norm=nn.RMSNorm(4)),
        BilinearMLP(4, 6, 3, norm=nn.LayerNorm(4)),
        BilinearMLP(4, 6, 3),
        GatedMLP(4, 6, gate="gelu", bias=True),
        Foreign(),
        Foreign(nn.SiLU()),
        Foreign(nn.GELU()),
        Foreign(nn.GELU("tanh")),
        Foreign(F.relu),
        Packed(),
        PackedGate(),
    ],
    ids=[
        "residual and norm", "layer norm", "plain", "gated", "no gate", "silu", "gelu", "gelu by tanh", "relu",
        "packed", "packed gate",
    ],
)  # fmt: skip
def test_a_module_is_read_exactly(module: nn.Module):
    """B10."""
    module = seeded(module).double()
    x = drawn(16, 4)

    found = read(module)

    assert_close(found(x), module(x).detach(), rtol=1e-12, atol=1e-12)


def test_nn_bilinear_is_a_third_order_tensor():
    module = seeded(nn.Bilinear(4, 4, 3)).double()
    x, other = drawn(9, 4), drawn(9, 4, seed=2)

    assert_close(read(module)(x), module(x, x).detach(), rtol=1e-12, atol=1e-12)
    apart = read(module, shared=False)
    assert_close(apart(torch.cat([x, other], 1)), module(x, other).detach(), rtol=1e-12, atol=1e-12)
    assert_close(eigen(apart)(torch.cat([x, other], 1)), module(x, other).detach(), rtol=1e-11, atol=1e-11)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass shared=False"):
        read(nn.Bilinear(3, 2, 4))


def test_linear_maps_are_read_separately_and_packed():
    w, v, d, norm = (seeded(one).double() for one in (nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4), nn.RMSNorm(4)))
    packed = nn.Linear(4, 12).double()
    packed.weight.data, packed.bias.data = torch.cat([w.weight, v.weight]), torch.cat([w.bias, v.bias])
    x = drawn(8, 4)
    expected = (d(w(norm(x)) * v(norm(x))) + x).detach()

    assert_close(read_linears(w, v, d, residual=True, norm=norm)(x), expected)
    assert_close(read_packed(packed, d, residual=True, norm=norm)(x), expected)
    gated = read_linears(w, v, d, gate="silu")
    assert isinstance(gated, GatedLayer)
    assert_close(gated(x), d(F.silu(w(x)) * v(x)).detach())


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_read_by_what_it_computes(offset: float):
    module = seeded(BilinearMLP(4, 6, norm=OwnNorm(4, offset))).double()
    x = torch.cat([drawn(8, 4), 1e-3 * drawn(8, 4)])

    assert_close(read(module)(x), module(x).detach(), rtol=1e-12, atol=1e-12)


def test_what_computes_no_norm_is_refused():
    linears = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    with pytest.raises(TypeError, match="RMSNorm or a LayerNorm, got BatchNorm1d, which computes neither"):
        read_linears(*linears, norm=nn.BatchNorm1d(4))


@pytest.mark.parametrize("norm", [None, nn.RMSNorm(4)])
def test_half_precision_is_read_as_float32(norm: nn.Module | None):
    module = seeded(BilinearMLP(4, 6, norm=norm))
    layer = read(module.to(torch.bfloat16))

    assert isinstance(layer, Layer) and layer.w.dtype == torch.float32
    x = 1e-3 * drawn(8, 4).float()  # down to where a wrong eps would show
    assert_close(layer(x), module.float()(x).detach(), rtol=1e-4, atol=1e-12)


def test_reading_leaves_every_part_in_its_own_mode():
    module = seeded(Foreign()).train()
    module.up_proj.eval()

    read(module)

    assert {name for name, one in module.named_modules() if one.training} == {"", "gate_proj", "down_proj"}


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.Linear(4, 4), TypeError, "Linear is no bilinear or gated layer that is known"),
        (nn.Sequential(nn.Linear(4, 4)), TypeError, r"its children are \['0'\]"),
        (Foreign(torch.tanh), ValueError, "act_fn of the module is 'tanh'; pass gate="),
        (Foreign(lambda x: x + 1), ValueError, "act_fn of the module is '<lambda>'"),
    ],
)
def test_a_module_that_is_not_bilinear_is_refused(module: nn.Module, error: type, message: str):
    with pytest.raises(error, match=message):
        read(module)


def test_a_module_that_computes_something_else_is_refused():
    with pytest.raises(ValueError, match=r"does not compute d\(relu\(w x\) \* \(v x\)\): on random inputs it differs"):
        read(seeded(Foreign(nn.SiLU())), gate="relu")
    with pytest.raises(ValueError, match="Shifted does not compute"):
        read(seeded(Shifted(4, 6)))


def test_arguments_that_are_not_for_a_module_are_refused():
    with pytest.raises(ValueError, match="gate='relu': what a GatedMLP computes is known; leave gate out"):
        read(GatedMLP(4, 6), gate="relu")
    with pytest.raises(ValueError, match="attention is read without a residual path"):
        read(BilinearAttention(4, 2), residual=True)


@pytest.mark.usefixtures("types_unchecked")
def test_packed_linears_of_another_kind_are_refused():
    with pytest.raises(TypeError, match=r"packed must be an nn\.Linear, got Conv1d"):
        read_packed(nn.Conv1d(4, 6, 1), nn.Linear(3, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "function", [norm, neuron_squares, centred, diagnosis, output_range, lambda one: data_metric(one, drawn(3, 4))]
)
@pytest.mark.usefixtures("types_unchecked")
def test_what_is_no_layer_is_refused(function: Callable[[object], object]):
    for module in (nn.Linear(4, 4), GatedLayer(bilinear_layer(4, 6, 4), "silu")):
        with pytest.raises(TypeError, match=f"expected a bilinear.Layer, got {type(module).__name__}"):
            function(module)


@pytest.mark.parametrize("kind", KINDS)
def test_components_run_in_the_original_model(kind: str):
    """B11: any subset, as weights, equals what the components say."""
    layer = bilinear_layer(4, 6, 3, kind)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), layer.module(), nn.Linear(3, 2)).double().eval()
    x = drawn(8, 5)
    squares = eigen(layer).squares()
    kept = squares.select([0, 3, 5])

    whole, part = write_back(model, {"2": squares}), write_back(model, {"2": kept})

    inner = model[1](model[0](x))
    assert_close(whole(x), model(x))
    assert_close(part(x), model[3](kept(inner)))
    assert isinstance(part[2], BilinearMLP)
    reread = read(part[2])
    assert isinstance(reread, Layer)
    assert_close(reread(inner), kept(inner))


def test_writing_back_leaves_the_model_alone_and_names_missing_modules():
    layer = bilinear_layer(4, 6, 3)
    model = nn.Sequential(layer.module().float())
    before = model[0]

    changed = write_back(model, {"0": truncate(layer, 1).squares})

    assert model[0] is before and changed[0] is not before
    assert next(changed.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"no module at 'mlp'; the model has \['0'"):
        write_back(model, {"mlp": layer})


@pytest.fixture(scope="module")
def decomposed() -> tuple[nn.Module, wd.Decomposition, torch.Tensor]:
    layer = bilinear_layer(5, 6, 3, "biases").to(torch.float32)
    model = nn.Sequential(nn.Linear(5, 5, bias=False), layer.module()).eval()
    model[0].weight.data = torch.eye(5)
    x = drawn(256, 5).float()
    config = wd.Config(sample=128, batch=64)
    found = to_decomposition(model, [x], {"1": eigen(layer).squares()}, tolerance=0.1, divergence="mse", config=config)
    return model, found, x


def test_the_engine_takes_components_as_its_own(decomposed: tuple):
    """B12: exact sum, the target's output, gates, ablation, edit, circuits."""
    model, found, x = decomposed

    assert [site.path for site in found.sites] == ["1.read", "1.write"]
    assert_close(found.target(x), model(x), rtol=1e-4, atol=1e-4)
    assert all(float(rest.abs().max()) < 1e-5 for rest in found.remainders.values())
    keep = {path: torch.ones(found.parts[path].pieces.n) for path in found.parts}
    assert_close(found.ablate(x, keep), model(x), rtol=1e-4, atol=1e-4)
    assert {member for circuit in found.circuits for member in circuit.members} == {
        (path, index) for path in found.parts for index in range(found.parts[path].pieces.n)
    }
    gone = found.edit(remove=[("1.write", 0)])
    off = dict(keep) | {"1.write": torch.tensor([0.0] + [1.0] * (found.parts["1.write"].pieces.n - 1))}
    assert_close(gone(x), found.ablate(x, off), rtol=1e-4, atol=1e-4)
    assert "1.read" in str(found)


def test_the_engine_verifies_and_saves_them(decomposed: tuple, tmp_path: Path):
    _, found, x = decomposed

    checked = found.verify([x[:64]], steps=4, restarts=1, nulls=False, bound=False)
    found.save(tmp_path / "saved")
    again = wd.load(tmp_path / "saved", found.target)

    assert checked.unmasked.damage < 1e-6
    assert_close(again.importances(x)["1.read"], found.importances(x)["1.read"])


def test_given_components_that_do_not_fit_are_refused():
    model, x = nn.Sequential(nn.Linear(3, 2)), drawn(32, 3).float()

    with pytest.raises(ValueError, match=r"components of '0' have shapes \(2, 2\) and \(2, 2\), expected \(n, 3\)"):
        wd.assemble(model.eval(), [x], {"0": (torch.eye(2), torch.eye(2))})


@pytest.mark.usefixtures("types_unchecked")
def test_only_layers_and_components_are_written_back():
    layer, x = bilinear_layer(4, 6, 3), drawn(8, 4)
    model = nn.Sequential(layer.module())

    with pytest.raises(TypeError, match="'0': expected a bilinear.Layer or Squares, got Truncation; .* fit .squares"):
        write_back(model, {"0": truncate(layer, 1)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="'0': expected bilinear.Squares, got Layer; .* bilinear.neuron_squares"):
        to_decomposition(model, [x], {"0": layer})  # type: ignore[dict-item]


def test_adversarial_directions_raise_their_output_more_than_others():
    layer = bilinear_layer(12, 20, 3)
    found = eigen(layer)

    for specific in (True, False):
        directions = adversarial_directions(found, 1, k=3, n=2, specific=specific)

        assert directions.shape == (2, 12)
        assert_close(directions.norm(dim=1), torch.ones(2).double())
        assert (directions.sum(1) >= 0).all()
        y = layer(10 * directions)
        assert (y[:, 1] > 0).all()
        assert (y.argmax(1) == 1).all()


def test_what_is_no_adversary_is_refused():
    found = eigen(bilinear_layer(3, 4, 2))

    with pytest.raises(ValueError, match="pass the pairs of several directions"):
        adversarial_directions(found[0], 0)
    with pytest.raises(ValueError, match="output 2: the pairs are of outputs 0 to 1"):
        adversarial_directions(found, 2)
    with pytest.raises(ValueError, match="positive eigenvalues among its pairs, 3 were asked for"):
        adversarial_directions(eigen(bilinear_layer(2, 1, 2)), 0, k=3, n=3)


def test_a_diagnosis_measures_concentration():
    flat = Layer(torch.eye(8).double(), torch.eye(8).double(), torch.ones(1, 8).double())
    peaked = Layer(torch.eye(8).double(), torch.eye(8).double(), torch.tensor([[1.0] + [1e-6] * 7]).double())
    inputs = torch.cat([torch.zeros(999, 8), torch.ones(1, 8)]).double()
    inputs[:, 1:] = 1

    even, one = diagnosis(flat, k=2, inputs=inputs), diagnosis(peaked, k=1, inputs=inputs)

    assert float(even.effective_rank) == pytest.approx(8) and float(even.leading_share) == pytest.approx(0.25)
    assert float(one.effective_rank) == pytest.approx(1, abs=1e-4) and float(one.pixel_count) == pytest.approx(1)
    assert float(one.outlier_share) == pytest.approx(1)
    assert torch.isnan(diagnosis(flat, k=2).outlier_share).all()
    assert "effective rank 8.0" in str(even) and "nan" not in str(even)


def test_plots_draw_spectra_and_vectors(tmp_path: Path):
    pytest.importorskip("matplotlib")
    found = eigen(bilinear_layer(12, 16, 3, "biases"))

    plot_spectra(found, labels=["a", "b", "c"]).savefig(tmp_path / "spectra.svg")
    plot_vectors(found, (3, 4), k=2).savefig(tmp_path / "vectors.png")

    assert (tmp_path / "spectra.svg").stat().st_size > 1000 and (tmp_path / "vectors.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="vectors have 12 entries, images of 2x5 do not fit"):
        plot_vectors(found, (2, 5))


@pytest.mark.parametrize("k", [1, 8])
def test_layers_follow_the_device_and_dtype_of_their_weights(k: int):
    layer = bilinear_layer(8, 9, 2, "biases").to(torch.float32)

    for found in (eigen(layer, k=k).squares(), truncate(layer, k).squares, shared_squares(layer, 2, steps=2).squares):
        assert found.vectors.dtype == found.writes.dtype == torch.float32
    assert neuron_squares(layer).layer().w.device == layer.w.device


def test_a_norm_module_follows_its_model():
    layer = bilinear_layer(4, 6, 3, "layer norm")

    module = layer.module().float()

    assert isinstance(module.norm, NormModule) and module.norm.norm().gain is not None
    assert module(drawn(2, 4).float()).dtype == torch.float32


def test_importing_the_package_imports_neither_the_engine_nor_matplotlib():
    heavy = ["weightdecomp", "matplotlib", "tensorly"]
    code = f"import sys, bilinear, json; print(json.dumps([m for m in {heavy} if m in sys.modules]))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert json.loads(found.stdout) == []
