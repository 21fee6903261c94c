"""What runs and fits cost, in processor time and memory."""

from pathlib import Path

import pytest
import torch

import weightdecomp as wd
from tests.models import QUICK, mlp, sparse
from weightdecomp._checkpoint import Checkpoint
from weightdecomp._cost import Meter

MIB = 2**20


def test_memory_that_an_earlier_fit_freed_does_not_hide_the_next_one_s():
    for mib in (64, 48):
        meter = Meter(fresh=True)
        torch.ones(mib * MIB // 4)

        peak = meter.cost.peak_bytes

        if peak is None:
            pytest.skip("this system does not tell")
        assert 0.9 * mib < peak / MIB < 1.5 * mib


def test_a_resumed_run_has_the_cost_of_all_its_parts(tmp_path: Path):
    first = Checkpoint(tmp_path, {"model": "m"})
    while first.cost().cpu_seconds < 0.2:
        torch.randn(200, 200) @ torch.randn(200, 200)
    first.keep({}, {}, now=True)

    second = Checkpoint(tmp_path, {"model": "m"})

    assert 0.2 <= second.cost().cpu_seconds < first.cost().cpu_seconds + 0.2
    assert "cost" not in second.document, "what a run cost is no part of what it knows"


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_a_run_s_cost_is_saved_and_shown_beside_other_methods(tmp_path: Path):
    model, x = mlp(), sparse(256, 5)
    decomposition = wd.decompose(model, [x], config=QUICK, progress=False)
    decomposition.save(tmp_path / "out")

    loaded = wd.load(tmp_path / "out", model)
    row = wd.compare(loaded, [x], ["pca"], tune=False, progress=False).row("weight decomposition")

    cost = decomposition.outcome.cost
    assert cost is not None and cost.cpu_seconds > 0
    assert loaded.outcome.cost == cost
    assert row.points[0].cpu_seconds == cost.cpu_seconds
    assert row.points[0].parameters > 0


def test_components_that_were_given_cost_no_run():
    model, x = mlp(widths=(5, 3)), sparse(256, 5)
    weight = model[0].weight.detach()

    given = wd.assemble(model, [x], {"0": (torch.eye(5), weight.T)})

    assert given.outcome.cost is None
    table = str(wd.compare(given, [x], ["pca"], tune=False, progress=False))
    (own,) = (line for line in table.splitlines() if line.startswith("weight decomposition"))
    assert own.split()[-2:] == ["-", "-"], own
