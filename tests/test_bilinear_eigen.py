from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.testing import assert_close

from bilinear import BilinearMLP, Layer, data_metric, eigen, neuron_squares, softmax_variance
from tests.bilinear_models import bilinear_layer, cases, term_scale
from tests.models import drawn


def decaying(d: int, hidden: int, d_out: int, dtype: torch.dtype = torch.float64) -> Layer:
    """A layer whose spectra fall as a power law, as those of trained ones do."""
    basis = torch.linalg.qr(drawn(d, d, seed=9))[0] * torch.arange(1, d + 1) ** -0.7
    layer = Layer(drawn(hidden, d) @ basis.T, drawn(hidden, d, seed=2) @ basis.T, drawn(d_out, hidden, seed=3))
    return layer.to(dtype)


@given(**cases)
@settings(max_examples=60)
def test_all_eigenpairs_reproduce_the_layer(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    """B3: with biases, skip path and norm, as pairs, as components, and as components run as a module."""
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    x = drawn(16, d_in, seed=seed)
    scale = 1e-12 * term_scale(layer, x)

    found = eigen(layer)

    assert_close(found(x), layer(x), rtol=0, atol=scale)
    assert_close(found.squares()(x), layer(x), rtol=0, atol=scale)
    assert_close(found.squares().layer().module()(x), layer(x), rtol=0, atol=scale)


@given(**cases)
@settings(max_examples=40)
def test_every_neuron_is_two_squares(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    x = drawn(16, d_in, seed=seed)

    assert_close(neuron_squares(layer)(x), layer(x), rtol=0, atol=1e-12 * term_scale(layer, x))


@given(**cases)
@settings(max_examples=40)
def test_pairs_of_a_direction_are_eigenpairs_of_its_form(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    layer, direction = bilinear_layer(d_in, hidden, d_out, kind, seed), drawn(d_out, seed=seed + 9)

    found = eigen(layer, direction)

    q, eye = layer.form(direction), torch.eye(layer.n_coordinates).double()
    size = float(q.abs().max() + 1e-300)
    assert_close(q @ found.vectors, found.vectors * found.values, rtol=0, atol=1e-12 * size * 10)
    assert_close(found.vectors.T @ found.vectors, eye, rtol=0, atol=1e-12)
    assert (found.values.abs().diff() <= 1e-12 * size).all()


@given(**cases)
@settings(max_examples=30)
def test_a_data_metric_reproduces_the_layer_to_its_condition(d_in: int, hidden: int, d_out: int, kind: str, seed: int):
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    metric = data_metric(layer, drawn(50, d_in, seed=seed + 1))
    x = drawn(8, d_in, seed=seed)

    found = eigen(layer, metric=metric)

    assert metric.moment is not None
    condition = float(torch.linalg.cond(metric.moment))
    assert_close(found(x), layer(x), rtol=0, atol=1e-13 * condition * term_scale(layer, x) * 100)


@given(d_in=st.integers(1, 5), hidden=st.integers(1, 6), d_out=st.integers(1, 3), seed=st.integers(0, 2**16))
@settings(max_examples=40)
def test_the_data_spectrum_does_not_depend_on_the_basis_of_the_input(d_in: int, hidden: int, d_out: int, seed: int):
    """B4: nor do activations of its components; the input spectrum does."""
    layer, x = bilinear_layer(d_in, hidden, d_out, "biases", seed), drawn(60, d_in, seed=seed + 1)
    change = torch.linalg.qr(drawn(d_in, d_in, seed=seed + 2))[0] * torch.linspace(1, 3, d_in)
    moved = layer.with_embedding(torch.linalg.inv(change.double()))
    y = x @ change.double().T

    one = eigen(layer, metric=data_metric(layer, x, floor=1e-12))
    two = eigen(moved, metric=data_metric(moved, y, floor=1e-12))

    scale = float(one.values.abs().max() + 1e-300)
    assert_close(two.values.sort()[0], one.values.sort()[0], rtol=0, atol=1e-8 * scale)


def test_a_weighted_data_metric_counts_inputs_as_weighted():
    layer, x = bilinear_layer(4, 6, 3, "biases"), drawn(30, 4)

    weighted = data_metric(layer, [x[:10], x[10:]], weight=softmax_variance)

    p = layer(x).softmax(1)
    weights, coordinates = (p * (1 - p)).sum(1), layer.coordinates(x)
    expected = torch.einsum("b,bi,bj->ij", weights, coordinates, coordinates) / weights.sum()
    assert_close(weighted.moment, expected)
    assert_close(data_metric(layer, x, weight=lambda y: y[:, 0] * 0 + 3).moment, data_metric(layer, x).moment)


@pytest.mark.parametrize(
    "weight", [lambda y: y[:, 0] - 1e9, lambda y: y[:, 0] * torch.nan, lambda y: y[:1, 0].abs(), lambda y: y]
)
def test_weights_that_are_none_are_refused(weight: Callable[[torch.Tensor], torch.Tensor]):
    with pytest.raises(ValueError, match="one finite number, 0 or more, for every input"):
        data_metric(bilinear_layer(4, 6, 3), drawn(30, 4), weight=weight)


def test_inputs_of_no_weight_are_refused():
    with pytest.raises(ValueError, match="all of weight 0"):
        data_metric(bilinear_layer(4, 6, 3), drawn(30, 4), weight=lambda y: 0 * y[:, 0])


def test_the_input_spectrum_depends_on_the_basis():
    layer = bilinear_layer(3, 4, 2)
    moved = layer.with_embedding(torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()))

    assert (eigen(layer).values - eigen(moved).values).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["plain", "biases and skip"])
def test_lanczos_agrees_with_scipy(seed: int, kind: str):
    layer = bilinear_layer(48, 60, 5, kind, seed)
    found = eigen(layer, k=4, method="lanczos", seed=seed)

    w, v, d = (one.numpy() for one in layer.factors())
    for u in range(5):

        def product(x: np.ndarray, row: np.ndarray = d[u]) -> np.ndarray:
            return (w.T @ (row * (v @ x)) + v.T @ (row * (w @ x))) / 2

        size = w.shape[1]
        theirs = eigsh(LinearOperator((size, size), product, dtype=float), 4, which="LM")[0]  # type: ignore[arg-type]
        ours = found.values[u].sort()[0]
        assert_close(ours, torch.tensor(theirs), rtol=1e-9, atol=1e-9)
        q = layer.form(u)
        true = (q @ found.vectors[u] - found.vectors[u] * found.values[u]).norm(dim=0)
        assert (true <= 2 * found.residuals[u] + 1e-12 * q.norm()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_route_agrees_with_the_dense_one(dtype: torch.dtype):
    layer = decaying(400, 500, 6, dtype)

    fast, dense = eigen(layer, k=10), eigen(layer, k=10, method="dense")

    rtol = 3e-6 if dtype == torch.float32 else 1e-10
    assert_close(fast.values, dense.values, rtol=0, atol=rtol * float(dense.values.abs().max()))
    overlap = (fast.vectors * dense.vectors).sum(1).abs()
    assert overlap.min() > (0.999 if dtype == torch.float32 else 1 - 1e-9)


@pytest.mark.parametrize("kind", ["multiple", "zero", "rank one", "mixed"])
def test_lanczos_finds_multiple_and_missing_eigenvalues(kind: str):
    """A Krylov space holds one copy of a multiple eigenvalue; the search beside the found pairs must notice."""
    d = 60
    values = {
        "multiple": [3.0, 3, 3, -2, -2] + [0.1] * 55,
        "zero": [0.0] * d,
        "rank one": [5.0] + [0.0] * 59,
        "mixed": [1.0] * 30 + [-1.0] * 30,
    }[kind]
    basis = torch.linalg.qr(drawn(d, d))[0]
    layer = Layer(basis.T.contiguous(), basis.T.contiguous(), torch.tensor([values]).double())

    found = eigen(layer, 0, k=5, method="lanczos")

    expected = torch.tensor(sorted(values, key=abs, reverse=True)[:5]).double()
    assert_close(found.values.abs().sort()[0], expected.abs().sort()[0], rtol=1e-7, atol=1e-9)
    q = layer.form(0)
    assert_close(q @ found.vectors, found.vectors * found.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_second_copy_of_the_largest_eigenvalue_is_not_missed(seed: int):
    """Both pairs that the Krylov space holds converge at once; only the search beside them meets the copy."""
    values = torch.cat([torch.tensor([3.0, 3.0, 1.0]), 0.1 * torch.linspace(-1, 1, 397)]).double()
    basis = torch.linalg.qr(drawn(400, 400))[0].T.contiguous()

    found = eigen(Layer(basis, basis, values[None]), 0, k=2, method="lanczos", seed=seed)

    assert_close(found.values, torch.tensor([3.0, 3.0]).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("d", "hidden"), [(1, 1), (1, 5), (6, 1), (40, 3)])
def test_small_and_rank_deficient_layers(d: int, hidden: int):
    layer = bilinear_layer(d, hidden, 2)
    x = drawn(8, d)

    found = eigen(layer)

    assert found.values.shape == (2, d)
    assert_close(found(x), layer(x), rtol=0, atol=1e-12 * term_scale(layer, x))
    assert (found.values[:, 2 * hidden :].abs() <= 1e-12 * term_scale(layer, x)).all()


def test_fewer_products_than_inputs_take_the_smaller_span():
    layer = bilinear_layer(30, 2, 3)

    found = eigen(layer, k=4, method="dense")

    exact = torch.linalg.eigvalsh(layer.form())
    order = exact.abs().argsort(1, descending=True)[:, :4]
    assert_close(found.values, exact.gather(1, order))


def test_equal_eigenvalues_are_reported_as_subspaces():
    layer = Layer(torch.eye(4).double(), torch.eye(4).double(), torch.tensor([[2.0, 1.0, 2.0, -1.0]]).double())

    found = eigen(layer, 0)

    assert [len(group) for group in found.groups()] == [2, 1, 1]
    value, vectors = found.subspaces()[0]
    assert value == 2
    assert_close(vectors @ vectors.T, torch.diag(torch.tensor([1.0, 0, 1, 0])).double())


def test_the_antisymmetric_part_of_a_neuron_is_nothing():
    """A known defect of published code: eigh of an unsymmetrised matrix reads its lower triangle alone."""
    w, v = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()

    found = eigen(Layer(w, v, torch.ones(1, 1).double()), 0)

    assert_close(found.values.sort()[0], torch.tensor([-0.5, 0.5]).double())


def test_a_neurons_spectrum_is_the_closed_form():
    w, v = drawn(1, 5), drawn(1, 5, seed=2)

    found = eigen(Layer(w, v, torch.ones(1, 1).double()), 0, k=2)

    expected = (w * v).sum() / 2 + torch.tensor([-0.5, 0.5]).double() * w.norm() * v.norm()
    assert_close(found.values.sort()[0], expected)


def test_any_directions_are_written_back_through_their_pseudo_inverse():
    """Overlapping directions would otherwise count twice."""
    layer, x = bilinear_layer(4, 6, 3, "biases"), drawn(8, 4)
    directions = drawn(5, 3, seed=7)

    found = eigen(layer, directions).squares()

    assert_close(found(x), layer(x), rtol=0, atol=1e-11 * term_scale(layer, x))


def test_one_direction_of_several_equals_itself_alone():
    layer = bilinear_layer(4, 6, 3)

    assert_close(eigen(layer)[1].values, eigen(layer, 1).values)
    assert_close(eigen(layer, [0.0, 1.0, 0.0]).values, eigen(layer, 1).values)


def test_squares_say_how_much_they_cancel():
    layer = bilinear_layer(4, 6, 1)

    orthogonal = eigen(layer).squares()

    assert orthogonal.cancellation() == pytest.approx(1)
    doubled = Layer(*(torch.cat([one, one]) for one in (layer.w, layer.v)), torch.cat([layer.d, -0.9 * layer.d], 1))
    assert neuron_squares(doubled).cancellation() > 50
    assert orthogonal.norms() == pytest.approx(eigen(layer, 0).values.abs())


def test_selected_squares_are_a_part_of_the_layer():
    layer, x = bilinear_layer(4, 6, 2, "biases"), drawn(8, 4)
    squares = eigen(layer).squares()

    one, rest = squares.select([2]), squares.select([i for i in range(squares.n) if i != 2])

    assert one.n == 1 and one.origin == "truncated"
    assert_close(one(x) + rest(x), layer(x), rtol=0, atol=1e-12 * term_scale(layer, x))
    assert_close(one(x), squares.activations(x)[:, 2:3] * squares.writes[:, 2])


def test_printing_shows_the_largest_pairs():
    text = str(eigen(bilinear_layer(5, 6, 12, "biases"), k=3))

    assert "12 directions of a bilinear layer 5 -> 12, 3 of 6 eigenpairs, metric input" in text
    equal = str(eigen(Layer(torch.eye(3), torch.eye(3), torch.tensor([[2.0, 1, 1]])), 0))
    assert equal.count("1 pair\n") == 1 and equal.count("2 pairs\n") == 2
    assert "offset" in text and "effective rank" in text and "... and 4 more directions" in text


@pytest.mark.usefixtures("types_unchecked")
def test_counts_may_be_numpys():
    assert eigen(bilinear_layer(3, 4, 2), k=np.int64(2)).k == 2  # type: ignore[arg-type]


def test_what_eigen_cannot_do_is_refused():
    layer = bilinear_layer(3, 4, 2)

    with pytest.raises(ValueError, match=r"k must be between 1 and 3 \(coordinates of the layer\), got 4"):
        eigen(layer, k=4)
    with pytest.raises(TypeError, match="k must be an integer, got True"):
        eigen(layer, k=True)
    with pytest.raises(ValueError, match="directions are empty, expected at least one row"):
        eigen(layer, torch.zeros(0, 2).double())
    with pytest.raises(ValueError, match=r"metric has shape \(9, 3\), expected a second moment; if these are inputs"):
        eigen(layer, metric=drawn(9, 3))
    with pytest.raises(ValueError, match="rtol must be between 0 and 1, got 0.0"):
        eigen(layer, rtol=0.0)
    with pytest.raises(ValueError, match="method must be 'auto', 'dense' or 'lanczos', got 'qr'"):
        eigen(layer, method="qr")
    with pytest.raises(ValueError, match="metric='sphere' needs a layer behind a norm"):
        eigen(layer, metric="sphere")
    with pytest.raises(ValueError, match="its forms act on the sphere"):
        eigen(bilinear_layer(3, 4, 2, "rms"), metric="input")
    with pytest.raises(ValueError, match="a data metric needs data"):
        eigen(layer, metric="data")
    with pytest.raises(ValueError, match="metric must be 'input', 'sphere', a Metric or a second moment, got 'pixel'"):
        eigen(layer, metric="pixel")
    with pytest.raises(ValueError, match="the metric has 3 coordinates, the layer 4"):
        eigen(bilinear_layer(3, 4, 2, "biases"), metric=data_metric(layer, drawn(9, 3)))
    with pytest.raises(ValueError, match="groups are those of one direction"):
        eigen(layer).groups()
    with pytest.raises(ValueError, match="inputs are empty"):
        data_metric(layer, drawn(0, 3))
    with pytest.raises(ValueError, match="positive semidefinite and not zero"):
        data_metric(layer, torch.zeros(4, 3).double())


def test_eigen_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()

    eigen(decaying(400, 50, 2), k=3, method="lanczos")

    assert torch.equal(torch.get_rng_state(), before)


def test_a_module_made_of_a_layer_draws_nothing():
    before = torch.get_rng_state()

    bilinear_layer(3, 4, 2, "skip").module()
    BilinearMLP.empty(2, 3, 4)

    assert torch.equal(torch.get_rng_state(), before)
