import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bilinear import Layer, cosine, data_metric, distance, gaussian_inner, hosvd, inner, norm
from bilinear._gram import form_norms
from tests.bilinear_models import bilinear_layer, cases, dense_tensor
from tests.models import drawn


@given(**cases)
@settings(max_examples=40)
def test_inner_products_and_distances_match_the_dense_tensor(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    """B5."""
    a, b = bilinear_layer(d_in, hidden, d_out, kind, seed), bilinear_layer(d_in, 3, d_out, kind, seed + 50)
    one, two = dense_tensor(a), dense_tensor(b)
    size = float(one.norm() * two.norm()) + 1e-300

    assert inner(a, b) == pytest.approx(float((one * two).sum()), rel=1e-12, abs=1e-12 * size)
    assert distance(a, b) == pytest.approx(float((one - two).norm()), rel=1e-12, abs=1e-12 * size**0.5)
    assert norm(a) == pytest.approx(float(one.norm()), rel=1e-12)
    assert_close(form_norms(a.factors(), a.directions(None)), one.flatten(1).norm(dim=1), rtol=1e-7, atol=1e-7)


@given(**cases)
@settings(max_examples=30)
def test_hosvd_matches_the_dense_unfoldings(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    dense = dense_tensor(layer)
    scale = float(dense.norm()) + 1e-300

    found = hosvd(layer)

    outputs = torch.linalg.svdvals(dense.flatten(1))
    inputs = torch.linalg.svdvals(dense.permute(1, 0, 2).flatten(1))
    # Square roots of eigenvalues: the squares are right to rounding.
    assert_close(found.output_values[: len(outputs)] ** 2, outputs**2, rtol=0, atol=1e-13 * scale**2)
    assert_close(found.input_values[: len(inputs)] ** 2, inputs**2, rtol=0, atol=1e-13 * scale**2)
    core = found.core(layer.d_out, layer.n_coordinates)
    back = torch.einsum("abc,ua,ib,jc->uij", core, found.outputs, found.inputs, found.inputs)
    assert_close(back, dense, rtol=0, atol=1e-12 * scale)


def test_hosvd_works_across_blocks_of_neurons(monkeypatch: pytest.MonkeyPatch):
    from bilinear import _gram

    layer = bilinear_layer(5, 23, 4, "biases")
    whole = hosvd(layer)
    monkeypatch.setattr(_gram, "_ROWS", 4)

    blocks = hosvd(layer)

    assert_close(blocks.output_values, whole.output_values)
    assert_close(blocks.input_values, whole.input_values)


def test_close_layers_have_a_distance_to_full_precision():
    """From Gram matrices alone it would be lost: 1e-10 squared is below the rounding of 1."""
    layer = bilinear_layer(6, 8, 4)
    moved = Layer(layer.w, layer.v, layer.d * (1 + 1e-10))

    assert distance(layer, moved) == pytest.approx(1e-10 * norm(layer), rel=1e-5)
    assert distance(layer, layer) <= 1e-15 * norm(layer)


@given(**cases)
@settings(max_examples=20)
def test_inner_products_do_not_depend_on_the_gauge(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    swapped = Layer(
        layer.v[order],
        layer.w[order],
        layer.d[:, order],
        None if layer.v_bias is None else layer.v_bias[order],
        None if layer.w_bias is None else layer.w_bias[order],
        layer.d_bias,
        layer.skip,
        layer.norm,
    )

    assert cosine(layer, swapped) == pytest.approx(1, abs=1e-12) or norm(layer) == 0
    assert distance(layer, swapped) <= 1e-7 * norm(layer)


def test_the_gaussian_inner_product_is_an_expectation():
    a, b = bilinear_layer(4, 6, 3), bilinear_layer(4, 5, 3, seed=7)
    x = drawn(400_000, 4)

    sampled = (a(x) * b(x)).sum(1)

    # Four standard errors of this sample's mean.
    assert gaussian_inner(a, b) == pytest.approx(float(sampled.mean()), abs=4 * float(sampled.std()) / 400_000**0.5)


def test_the_data_metric_measures_layers_on_their_data():
    layer, x = bilinear_layer(4, 6, 3), drawn(200, 4) * torch.tensor([1.0, 2, 3, 4]).double()
    metric = data_metric(layer, x)
    assert metric.root is not None

    assert norm(layer, metric) == pytest.approx(float((metric.root @ dense_tensor(layer) @ metric.root).norm()))


@given(d_in=st.integers(1, 4), d_out=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=20)
def test_affine_and_plain_layers_are_compared_in_the_same_coordinates(d_in: int, d_out: int, seed: int):
    a, b = bilinear_layer(d_in, 3, d_out, "biases", seed), bilinear_layer(d_in, 4, d_out, "plain", seed + 9)
    lifted = torch.nn.functional.pad(dense_tensor(b), (1, 0, 1, 0))

    assert inner(a, b) == pytest.approx(float((dense_tensor(a) * lifted).sum()), rel=1e-11, abs=1e-11)


def test_layers_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="differ in their widths"):
        inner(bilinear_layer(3, 4, 2), bilinear_layer(3, 4, 1))
    with pytest.raises(ValueError, match="behind different norms"):
        inner(bilinear_layer(3, 4, 2), bilinear_layer(3, 4, 2, "rms"))
    with pytest.raises(ValueError, match=r"n_inputs must be between 1 and 3"):
        hosvd(bilinear_layer(3, 4, 2)).core(1, 4)


def test_a_zero_layer_has_norm_zero_and_no_cosine():
    zero = Layer(*(torch.zeros(shape).double() for shape in ((4, 3), (4, 3), (2, 4))))

    assert norm(zero) == 0
    assert torch.isnan(torch.tensor(cosine(zero, zero)))
    assert hosvd(zero).output_values.tolist() == [0, 0]
