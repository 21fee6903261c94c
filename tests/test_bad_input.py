import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightdecomp as wd
from graphs import circuit_graph
from tests.models import QUICK, Calls, drawn, ids, mlp, seeded, sparse
from weightdecomp import _checkpoint, _storage
from weightdecomp._check import check_module, check_seed, unreadable_named

ROOT = Path(__file__).parents[1]
X = drawn(8, 5).float()


def decompose(model: nn.Module, batches: Any = None, **options: Any) -> wd.Decomposition:
    return wd.decompose(model, [X] if batches is None else batches, config=QUICK, progress=False, **options)


def spoilt(value: float) -> Tensor:
    x = X.clone()
    x[3, 2] = value
    return x


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], ValueError, "batches is empty; pass at least one batch"),
        (iter([]), ValueError, "batches is empty; pass at least one batch"),
        (
            [X, X[:0]],
            ValueError,
            r"batches\[1\] holds no inputs; every batch needs a tensor with a non-empty first axis",
        ),
        ([()], ValueError, r"batches\[0\] holds no inputs"),
        ([{"x": 3}], ValueError, r"batches\[0\] holds no inputs"),
        ([torch.tensor(1.0)], ValueError, r"batches\[0\] holds no inputs"),
        (X, TypeError, r"batches must be an iterable of batches, got one Tensor; write \[batch\]"),
        ({"input": X}, TypeError, r"got one dict; write \[batch\]"),
        (["text"], TypeError, r"batches\[0\] must be a tensor, a tuple or a dict of them, got str"),
        ([X, None], TypeError, r"batches\[1\] must be a tensor, .* got NoneType"),
        ([spoilt(math.nan)], ValueError, r"batches\[0\] contains NaN or infinity; drop or repair those inputs"),
        ([X, spoilt(-math.inf)], ValueError, r"batches\[1\] contains NaN or infinity"),
        ([{"input": spoilt(math.inf)}], ValueError, r"batches\[0\] contains NaN or infinity"),
        (
            [X.to("meta")],
            ValueError,
            r"batches\[0\] is on meta but the model is on cpu; move the batch with .to\('cpu'\)",
        ),
        ([X.long()], ValueError, "the model fails on the first batch: .*dtype.*; pass batches as the model takes them"),
        ([X[:, :4]], ValueError, "the model fails on the first batch: .*shapes cannot be multiplied"),
        ([(X, X)], ValueError, "the model fails on the first batch: .*a tuple of positional arguments"),
    ],
)
def test_batches_that_cannot_be_used_are_refused(batches: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        decompose(mlp(), batches)


def test_floats_where_token_ids_are_due_are_refused():
    with pytest.raises(ValueError, match="the model fails on the first batch: .*Long, Int; but got .*Float"):
        decompose(seeded(nn.Embedding(7, 4)), [X])


def test_token_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="index out of range .*vocabulary. the integers in it go from 0 to 8"):
        decompose(seeded(nn.Embedding(7, 4)), [ids(9, 8, 5)])


def _reader(m: Calls, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return m.read(m.table(x.reshape(-1, 5))) if mask is None else m.read(m.table(x)) * mask[..., None]


@pytest.mark.parametrize(
    "batches, message",
    [
        (
            [ids(7, 8, 5), ids(9, 8, 5)],
            r"batches\[1\] holds ids from 0 to 8, but the embedding 'table' has .* 0 to 6",
        ),
        ([ids(7, 8, 5), ids(7, 3, 5) - 1], r"batches\[1\] holds ids from -1 to 5, but the embedding 'table'"),
        ([{"x": ids(7, 8, 5)}, {"x": ids(9, 8, 5)}], r"batches\[1\] holds ids from 0 to 8, but the embedding 'table'"),
        ([ids(7, 8, 5), ids(7, 99, 4)], r"the model fails on batches\[1\]: .*; pass batches as the model takes them"),
        ([(ids(7, 8, 5), torch.ones(8, 5)), (ids(7, 99, 5), "x")], r"the model fails on batches\[1\]: .*str"),
    ],
    ids=["beyond", "negative", "by name", "another length", "no tensor"],
)
def test_a_later_batch_that_the_model_cannot_read_is_named(batches: list[Any], message: str):
    model = seeded(Calls(_reader, table=nn.Embedding(7, 4), read=nn.Linear(4, 3)))

    with pytest.raises(ValueError, match=message):
        decompose(model, batches)


@pytest.mark.parametrize(
    "call",
    [
        lambda found, x: found.importances(x),
        lambda found, x: found.ablate(x, {}),
        lambda found, x: circuit_graph(found, x),
    ],
    ids=["importances", "ablate", "graph"],
)
def test_ids_that_the_model_does_not_know_are_told_wherever_inputs_are_given(
    call: Callable[[wd.Decomposition, Any], Any],
):
    model = seeded(Calls(_reader, table=nn.Embedding(7, 4), read=nn.Linear(4, 3)))
    found = decompose(model, [ids(7, 64, 5)], sites=["read"])

    with pytest.raises(ValueError, match=r"fails on inputs: .*the integers in it go from 8 to 8.*; pass inputs as"):
        call(found, torch.full((2, 5), 8))


def test_a_batch_with_a_part_that_has_not_what_the_model_asks_for_is_refused():
    with pytest.raises(ValueError, match="the model fails on the first batch: .*str.* has no attribute 'sum'"):
        decompose(Calls(lambda m, x, y: x * y.sum()).eval(), [(X, "x")])


def test_what_fails_for_another_reason_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="not the model's"), unreadable_named(mlp(), [X]):
        raise RuntimeError("not the model's")


