from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bilinear import Layer, Norm, centred, data_metric, distance, output_range, truncate
from tests.bilinear_models import bilinear_layer, cases, term_scale
from tests.models import drawn


@given(**cases, share=st.floats(0.01, 1), data=st.booleans())
@settings(max_examples=60)
def test_the_full_output_is_in_the_interval(
    d_in: int, hidden: int, d_out: int, kind: str, seed: int, share: float, data: bool
):
    """B6: whatever metric the components were chosen in, recentred or not."""
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    x = drawn(40, d_in, seed=seed + 1)
    metric = data_metric(layer, drawn(30, d_in, seed=seed + 2), floor=1e-3) if data else None
    k = max(1, int(share * layer.n_coordinates))

    cut = truncate(layer, k, metric=metric, recentre=data)

    lower, upper = cut.interval(x)
    full = layer(x)
    assert (lower <= full).all() and (full <= upper).all()


@given(**cases, k=st.integers(1, 3))
@settings(max_examples=30)
def test_intervals_hold_along_dependent_directions(d_in: int, hidden: int, d_out: int, kind: str, seed: int, k: int):
    """Centred outputs sum to 0, and seven directions of fewer outputs overlap."""
    layer, x = bilinear_layer(d_in, hidden, d_out, kind, seed), drawn(40, d_in, seed=seed + 1)

    for directions in (centred(layer), drawn(7, d_out, seed=seed + 2)):
        lower, upper = truncate(layer, min(k, layer.n_coordinates), directions).interval(x)

        full = layer(x) @ directions.T
        assert (lower <= full).all() and (full <= upper).all()


@given(**cases, k=st.integers(1, 3), data=st.booleans())
@settings(max_examples=40)
def test_intervals_hold_in_float32_and_where_forms_cancel(
    d_in: int, hidden: int, d_out: int, kind: str, seed: int, k: int, data: bool
):
    """A small difference of large layers, in single precision."""
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    near = replace(layer, d=layer.d * (1 + 1e-4 * drawn(d_out, hidden, seed=seed + 5)))
    x, made = drawn(40, d_in, seed=seed + 1).float(), drawn(30, d_in, seed=seed + 2).float()

    for one in (layer.to(torch.float32), (layer - near).to(torch.float32)):
        metric = data_metric(one, made, floor=1e-2) if data else None
        lower, upper = truncate(one, min(k, one.n_coordinates), metric=metric).interval(x)

        full = one(x)
        assert (lower <= full).all() and (full <= upper).all()


@pytest.mark.parametrize("data", [False, True])
def test_what_no_form_reads_costs_no_certainty(data: bool):
    """Energy in coordinates that a narrow embedding never reads does not widen the intervals."""
    core, embedding = bilinear_layer(8, 20, 3), drawn(8, 60, seed=4)
    wide, p = core.with_embedding(embedding), drawn(100, 60, seed=5)
    beside = drawn(100, 60, seed=6)
    beside = beside - beside @ torch.linalg.pinv(embedding) @ embedding
    metric = data_metric(wide, torch.eye(60).double()) if data else None

    cut = truncate(wide, 4, metric=metric)

    near, far = cut.interval(p), cut.interval(p + 10 * beside)
    assert_close(near.upper - near.lower, far.upper - far.lower, rtol=1e-6, atol=1e-6)
    full = wide(p)
    assert (near.lower <= full).all() and (full <= near.upper).all()


def test_intervals_shrink_to_the_output_when_all_is_kept():
    layer, x = bilinear_layer(5, 8, 3, "biases"), drawn(20, 5)

    lower, upper = truncate(layer, layer.n_coordinates).interval(x)

    assert (upper - lower).max() < 1e-10 * term_scale(layer, x)


def test_intervals_use_energy_and_signs():
    """For a positive dropped part the kept output is itself the lower bound."""
    layer = Layer(torch.eye(3).double(), torch.eye(3).double(), torch.tensor([[3.0, 2.0, 1.0]]).double())
    x = torch.tensor([[0.0, 1.0, 2.0]]).double()

    lower, upper = truncate(layer, 1).interval(x)

    assert float(lower) == pytest.approx(0 + 1 * 5, abs=1e-9)  # dropped values 2 and 1 on an energy of 5
    assert float(upper) == pytest.approx(0 + 2 * 5, abs=1e-9)


