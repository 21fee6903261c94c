import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import Calls, drawn, ids, mlp, sparse
from weightdecomp._divergence import kl


def moved(model: nn.Module, by: float) -> nn.Module:
    """The model with another number added to its first output."""
    return Calls(lambda m, x: m.inner(x) + by * torch.eye(3)[0], inner=model).eval()


@torch.no_grad()
def test_figures_are_those_of_a_loop():
    model, on, off = mlp(), sparse(30, 5), sparse(20, 5, seed=2)
    other = moved(model, 2.0)

    row = wd.edit_report(model, other, on.split(7), [off], "kl").row("edited")

    each = kl(other(on), model(on)).double()
    assert row.on_target.inputs == 30 and row.off_target.inputs == 20
    assert row.on_target.mean == pytest.approx(float(each.mean()))
    assert row.on_target.error == pytest.approx(float(each.std() / 30**0.5))
    assert row.on_target.worst == pytest.approx(float(each.max()))
    flips = (other(off).argmax(-1) != model(off).argmax(-1)).double().mean()
    assert row.off_target.flipped == pytest.approx(float(flips))
    assert 0 < row.on_target.flipped < 1


def test_an_edit_of_nothing_changes_nothing():
    model = mlp()

    row = wd.edit_report(model, mlp(), [sparse(8, 5)], [sparse(8, 5)], "kl").rows[0]

    assert row.on_target.mean == row.off_target.worst == row.on_target.flipped == 0


def test_positions_are_averaged_before_inputs():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).eval()
    other = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).eval()
    batch = ids(7, 6, 5)

    change = wd.edit_report(model, other, [batch], [batch]).rows[0].on_target

    with torch.no_grad():
        each = kl(other(batch), model(batch)).mean(1)
    assert change.inputs == 6
    assert_close(change.worst, float(each.max()))


def test_real_outputs_have_no_largest_entry():
    model = mlp()

    report = wd.edit_report(model, moved(model, 1.0), [sparse(8, 5)], [sparse(8, 5)])

    assert report.divergence == "mse"
    assert report.rows[0].on_target.flipped is None
    assert report.rows[0].on_target.mean == pytest.approx(1 / 3)
    assert "flipped" not in str(report)


def test_a_report_prints_a_row_a_model_and_goes_into_json():
    model, x = mlp(), sparse(8, 5)

    report = wd.edit_report(model, {"half": moved(model, 0.5), "two": moved(model, 2.0)}, [x], [x[:1]], "kl")

    lines = str(report).splitlines()
    assert lines[0] == "Divergence from the original (kl, nats) on 8 on-target and 1 off-target inputs: " \
        "mean +- standard error"  # fmt: skip
    assert [line.split()[0] for line in lines[2:]] == ["edit", "half", "two"]
    assert lines[2].split() == ["edit", "effect", "worst", "flipped", "damage", "worst", "flipped"]
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["off_target"]["error"] is None
    assert report.row("half").on_target.mean < report.row("two").on_target.mean


def test_a_report_that_cannot_be_made_is_refused():
    model, x = mlp(), drawn(8, 5).float()

    with pytest.raises(ValueError, match="edited is empty; pass an edited model, or several by name"):
        wd.edit_report(model, {}, [x], [x])
    with pytest.raises(ValueError, match="batches is empty"):
        wd.edit_report(model, model, [], [x])
    with pytest.raises(ValueError, match="divergence must be"):
        wd.edit_report(model, model, [x], [x], "l1")
    with pytest.raises(ValueError, match="no edit is named 'b'; the edits are \\['a'\\]"):
        wd.edit_report(model, {"a": model}, [x], [x]).row("b")