def test_a_batch_that_cannot_be_verified_is_named(decomposed: wd.Decomposition):
    x = drawn(4, 9).float()

    with pytest.raises(ValueError, match=r"the model fails on batches\[0\]: .*shapes cannot be multiplied"):
        decomposed.verify([x], steps=1)


def test_a_single_unbatched_input_is_told_apart_from_a_batch():
    with pytest.raises(ValueError, match="fails on the first input of the first batch alone: .* must count inputs"):
        decompose(seeded(nn.Conv1d(2, 3, 3)), [drawn(2, 6).float()])


@pytest.mark.parametrize(
    "seed, error, message",
    [
        (1.5, TypeError, "seed must be a whole number, got 1.5"),
        (None, TypeError, "seed must be a whole number, got None"),
        ("a", TypeError, "seed must be a whole number, got 'a'"),
        (10**25, ValueError, r"seed must be from -2\^63 to 2\^64 - 1, got 1000"),
    ],
)
def test_a_seed_that_torch_does_not_take_is_refused(seed: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        check_seed(seed)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_a_seed_that_torch_takes_is_fine(seed: int):
    check_seed(seed)
    torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1, 3.0, math.nan])
def test_a_tolerance_outside_its_range_is_refused(tolerance: float):
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1 .*got"):
        decompose(mlp(), tolerance=tolerance)


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("capacity", 0.5, "capacity must be at least 1 and finite, got 0.5"),
        ("steps", -1, "steps must be at least 0 and finite, got -1"),
        ("batch", 0, "batch must be at least 1 and finite, got 0"),
        ("sample", 0, "sample must be at least 1 and finite, got 0"),
        ("rounds", 0, "rounds must be at least 1 and finite, got 0"),
        ("rate", 0.0, "rate must be positive and finite, got 0.0"),
        ("adversarial", 1.5, r"adversarial must be in \[0, 1\], got 1.5"),
        ("capacity", math.nan, "capacity must be at least 1 and finite, got nan"),
        ("rate", math.inf, "rate must be positive and finite, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: float, message: str):
    with pytest.raises(ValueError, match=message):
        wd.Config(**{setting: value})


def test_settings_survive_a_round_trip():
    config = wd.Config(steps=7, rate=0.5)

    assert wd.Config.from_dict(config.to_dict()) == config


_UNCHECKED = {
    "wd.Config(steps='2')": "steps must be a whole number, got '2'",
    "wd.Config(steps=2.5)": "steps must be a whole number, got 2.5",
    "wd.Config(batch=True)": "batch must be a whole number, got True",
    "wd.Config(rate='fast')": "rate must be a number, got 'fast'",
    "wd.split(3)": "model must be a torch.nn.Module, got int",
    "wd.split(nn.Linear(2, 4), [])": "split: rows must be a dict, as in {'*.qkv': [('q', 64), ('k', 64)]}, got list",
    "wd.fold_norms(3, torch.ones(2, 2))": "model must be a torch.nn.Module, got int",
    "wd.load('out', None)": "model must be a torch.nn.Module, got NoneType",
    "wd.decompose(nn.Linear(2, 4), [torch.ones(2, 2)], seed=1.5)": "seed must be a whole number, got 1.5",
    "wd.sampled_batches(nn.Linear(2, 4), 2, seed=None)": "seed must be a whole number, got None",
}


def test_arguments_of_another_type_are_refused_in_words():
    """In a process of its own, since in this one jaxtyping checks annotations first."""
    lines = ["import torch", "from torch import nn", "import weightdecomp as wd"]
    for call in _UNCHECKED:
        lines += ["try:", f"    {call}", "except TypeError as error:", "    print(error)"]

    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )

    assert done.stderr == ""
    assert done.stdout.splitlines() == list(_UNCHECKED.values())