@given(**cases, k=st.integers(1, 6))
@settings(max_examples=40)
def test_certified_arg_maxes_are_the_full_layers(d_in: int, hidden: int, d_out: int, kind: str, seed: int, k: int):
    layer = bilinear_layer(d_in, hidden, d_out, kind, seed)
    x = drawn(50, d_in, seed=seed + 1)

    for directions in (None, centred(layer)):
        found = truncate(layer, min(k, layer.n_coordinates), directions).certified(x)

        assert torch.equal(found.argmax[found.certain], layer(x).argmax(1)[found.certain])
        assert found.share == float(found.certain.double().mean())


def test_arg_maxes_are_certified_when_little_is_dropped():
    layer, x = bilinear_layer(6, 12, 3), drawn(200, 6)

    assert truncate(layer, 6).certified(x).share > 0.99
    assert truncate(layer, 1).certified(x).share < 0.5


def test_truncation_keeps_the_largest_pairs_and_is_a_layer():
    layer, x = bilinear_layer(6, 8, 2, "biases"), drawn(20, 6)

    cut = truncate(layer, 3)

    q = layer.form()
    values, vectors = torch.linalg.eigh(q)
    order = values.abs().argsort(1, descending=True)[:, :3]
    kept = sum(
        values[:, None, None, :]
        .expand(2, 7, 7, 7)
        .gather(3, order[:, None, None, i : i + 1].expand(2, 7, 7, 1))[..., 0]
        * torch.stack([torch.outer(vectors[u][:, order[u, i]], vectors[u][:, order[u, i]]) for u in range(2)])
        for i in range(3)
    )
    xt = layer.coordinates(x)
    assert_close(cut(x), torch.einsum("bi,nij,bj->bn", xt, kept, xt), rtol=0, atol=1e-12 * term_scale(layer, x))
    assert_close(cut.squares.layer().module()(x), cut(x), rtol=0, atol=1e-12 * term_scale(layer, x))


def test_the_expected_error_is_that_of_gaussian_inputs():
    layer = bilinear_layer(4, 6, 2, "biases and skip")
    x = drawn(200_000, 4) @ drawn(4, 4, seed=3) + torch.tensor([1.0, 0, -1, 2]).double()
    metric = data_metric(layer, x)

    for recentre in (False, True):
        cut = truncate(layer, 2, metric=metric, recentre=recentre)
        sampled = (cut(x) - layer(x)).square()

        # Fourth powers of normal numbers vary much; five standard errors.
        error = 5 * sampled.std(0) / len(x) ** 0.5
        assert ((cut.expected_error(x) - sampled.mean(0)).abs() <= error).all()


def test_refitted_writes_come_closest_to_the_layer():
    layer, x = bilinear_layer(6, 9, 4, "biases"), drawn(60, 6)
    metric = data_metric(layer, x)
    plain, refitted = (truncate(layer, 2, metric=metric, refit=flag) for flag in (False, True))

    assert distance(layer, refitted.squares.layer(), metric) < 0.95 * distance(layer, plain.squares.layer(), metric)
    for change in (1e-3, -1e-3):
        moved = replace(refitted.squares, writes=refitted.squares.writes + change * drawn(4, 8, seed=3))
        assert distance(layer, refitted.squares.layer(), metric) < distance(layer, moved.layer(), metric)
    found, full = refitted.certified(x), layer(x)
    lower, upper = refitted.interval(x)
    assert (lower <= full).all() and (full <= upper).all()
    assert torch.equal(found.argmax[found.certain], full.argmax(1)[found.certain])


def test_refitting_what_is_kept_in_full_changes_nothing():
    layer, x = bilinear_layer(4, 6, 2), drawn(20, 4)

    assert_close(truncate(layer, 4, refit=True)(x), layer(x))


