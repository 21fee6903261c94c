"""The editing benchmarks run from end to end, and their arithmetic is right."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import editing_digits, editing_language, editing_monitor
from benchmarks.planted import Backdoored

pytestmark = pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")


def test_every_method_is_measured_on_a_class(tmp_path: Path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")

    editing_digits.run(tmp_path, smoke=True)

    records = json.loads((tmp_path / "digits.json").read_text())["records"]
    assert {one["method"] for one in records} == {
        *("components, any site", "components, hidden sites", "fine-tuning", "LoRA, rank 1"),
        *("random components, any site", "random components, hidden sites"),
    }
    assert all(0 <= x <= 1 for one in records for x in one["by class"]["class accuracy"])
    assert "LoRA, rank 1" in (tmp_path / "digits.md").read_text()
    assert (tmp_path / "digits.svg").exists()


def test_the_planted_backdoor_acts_where_it_says(tmp_path: Path):
    model = Backdoored(3)
    x, truth = model.inputs(500, 0)

    with torch.no_grad():
        extra = model(x)[:, 0] - (x @ model.basis)[:, 0]

    assert torch.equal(extra > 1e-4, truth & (extra > 1e-4))
    assert 0.04 < truth.double().mean() < 0.1
    assert float(extra[~truth].abs().max()) < 1e-4


def test_the_gates_of_a_backdoor_that_was_found_say_where_it_acts():
    """Decomposed by the default configuration; a twentieth of the inputs are true cases, as many are near misses."""
    found = editing_monitor.planted(1, None)

    assert found["precision"] > 0.95 and found["recall"] > 0.95


def test_the_calibrated_level_parts_what_can_be_parted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(editing_monitor, "strength", lambda watch, images: images)

    level = editing_monitor.calibrated(None, torch.tensor([3.0, 5.0, 4.0]), torch.tensor([0.5, 2.0]))  # type: ignore[arg-type]

    assert level == 2.5


def test_a_word_is_looked_for_where_it_comes_next():
    tokens = torch.tensor([[1, 7, 3, 7, 4], [1, 2, 3, 4, 5], [7, 7, 2, 3, 7]])

    one = editing_language.case((7,), tokens, on=3, off=3)

    places = [(row.tolist(), int(at)) for row, at in zip(*one.on, strict=True)]
    assert places == [([1, 7, 3, 7, 4], 0), ([1, 7, 3, 7, 4], 2), ([7, 7, 2, 3, 7], 0)]
    assert one.off[1][1].tolist() == [0, 1, 2, 3]
    logits = torch.zeros(1, 1, 10)
    assert float(one.score(logits)) == pytest.approx(0.1)


def test_the_best_setting_is_the_least_damage_among_those_that_remove_as_much():
    scores = [{"probability": p, "damage": d} for p, d in ((0.2, 0.1), (0.05, 0.4), (0.1, 0.3))]

    assert editing_language.best(scores, 0.1)["damage"] == 0.3
    assert editing_language.best(scores, 0.01)["probability"] == 0.05


@pytest.mark.data
def test_every_method_is_measured_on_a_word(shared_data: Path, tmp_path: Path, quick: None):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")

    editing_language.run(tmp_path, shared_data, smoke=True)

    record = json.loads((tmp_path / "language.json").read_text())
    methods = record["words"]["Lily"]["methods"]
    assert methods.keys() == {"original", "components", "random components", "fine-tuning", "LoRA, rank 1"}
    assert methods["original"][0]["damage"] == 0
    assert "| LoRA, rank 1" in (tmp_path / "language.md").read_text()
    assert (tmp_path / "language.svg").exists()