def test_a_function_in_place_of_a_model_is_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        check_module(lambda x: x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float):
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = value

    with pytest.raises(ValueError, match="parameter '2.weight' contains NaN or infinity"):
        decompose(model)


def test_outputs_that_are_not_finite_are_refused():
    model = nn.Sequential(mlp(), Calls(lambda m, x: x / 0)).eval()

    with pytest.raises(
        ValueError, match="the model's output on the first batch contains NaN or infinity; check the inputs"
    ):
        decompose(model)


def test_outputs_of_a_later_batch_that_are_not_finite_are_refused():
    model = nn.Sequential(mlp(), Calls(lambda m, x: x.exp())).eval()

    with pytest.raises(ValueError, match="contains NaN or infinity on the given batches; check the inputs' scale"):
        decompose(model, [X, 1e4 * X])


def test_outputs_that_are_not_finite_once_the_sites_are_ablated_are_refused():
    model = seeded(Calls(lambda m, x: m.a(x).square().log(), a=nn.Linear(5, 3, bias=False)))

    with pytest.raises(ValueError, match=r"what is left of it when \['a'\] are ablated, contains NaN or infinity"):
        decompose(model)


def _train(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *modules).train()


@pytest.mark.parametrize(
    "model, name",
    [
        (_train(nn.Dropout(0.1)), r"'1' \(Dropout\)"),
        (_train(nn.Sequential(nn.BatchNorm1d(6))), r"'1.0' \(BatchNorm1d\)"),
        (_train(nn.RReLU()), r"'1' \(RReLU\)"),
        (_train(nn.TransformerEncoderLayer(6, 2, 4, dropout=0.1)), r"'1.self_attn' \(MultiheadAttention\)"),
        (_train(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))), r"'1.parametrizations.weight.0'"),
    ],
    ids=["dropout", "batch norm", "rrelu", "attention", "spectral norm"],
)
def test_a_model_in_training_mode_is_refused_before_it_is_run(model: nn.Module, name: str):
    before = {key: value.clone() for key, value in model.state_dict().items()}

    with pytest.raises(ValueError, match=f"model is in training mode: {name}.*; call model.eval\\(\\) first"):
        decompose(model)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_training_mode_that_changes_nothing_is_fine(quick: None):
    model = seeded(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Dropout(0.0), nn.Linear(6, 2))).train()

    assert decompose(model).sites[0].path == "0"


def test_a_model_with_outputs_by_chance_is_refused_and_the_generators_stay_as_they_were():
    model = Calls(lambda m, x: F.dropout(m.a(x), training=True), a=nn.Linear(5, 3)).eval()
    state = torch.get_rng_state()

    with pytest.raises(
        ValueError, match=r"output changes between identical calls.*call model.eval\(\) and remove sampling"
    ):
        decompose(model)

    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_returns_its_loss_is_refused():
    with pytest.raises(TypeError, match="a single number for the whole batch"):
        decompose(nn.Sequential(mlp(), Calls(lambda m, x: x.mean())).eval())


def test_a_model_that_returns_no_tensor_is_refused():
    with pytest.raises(TypeError, match="the model returned str, from which no output tensor can be taken"):
        decompose(nn.Sequential(mlp(), Calls(lambda m, x: "positive")).eval())


def test_a_model_that_returns_its_decision_is_refused():
    with pytest.raises(ValueError, match="the model's output is torch.int64, expected floating point; .* argmax"):
        decompose(nn.Sequential(mlp(), Calls(lambda m, x: x.argmax(-1))).eval())


