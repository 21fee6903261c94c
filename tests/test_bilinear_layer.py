import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.testing import assert_close

from bilinear import Layer, Norm
from tests.bilinear_models import KINDS, bilinear_layer, cases, dense_tensor, term_scale
from tests.models import drawn


def slow(layer: Layer, x: Tensor) -> Tensor:
    """The layer's definition, written out."""
    z = x
    if layer.norm is not None:
        if layer.norm.kind == "layer":
            z = x - x.mean(-1, keepdim=True)
        z = z / (z.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
        z = z * (1 if layer.norm.gain is None else layer.norm.gain)
        z = z + (0 if layer.norm.bias is None else layer.norm.bias)
    left = z @ layer.w.T + (0 if layer.w_bias is None else layer.w_bias)
    right = z @ layer.v.T + (0 if layer.v_bias is None else layer.v_bias)
    y = (left * right) @ layer.d.T + (0 if layer.d_bias is None else layer.d_bias)
    return y + (0 if layer.skip is None else x @ layer.skip.T)


@given(**cases)
@settings(max_examples=60)
def test_the_symmetric_forms_reproduce_the_layer(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    """B1: biases, skip path, gains and the norm's bias are all in the form."""
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    x = drawn(16, d_in, seed=seed)

    coordinates, q = layer.coordinates(x), layer.form()

    from_forms = torch.einsum("bi,nij,bj->bn", coordinates, q, coordinates) + (layer.beside(x) if layer.norm else 0)
    assert_close(from_forms, slow(layer, x), rtol=0, atol=1e-12 * term_scale(layer, x))
    assert_close(layer(x), slow(layer, x), rtol=0, atol=1e-12 * term_scale(layer, x))
    assert torch.equal(q, q.mT)
    assert_close(q, dense_tensor(layer), rtol=0, atol=1e-12 * float(q.abs().max() + 1))


@given(**cases)
@settings(max_examples=40)
def test_a_module_of_the_weights_computes_the_layer(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    x = drawn(8, d_in, seed=seed)

    found = layer.module()(x)

    assert_close(found, slow(layer, x), rtol=0, atol=1e-12 * term_scale(layer, x))


@given(**cases)
@settings(max_examples=40)
def test_head_and_embedding_fold_exactly(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    head, shift = drawn(3, d_out, seed=seed + 20), drawn(3, seed=seed + 21)
    x = drawn(8, d_in, seed=seed)
    scale = 1e-12 * term_scale(layer, x) * float(head.abs().sum() + 1)
    assert_close(layer.with_head(head, shift)(x), slow(layer, x) @ head.T + shift, rtol=0, atol=scale)
    if layer.norm is None:
        embedding, offset = drawn(d_in, 4, seed=seed + 22), drawn(d_in, seed=seed + 23)
        p = drawn(8, 4, seed=seed + 24)
        inner = p @ embedding.T + offset

        found = layer.with_embedding(embedding, offset)(p)

        assert_close(found, slow(layer, inner), rtol=0, atol=1e-12 * (1 + term_scale(layer, inner)))


@given(**cases)
@settings(max_examples=40)
def test_sums_and_differences_of_layers_are_layers(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    one, two = bilinear_layer(d_in, hidden, d_out, kind, seed), bilinear_layer(d_in, 3, d_out, kind, seed + 50)
    x = drawn(8, d_in, seed=seed)
    scale = 1e-12 * (term_scale(one, x) + term_scale(two, x))

    assert_close((one + two)(x), slow(one, x) + slow(two, x), rtol=0, atol=scale)
    assert_close((one - two)(x), slow(one, x) - slow(two, x), rtol=0, atol=scale)


@given(**cases)
@settings(max_examples=40)
def test_forms_do_not_depend_on_the_gauge(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    """B2: order of neurons, scale of w against v and d, and w swapped with v."""
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    a, b = drawn(hidden, seed=seed + 30).exp(), drawn(hidden, seed=seed + 31).exp()

    def scaled(weight: Tensor | None, by: Tensor) -> Tensor | None:
        return None if weight is None else (weight * (by[:, None] if weight.ndim > 1 else by))[order]

    turned = Layer(
        scaled(layer.v, a),  # type: ignore[arg-type]
        scaled(layer.w, b),  # type: ignore[arg-type]
        (layer.d / (a * b))[:, order],
        scaled(layer.v_bias, a),
        scaled(layer.w_bias, b),
        layer.d_bias,
        layer.skip,
        layer.norm,
    )

    assert_close(turned.form(), layer.form(), rtol=0, atol=1e-12 * float(layer.form().abs().max() + 1) * 10)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_float64_to_a_millionth_of_the_terms(kind: str):
    layer = bilinear_layer(24, 48, 5, kind)
    x = drawn(16, 24)

    found = layer.to(torch.float32)(x.float())

    assert_close(found.double(), layer(x), rtol=0, atol=2e-6 * term_scale(layer, x))


def test_a_norm_agrees_with_torch():
    x, gain, bias = drawn(8, 5), drawn(5, seed=3), drawn(5, seed=4)

    assert_close(Norm("layer", 1e-3, gain, bias)(x), nn.functional.layer_norm(x, (5,), gain, bias, 1e-3))
    assert_close(Norm("rms", 1e-3, gain)(x), nn.functional.rms_norm(x, (5,), gain, 1e-3))


def test_a_zero_input_of_a_norm_without_eps_stays_zero():
    assert Norm("rms")(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": drawn(3, 3)}, ValueError, r"v has shape \(3, 3\), expected \(4, 3\)"),
        ({"d": drawn(2, 3)}, ValueError, r"d has shape \(2, 3\), expected \(any, 4\)"),
        ({"w": drawn(4)}, ValueError, r"w has shape \(4,\), expected \(any, any\)"),
        ({"w": drawn(4, 3) * float("nan")}, ValueError, "w contains NaN or infinity"),
        ({"d": drawn(2, 4) / 0}, ValueError, "d contains NaN or infinity"),
        ({"v": drawn(4, 3).float()}, TypeError, "v is torch.float32 on cpu, expected torch.float64"),
        ({"w": torch.ones(4, 3, dtype=torch.long)}, TypeError, "w must be float32 or float64, got torch.int64"),
        ({"w_bias": drawn(3)}, ValueError, r"w_bias has shape \(3,\), expected \(4,\)"),
        ({"skip": drawn(3, 3)}, ValueError, r"skip has shape \(3, 3\), expected \(2, 3\)"),
        ({"d_bias": drawn(2, 1)}, ValueError, r"d_bias has shape \(2, 1\), expected \(2,\)"),
        ({"norm": Norm("rms", 0.0, drawn(4))}, ValueError, r"norm.gain has shape \(4,\), expected \(3,\)"),
        ({"d": drawn(0, 4)}, ValueError, "maps 3 inputs to 0 outputs"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change: dict, error: type, message: str):
    weights = {"w": drawn(4, 3), "v": drawn(4, 3), "d": drawn(2, 4)} | change

    with pytest.raises(error, match=message):
        Layer(**weights)


def test_inputs_that_do_not_fit_are_refused():
    layer = bilinear_layer(3, 4, 2)

    with pytest.raises(ValueError, match=r"x has shape \(5, 2\), expected \(any, 3\)"):
        layer(drawn(5, 2))
    with pytest.raises(TypeError, match="x is torch.float32"):
        layer(drawn(5, 3).float())
    with pytest.raises(ValueError, match="x contains NaN or infinity"):
        layer(drawn(5, 3) / 0)
    with pytest.raises(ValueError, match="x is a single number"):
        layer(torch.tensor(1.0))


def test_directions_that_do_not_fit_are_refused():
    layer = bilinear_layer(3, 4, 2)

    with pytest.raises(ValueError, match="direction 2: the layer has outputs 0 to 1"):
        layer.form(2)
    with pytest.raises(ValueError, match=r"direction has 3 numbers, expected 2, .* torch\.eye\(2\)\[numbers\]"):
        layer.form([1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"directions has shape \(1, 3\), expected \(any, 2\)"):
        layer.form(drawn(1, 3))


def test_what_cannot_be_folded_is_refused():
    layer = bilinear_layer(3, 4, 2, "rms")

    with pytest.raises(ValueError, match="cannot be folded through a norm"):
        layer.with_embedding(drawn(3, 5))
    with pytest.raises(ValueError, match="needs as many outputs as inputs, got 3 -> 2"):
        layer.with_skip()
    with pytest.raises(ValueError, match="behind different norms"):
        _ = layer + bilinear_layer(3, 4, 2)
    with pytest.raises(ValueError, match="differ in their widths"):
        _ = layer + bilinear_layer(4, 4, 2, "rms")
    with pytest.raises(ValueError, match="kind must be 'rms' or 'layer', got 'batch'"):
        Norm("batch")  # type: ignore[arg-type]


def test_directions_come_as_numbers_lists_arrays_or_tensors():
    layer, rows = bilinear_layer(4, 6, 3), drawn(2, 3)

    several = layer.form(rows)
    assert several.shape == (2, 4, 4)
    for same in (rows.tolist(), rows.numpy(), list(rows), tuple(map(tuple, rows.tolist()))):
        assert_close(layer.form(same), several)
    for same in (rows[0].tolist(), rows[0].numpy(), tuple(rows[0].tolist())):
        assert_close(layer.form(same), several[0])
    assert_close(layer.form(np.int64(2)), layer.form(2))
    for wrong in (1.5, [[1.0], [1.0, 2.0]], ["a"]):
        with pytest.raises(TypeError, match="direction must be an output's number, numbers, or rows of numbers"):
            layer.form(wrong)
