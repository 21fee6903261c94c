"""The trap suite's answers are exact, its score knows them, and its runs can be stopped and shared out."""

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import traps
from benchmarks.trap_page import page
from benchmarks.trap_scores import effect_matching
from benchmarks.trap_tasks import TASKS, Task, Trap
from weightdecomp import Config
from weightdecomp._divergence import named
from weightdecomp._sites import find_sites
from weightdecomp.baselines import PCA, Data, protocols

TINY = traps.Effort(1, 5, ("pca",), Config(steps=0, sample=64, rounds=1))
WEIGHTS = [task for task in TASKS if not task.control]


def prepared(trap: Trap) -> tuple[Data, protocols.Trial, torch.Tensor]:
    x, truth = trap.sample(128, torch.Generator().manual_seed(0))
    sites, _ = find_sites(trap.model, x, trap.sites)
    data = Data(trap.model, [x], sites, named("mse", "for a test"), 0.02)
    return data, protocols.trial(trap.model, x, sites, data.divergence), truth


@pytest.mark.parametrize("task", WEIGHTS, ids=lambda task: task.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_known_answer_scores_one(task: Task, seed: int):
    for trap in task.build(seed):
        data, trial, truth = prepared(trap)

        scores = effect_matching(trial, traps.oracle(data, trap), truth, trap.most)

        assert min(scores) > 1 - 1e-6


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_mechanism_has_an_effect(task: Task):
    for trap in task.build(0):
        _, truth = trap.sample(512, torch.Generator().manual_seed(0))

        power = truth.square().sum((1, 2))
        assert float(power.min()) > 1e-3 * float(power.max())


@pytest.mark.parametrize("task", WEIGHTS, ids=lambda task: task.name)
def test_the_shares_are_parts_of_the_weights(task: Task):
    """What they do not sum to is at most what names a goal, which no circuit owns."""
    for trap in task.build(0):
        for path in trap.sites:
            whole = trap.model.get_parameter(f"{path}.weight")
            rest = whole - torch.stack([part[path] for part in trap.parts]).sum(0)
            assert int(torch.count_nonzero(rest.abs() > 1e-6)) <= (12 if task.name == "ping-pong" else 0)


def test_ten_neurons_compute_the_sine():
    (trap,) = next(task for task in TASKS if task.name == "one function").build(0)
    x, truth = trap.sample(2000, torch.Generator().manual_seed(0))

    variable = x @ trap.model.get_parameter("0.weight")[0].detach()
    along = torch.linalg.svd(truth[0], full_matrices=False).Vh[0]
    error = (truth[0] @ along).abs() - torch.sin(2 * torch.pi * variable).abs()

    assert float(error.abs().max()) < 0.06  # linear between eleven knots


def test_units_that_mix_two_mechanisms_score_less_than_one():
    (trap,) = next(task for task in TASKS if task.name == "absolute values").build(0)
    data, trial, truth = prepared(trap)

    assert sum(effect_matching(trial, PCA(share=1.0).fit(data), truth, None)) / len(truth) < 0.9


def test_a_stopped_run_goes_on_and_shards_make_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traps, "TASKS", TASKS[1:3])
    monkeypatch.setattr(traps, "_FIT", 128)
    monkeypatch.setattr(traps, "_SCORED", 32)

    first = traps.run(TINY, (0, 2), tmp_path, progress=False)
    both = traps.run(TINY, (1, 2), tmp_path, progress=False)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = traps.run(TINY, (0, 1), tmp_path, progress=False)

    assert len(first) == 4
    assert len(both) == len(traps.cells(TINY)) == 8
    assert again == both
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    html = page(both, TASKS[1:3], 0.95)
    assert "<svg" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "twins" in traps.summary(both)


def test_another_configuration_is_another_cell():
    cell = traps.cells(TINY)[0]

    assert traps.key(cell, TINY) != traps.key(cell, TINY._replace(steps=6))
    assert traps.key(cell, TINY) == traps.key(cell, TINY._replace(seeds=5))


@pytest.mark.parametrize("word", ["0/2", "3/2", "x", "1"])
def test_a_bad_shard_is_refused(word: str):
    with pytest.raises(argparse.ArgumentTypeError, match="expected i/n"):
        traps.shard(word)