@pytest.mark.parametrize("last", [torch.no_grad()(torch.relu), torch.round], ids=["no_grad", "round"])
def test_a_model_without_gradients_is_refused(last: Callable[[Tensor], Tensor]):
    with pytest.raises(ValueError, match="the output has no gradient at them; .* out of the model's forward"):
        decompose(nn.Sequential(mlp(), Calls(lambda m, x: last(4 * x))).eval())


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match="call decompose outside of torch.inference_mode"):
        decompose(mlp())


def test_a_model_on_the_meta_device_is_refused():
    with pytest.raises(ValueError, match="the meta device, which holds no values"):
        decompose(mlp().to("meta"), [X.to("meta")])


def _constant(m: Calls, x: Tensor) -> Tensor:
    return 0 * m.a(x) + 1


def _empty() -> nn.Module:
    layer = nn.Linear(5, 2)
    layer.weight = nn.Parameter(torch.zeros(0, 5))
    layer.bias = nn.Parameter(torch.zeros(0))
    return layer


@pytest.mark.parametrize(
    "model, message",
    [
        (
            Calls(_constant, a=nn.Linear(5, 3)),
            r"ablating \['a'\] altogether does not change the output .*; pass inputs on",
        ),
        (nn.Sequential(nn.ReLU()), "model has no weight matrix to decompose: no parameters"),
        (Calls(lambda m, x: x * m.p, p=nn.Parameter(torch.ones(5))), "model has no weight matrix to decompose"),
        (Calls(lambda m, x: torch.cat([x, m.a(x)], -1), a=_empty()), "a.weight has no entries; nothing to decompose"),
    ],
    ids=["constant", "no parameters", "vectors only", "no entries"],
)
def test_a_model_without_anything_to_decompose_is_refused(model: nn.Module, message: str):
    with pytest.raises(ValueError, match=message):
        decompose(model.eval())


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
@pytest.mark.parametrize("value", [0.5, -2.0])
def test_a_constant_weight_is_decomposed(value: float, quick: None):
    """Rank one: the singular pairs, and every other start, have one live component."""
    layer = nn.Linear(5, 3)
    nn.init.constant_(layer.weight, value)

    decomposition = decompose(nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 2)).eval())

    keep = {path: torch.ones(parts.pieces.n) for path, parts in decomposition.parts.items()}
    output = decomposition.ablate(X, keep, remainder=True)
    torch.testing.assert_close(output, decomposition.target(X), rtol=1e-5, atol=1e-5)


def test_a_pattern_without_a_site_is_refused():
    with pytest.raises(
        ValueError, match=r"sites: no decomposable module at 'layers.\*'; did you mean one of \['2', '0'\]"
    ):
        decompose(mlp(), sites=["layers.*"])


def test_a_divergence_without_a_number_per_input_is_refused():
    with pytest.raises(
        ValueError, match="divergence 'mse_loss' must return .* one number per input, got a single number"
    ):
        decompose(mlp(), divergence=F.mse_loss)


def test_a_checkpoint_that_is_a_file_is_refused(tmp_path: Path):
    path = tmp_path / "notes"
    path.write_text("mine")

    with pytest.raises(ValueError, match="it is a file, expected a directory"):
        decompose(mlp(), checkpoint=path)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_checkpoint, "_LEAST", 0.0)
    monkeypatch.setattr(_checkpoint, "_SHARE", 1e9)
    sync, steps = os.fsync, []

    def full_after_two_steps(descriptor: int) -> None:
        if len(steps) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_two_steps)

    with pytest.raises(OSError, match="the disk is full: the checkpoint needs .* Free some space, or save to another"):
        decompose(mlp(), [sparse(64, 5)], checkpoint=tmp_path, on_step=lambda step, terms: steps.append(step))

    assert _storage.read(tmp_path, "checkpoint").document["step"] == 2


@pytest.mark.parametrize(
    "batch, message",
    [(X[:0], r"batches\[0\] holds no inputs"), (spoilt(math.nan), "contains NaN"), (X.to("meta"), "is on meta")],
)
def test_a_decomposition_refuses_the_inputs_that_decompose_refuses(
    decomposed: wd.Decomposition, batch: Tensor, message: str
):
    for question in (
        decomposed.importances,
        lambda x: decomposed.ablate(x, {}),
        lambda x: decomposed.top_inputs("0", 0, [x]),
    ):
        with pytest.raises(ValueError, match=message):
            question(batch)