def test_recentring_never_raises_the_expected_error():
    layer, x = bilinear_layer(5, 8, 3), drawn(100, 5)
    metric = data_metric(layer, x)

    plain, recentred = (truncate(layer, 2, metric=metric, recentre=flag).expected_error() for flag in (False, True))

    assert (recentred <= plain).all() and (recentred < plain).any()


@given(
    d_in=st.integers(1, 5),
    hidden=st.integers(1, 6),
    kind=st.sampled_from(["rms", "layer norm", "eps"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_no_input_leaves_the_certified_range_and_the_ends_are_reached(d_in: int, hidden: int, kind: str, seed: int):
    layer = bilinear_layer(d_in, hidden, 2, kind, seed)

    found = output_range(layer)

    x = drawn(500, d_in, seed=seed + 1) * 10 ** drawn(500, 1, seed=seed + 2)
    y, slack = layer(x), 1e-9 * term_scale(layer, x)
    assert (y >= found.lower - slack).all() and (y <= found.upper + slack).all()
    assert (found.gap < 1e-8).all()


@pytest.mark.parametrize("kind", ["plain", "biases and skip", "rms", "layer norm"])
@pytest.mark.parametrize("seed", range(3))
def test_the_range_is_attained(kind: str, seed: int):
    layer = bilinear_layer(6, 9, 3, kind, seed)
    radius = None if layer.norm else 2.5

    found = output_range(layer, radius=radius)

    for u in range(3):
        for point, bound in ((found.lowest[u], found.lower[u]), (found.highest[u], found.upper[u])):
            x = point * 1e3 if layer.norm else point  # far out, where eps is nothing
            assert float(layer(x[None])[0, u]) == pytest.approx(float(bound), rel=1e-5, abs=1e-5)


def test_a_range_behind_a_norm_is_a_rayleigh_quotient():
    layer = bilinear_layer(5, 7, 1, "rms")

    found = output_range(layer, 0)

    values = torch.linalg.eigvalsh(layer.form(0))
    assert_close(torch.stack([found.lower[0], found.upper[0]]), 5 * values[[0, -1]])


def test_the_hard_case_of_the_trust_region():
    """The linear part has nothing along the top eigenvector."""
    eye = torch.eye(2).double()
    layer = Layer(eye, eye, torch.tensor([[2.0, 1.0]]).double(), skip=torch.tensor([[0.0, 1]]).double())

    found = output_range(layer, 0, radius=3.0)

    # y = 2a^2 + b^2 + b: on the sphere 18 - b^2 + b, at most at b = 1/2.
    assert float(found.upper) == pytest.approx(18.25)
    assert float(found.lower) == pytest.approx(-0.25)


def test_sampling_misses_what_the_range_finds():
    layer = bilinear_layer(40, 60, 1, "rms")

    found = output_range(layer, 0)

    assert float(layer(drawn(5000, 40)).max()) < 0.6 * float(found.upper)


def test_what_cannot_be_certified_is_refused():
    layer = bilinear_layer(3, 4, 2)

    with pytest.raises(ValueError, match="pass radius=, the longest input"):
        output_range(layer)
    with pytest.raises(ValueError, match="radius must be positive and finite, got -1"):
        output_range(layer, radius=-1.0)
    with pytest.raises(ValueError, match="leave radius out"):
        output_range(bilinear_layer(3, 4, 2, "rms"), radius=1.0)
    with pytest.raises(ValueError, match="recentre=True needs a data metric"):
        truncate(layer, 1, recentre=True)
    with pytest.raises(ValueError, match="k must be between 1 and 3"):
        truncate(layer, 0)
    with pytest.raises(ValueError, match="in no data metric; pass x"):
        truncate(layer, 1).expected_error()


def test_a_layer_norm_of_one_number_outputs_a_constant():
    layer = Layer(*(torch.ones(1, 1).double() for _ in range(3)), norm=Norm("layer", 0.0, None, torch.ones(1).double()))

    found = output_range(layer)

    assert float(found.lower) == float(found.upper) == 1 == float(layer(torch.tensor([[5.0]]).double()))
