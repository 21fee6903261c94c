import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close

from benchmarks import train_digits
from weightdecomp import digits


def test_shipped_classifier_is_right_on_97_percent_of_the_test_images():
    classifier = digits.model()

    accuracy = train_digits.accuracy(classifier, digits.batches("test"), digits.labels("test"))

    assert accuracy >= 0.97


def test_accuracy_in_the_weights_file_is_the_one_recomputed():
    classifier = digits.model()

    with safe_open(digits.WEIGHTS, "pt") as file:
        metadata = file.metadata()

    accuracy = train_digits.accuracy(classifier, digits.batches("test"), digits.labels("test"))
    assert metadata["test_accuracy"] == f"{accuracy:.4f}"


def test_training_again_gives_the_shipped_weights():
    shipped = digits.model().state_dict()

    trained = train_digits.trained().state_dict()

    # Both are float64 results rounded to float32; the room is for sums in another order.
    assert_close(trained, shipped, rtol=1e-4, atol=1e-5)


def test_weights_file_is_small():
    assert digits.WEIGHTS.stat().st_size < 20_000


def test_linear_layers_have_readable_paths():
    classifier = digits.model()

    linear = [path for path, module in classifier.named_modules() if isinstance(module, nn.Linear)]

    assert linear == ["layers.0", "layers.1", "layers.2"]


def test_loading_the_classifier_draws_nothing_from_the_global_random_state():
    before = torch.get_rng_state()

    digits.model()

    assert torch.equal(torch.get_rng_state(), before)


def test_changing_one_loaded_classifier_changes_no_other():
    with torch.no_grad():
        digits.model().layers[0].weight.zero_()

    assert digits.model().layers[0].weight.count_nonzero() > 0


def test_splits_share_no_image_and_hold_all_of_them():
    both = torch.cat([*digits.batches("train"), *digits.batches("test")])

    assert (len(both), len(both.unique(dim=0))) == (1797, 1797)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_image_has_a_label(split: digits.Split):
    images = torch.cat(digits.batches(split))

    assert len(digits.labels(split)) == len(images)


def test_pixels_span_zero_to_one():
    images = torch.cat(digits.batches())

    assert (images.min().item(), images.max().item(), images.dtype) == (0, 1, torch.float32)


def test_changing_a_batch_changes_no_later_one():
    digits.batches()[0].zero_()

    assert digits.batches()[0].count_nonzero() > 0


def test_missing_scikit_learn_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch):
    digits._digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(ModuleNotFoundError, match=r"pip install 'weightdecomp\[demo\]'"):
        digits.batches()
