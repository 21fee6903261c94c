import numpy as np
import pytest
import tensorly
import torch
from scipy.optimize import check_grad
from tensorly.decomposition import parafac
from tensorly.decomposition import tucker as dense_tucker
from torch.testing import assert_close

from bilinear import Layer, block_terms, data_metric, hosvd, shared_squares, tucker
from bilinear._cp import _Problem
from tests.bilinear_models import bilinear_layer, dense_tensor
from tests.models import drawn


def planted(n: int = 5, d: int = 8, d_out: int = 6) -> tuple[Layer, torch.Tensor]:
    """A layer that is n squares, and these as unit vectors."""
    s = torch.nn.functional.normalize(drawn(d, n, seed=3), dim=0)
    return Layer(s.T.contiguous(), s.T.contiguous(), drawn(d_out, n, seed=4)), s


def test_planted_squares_are_recovered():
    layer, s = planted()

    found = shared_squares(layer, 5, starts=4)

    assert found.error < 1e-3
    unit = torch.nn.functional.normalize(found.squares.vectors, dim=0)
    assert (unit.T @ s).abs().amax(0).min() > 0.999
    assert found.errors == tuple(sorted(found.errors)) and found.cancellation < 3
    # The squares are unique: every start that finds as good a fit finds them.
    assert found.agreement > 0.999 and found.as_good >= 2
    assert found.as_good == sum(error <= found.error + 0.01 for error in found.errors)


def test_squares_that_are_not_unique_do_not_agree():
    """|x|^2 is a sum of squares in every orthonormal basis."""
    eye = torch.eye(4).double()

    found = shared_squares(Layer(eye, eye, torch.ones(1, 4).double()), 4, starts=5)

    assert found.error < 1e-2 and found.as_good == 5 and found.agreement < 0.9


def test_the_gradient_is_that_of_the_error():
    layer = bilinear_layer(5, 6, 3)
    problem = _Problem(layer.factors(), float(dense_tensor(layer).square().sum()), 4)
    start = drawn(20).numpy()

    error = check_grad(lambda x: problem(x)[0], lambda x: problem(x)[1], start)

    assert error < 1e-6 * max(1.0, np.linalg.norm(problem(start)[1]))


def test_the_reported_error_is_that_of_the_dense_tensor():
    layer = bilinear_layer(6, 9, 4, "biases")

    found = shared_squares(layer, 4, steps=50)

    back = torch.einsum("ur,ir,jr->uij", found.squares.writes, found.squares.vectors, found.squares.vectors)
    dense = dense_tensor(layer)
    assert found.error == pytest.approx(float((back - dense).norm() / dense.norm()), rel=1e-9)


def test_the_fit_is_as_good_as_a_dense_cp():
    """Tensorly's alternating least squares, free of symmetry, as the reference."""
    layer, _ = planted(6, 7, 5)
    noisy = layer + Layer(*(0.1 * one for one in bilinear_layer(7, 9, 5, seed=5).factors()))
    dense = dense_tensor(noisy)
    tensorly.set_backend("numpy")
    reference = parafac(dense.numpy(), 6, n_iter_max=500, tol=1e-10, random_state=0, init="random")
    theirs = np.linalg.norm(tensorly.cp_to_tensor(reference) - dense.numpy()) / np.linalg.norm(dense.numpy())

    found = shared_squares(noisy, 6, starts=3)

    assert found.error < theirs * 1.02 + 1e-3


def test_tucker_is_as_good_as_a_dense_one_and_reports_its_own_error():
    layer = bilinear_layer(7, 9, 5, "biases")
    dense = dense_tensor(layer)
    tensorly.set_backend("numpy")
    core, factors = dense_tucker(dense.numpy(), [3, 4, 4], n_iter_max=200, random_state=0)
    back = tensorly.tucker_to_tensor((core, factors))
    theirs = np.linalg.norm(back - dense.numpy()) / np.linalg.norm(dense.numpy())

    found = tucker(layer, 3, 4, sweeps=50)

    assert found.error < theirs * 1.02
    ours = torch.einsum("ur,ir,jr->uij", found.squares.writes, found.squares.vectors, found.squares.vectors)
    assert found.error == pytest.approx(float((ours - dense).norm() / dense.norm()), rel=1e-9)


def test_tucker_with_all_directions_is_the_layer():
    layer, x = bilinear_layer(4, 6, 3, "skip"), drawn(8, 4)

    found = tucker(layer, 3, 5, sweeps=1)

    assert found.error < 1e-7  # the square root of a rounded difference
    assert_close(found.squares(x), layer(x), rtol=1e-10, atol=1e-10)


def test_block_terms_are_orthogonal_and_report_their_own_error():
    layer = bilinear_layer(6, 9, 4)
    dense = dense_tensor(layer)

    found = block_terms(layer, 3, 2)

    ours = torch.einsum("ur,ir,jr->uij", found.squares.writes, found.squares.vectors, found.squares.vectors)
    assert found.error == pytest.approx(float((ours - dense).norm() / dense.norm()), rel=1e-9)
    assert_close(found.outputs.T @ found.outputs, torch.eye(3).double())
    assert_close(found.outputs.abs(), hosvd(layer).outputs[:, :3].abs(), rtol=1e-6, atol=1e-6)


def test_shared_squares_fit_best_in_the_metric_that_was_asked_for():
    layer = bilinear_layer(6, 9, 4)
    x = drawn(300, 6) * torch.tensor([5.0, 3, 1, 0.3, 0.1, 0.1]).double()

    plain, data = (shared_squares(layer, 4, metric=one) for one in (None, data_metric(layer, x)))

    def error(squares) -> float:
        return float((squares(x) - layer(x)).square().mean())

    assert error(data.squares) < error(plain.squares)


def test_shared_squares_print_their_diagnostics():
    text = str(shared_squares(planted()[0], 3, steps=2))

    assert "no other start fits as well" in text
    assert "3 shared squares, metric input" in text and "stopped at the limit of steps" in text


def test_what_cannot_be_fitted_is_refused():
    zero = Layer(*(torch.zeros(shape).double() for shape in ((4, 3), (4, 3), (2, 4))))

    for fit in (lambda one: shared_squares(one, 2), lambda one: tucker(one, 1, 1), lambda one: block_terms(one, 1, 1)):
        with pytest.raises(ValueError, match="the layer is zero"):
            fit(zero)
    with pytest.raises(ValueError, match="n must be between 1 and"):
        shared_squares(planted()[0], 0)
    with pytest.raises(ValueError, match="n_inputs must be between 1 and 8"):
        tucker(planted()[0], 1, 9)
