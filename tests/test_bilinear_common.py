import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bilinear import centred, truncate, without_common
from tests.bilinear_models import bilinear_layer, cases, term_scale
from tests.models import drawn


@given(**cases, k=st.integers(1, 3))
@settings(max_examples=30)
def test_differences_of_outputs_stay_as_they_are(d_in: int, hidden: int, d_out: int, kind: str, seed: int, k: int):
    """B13."""
    layer, x = bilinear_layer(d_in, hidden, d_out, kind, seed), drawn(20, d_in, seed=seed + 1)

    found = without_common(layer, min(k, layer.n_coordinates))

    shift = found(x) - layer(x)
    assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-11 * term_scale(layer, x))


@pytest.mark.parametrize("seed", range(3))
def test_less_is_dropped_than_beside_the_mean(seed: int):
    layer, x = bilinear_layer(12, 30, 5, seed=seed), drawn(50, 12)

    free = truncate(without_common(layer, 3), 3)
    mean = truncate(layer, 3, centred(layer))

    assert free.values[:, 3:].square().sum() < 0.9 * mean.values[:, 3:].square().sum()
    found = free.certified(x)
    assert (found.argmax == layer(x).argmax(1))[found.certain].all()


def test_more_components_than_coordinates_are_refused():
    with pytest.raises(ValueError, match=r"k must be between 1 and 3 \(coordinates of the layer\), got 4"):
        without_common(bilinear_layer(3, 4, 2), 4)
