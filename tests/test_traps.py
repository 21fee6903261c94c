"""The trap suite's answers are exact, its score knows them, and its runs can be stopped and shared out."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import trap_run, traps
from benchmarks.trap_bits import ANSWER, bits
from benchmarks.trap_page import page
from benchmarks.trap_parts import cyclic_code
from benchmarks.trap_superposition import rotations
from benchmarks.trap_tasks import TASKS, Task
from weightdecomp import Config
from weightdecomp.baselines import PCA, SVD, effect_matching

TINY = trap_run.Effort(1, 5, ("pca",), Config(steps=0, sample=64, rounds=1), True, 128, 64)
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
WEIGHTS = [task for task in TASKS if not task.control]


def named(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)


def test_there_are_fourteen_weight_tasks_and_two_controls():
    assert (len(WEIGHTS), len(TASKS)) == (14, 16)
    assert all(task.claim and task.source and task.answer and task.score for task in TASKS)


@pytest.mark.parametrize("task", WEIGHTS, ids=lambda task: task.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_known_answer_scores_one(task: Task, seed: int):
    for trap in task.build(seed):
        data, trial, truth = trap_run.prepared(trap, seed, 128, 512)

        found = trap_run.matched(trap, trial, trap_run.oracle(data, trap), truth)

        assert min(found.matched.scores) > 1 - 1e-5
        assert found.score > 1 - 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("task", WEIGHTS, ids=lambda task: task.name)
def test_random_directions_do_not_pass(task: Task):
    """They do best where the weights have one rank, or a threshold makes half a deletion a whole one."""
    cell = trap_run.Cell(task, trap_run.RANDOM, 0)

    assert trap_run.scored(cell, TINY._replace(scored=512))["score"] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("task", WEIGHTS, ids=lambda task: task.name)
def test_no_known_description_is_shorter_than_the_answer(task: Task):
    """Otherwise a decomposition that describes the model best would be marked wrong."""
    for trap in task.build(0):
        found = bits(trap, 0, n=256)

        assert found[ANSWER] <= min(found.values()) * (1 + 1e-6)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_mechanism_has_an_effect(task: Task, seed: int):
    for trap in task.build(seed):
        _, truth = trap.sample(512, torch.Generator().manual_seed(2 * seed + 1))

        power = truth.square().sum((1, 2))
        assert float(power.min()) > 1e-2 * float(power.max())


@pytest.mark.parametrize("task", WEIGHTS, ids=lambda task: task.name)
def test_the_shares_are_parts_of_the_weights(task: Task):
    """What they do not sum to is what names a goal, or inhibits all, which no circuit owns."""
    unowned = {"ping-pong": 4, "rotations": 1}
    for trap in task.build(0):
        for path in trap.sites:
            whole = trap.model.get_parameter(f"{path}.weight").detach()
            rest = whole - torch.stack([part[path] for part in trap.parts if path in part]).sum(0)
            sizes = torch.linalg.svdvals(rest)
            assert int((sizes > 1e-5 * whole.norm()).sum()) == unowned.get(task.name, 0)


def test_ten_neurons_compute_the_sine():
    (trap,) = named("one function").build(0)
    x, truth = trap.sample(2000, torch.Generator().manual_seed(0))

    variable = x @ trap.model.get_parameter("0.weight")[0].detach()
    along = torch.linalg.svd(truth[0], full_matrices=False).Vh[0]
    error = (truth[0] @ along).abs() - torch.sin(2 * torch.pi * variable).abs()

    assert float(error.abs().max()) < 0.06  # linear between eleven knots


def test_two_codes_of_a_cycle_share_at_most_one_place():
    for places, base in ((15, (0, 1, 4)), (50, (0, 2, 13, 20)), (53, (0, 5, 27, 35, 52))):
        code = cyclic_code(places, base)

        overlap = code @ code.T
        assert float(overlap.fill_diagonal_(0).max()) == 1
        assert bool((code.sum(0) == len(base)).all())


def test_rotations_in_superposition_are_exact():
    """What comes out has the length of what went in, and turning it back by both angles gives what went in."""
    (trap,) = rotations(0)
    x, _ = trap.sample(512, torch.Generator().manual_seed(0))
    state = x.unflatten(1, (4, 53))
    went_in = state[:, 2:].amax(2) - 1

    came_out = trap.model(x).detach()

    # A shift of one keeps the held numbers positive, so that the largest at a kind's places is the circuit's own.
    assert_close(came_out.norm(dim=1), went_in.norm(dim=1), rtol=0, atol=1e-4)
    turned = torch.atan2(came_out[:, 1], came_out[:, 0]) - torch.atan2(went_in[:, 1], went_in[:, 0])
    circuit = (state[:, 0] > 0).unique(dim=0, return_inverse=True)[1]
    for t in circuit.unique():
        angles = turned[circuit == t]
        assert float(torch.stack([angles.cos(), angles.sin()]).mean(1).norm()) > 1 - 1e-3


def test_the_sum_modulo_23_is_always_right():
    for trap in named("modular addition").build(0):
        x, _ = trap.sample(2000, torch.Generator().manual_seed(0))
        a, b = torch.randint(23, (2, 2000), generator=torch.Generator().manual_seed(0))

        assert bool((trap.model(x).argmax(1) == (a + b) % 23).all())


def test_the_induction_head_says_what_followed():
    (trap,) = named("induction head").build(0)
    x, _ = trap.sample(256, torch.Generator().manual_seed(0))
    ids = (x @ torch.linalg.pinv(trap.model.tokens.detach())).argmax(2)
    earlier = (ids[:, :-1] == ids[:, -1:]).float().argmax(1)

    assert bool((trap.model(x).argmax(1) == ids.gather(1, earlier[:, None] + 1)[:, 0]).all())


def test_the_code_computes_a_feature_that_is_on_and_nothing_of_one_below_zero():
    coded, _ = named("compressed computation").build(0)
    x = torch.linalg.pinv(torch.cat([part["0"].sum(0, keepdim=True) for part in coded.parts]) / 4).T

    output, off = coded.model(x).detach(), coded.model(-x).detach()

    assert bool((output.argmax(1) == torch.arange(100)).all())
    assert float(off.abs().max()) < 1e-4


def test_claims_beyond_the_naive_solution_count_against_a_method():
    """Singular pairs of the naive model: as many units as neurons, none of them a neuron."""
    _, naive = named("compressed computation").build(0)
    data, trial, truth = trap_run.prepared(naive, 0, 256, 512)
    twice = trap_run.oracle(data, naive)
    bank = trap_run.components_of(data.sites[0], [part["0"] / 2 for part in naive.parts for _ in range(2)])

    found = trap_run.matched(naive, trial, trap_run.Fitted("halves", "", data.sites, [bank]), truth)

    assert trap_run.matched(naive, trial, twice, truth).score > 1 - 1e-5
    assert found.matched.claims == 100
    assert min(found.matched.scores) > 1 - 1e-5
    assert abs(found.score - 0.5) < 1e-5


def test_a_vector_is_not_a_plane():
    """Three units that together span a plane are one too many."""
    relu, _ = named("modular addition").build(0)
    data, trial, truth = trap_run.prepared(relu, 0, 256, 256)
    answer = trap_run.oracle(data, relu)
    shares = [[part[site.path] / 3 for part in relu.parts if site.path in part] * 3 for site in data.sites]
    thirds = [trap_run.components_of(*pair) for pair in zip(data.sites, shares, strict=True)]

    found = trap_run.matched(relu, trial, trap_run.Fitted("thirds", "", data.sites, thirds), truth)

    assert trap_run.matched(relu, trial, SVD().fit(data), truth).score > 1 - 1e-5
    assert trap_run.matched(relu, trial, answer, truth).score > 1 - 1e-5
    assert found.score < 0.9


def test_units_must_be_at_the_mechanism_s_own_sites():
    """A unit with the right effect at the wrong site is not the mechanism."""
    (trap,) = named("redundant copies").build(0)
    data, trial, truth = trap_run.prepared(trap, 0, 128, 256)
    answer = trap_run.oracle(data, trap)
    swapped = [{"b"} if "a" in part else {"a"} for part in trap.parts]

    assert min(effect_matching(trial, answer, truth, [set(part) for part in trap.parts]).scores) > 1 - 1e-6
    # Both copies of a feature have the same effect, so that only the site tells them apart.
    assert min(effect_matching(trial, answer, truth, swapped).scores) > 0.9
    one = trap_run.replace(answer, banks=answer.banks[:1])
    assert sum(score > 0.9 for score in effect_matching(trial, one, truth, [set(p) for p in trap.parts]).scores) == 6


def test_units_that_mix_two_mechanisms_score_less_than_one():
    (trap,) = named("absolute values").build(0)
    data, trial, truth = trap_run.prepared(trap, 0, 128, 128)

    found = trap_run.matched(trap, trial, PCA(share=1.0).fit(data), truth)

    assert found.score < 0.9


def test_a_stopped_run_goes_on_and_shards_make_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traps, "TASKS", TASKS[2:4])

    first = traps.run(TINY, (0, 2), tmp_path, progress=False, jobs=2)
    both = traps.run(TINY, (1, 2), tmp_path, progress=False)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = traps.run(TINY, (0, 1), tmp_path, progress=False)

    assert len(first) == 4
    assert len(both) == len(traps.cells(TINY)) == 8
    assert again == both
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    html = page(both, TASKS[2:4], 0.95, traps.costs(both))
    assert "<svg" in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "twins" in traps.summary(both)
    header, *rows = traps.costs(both)
    assert [row[0] for row in rows] == list(dict.fromkeys(one["method"] for one in both))
    assert all("-" not in row[1:] for row in rows), "a cell does not tell what it cost"


def test_a_cell_can_be_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(traps, "CACHE", tmp_path / "cells")
    monkeypatch.setattr(traps, "SMOKE", TINY)

    traps.main(["--smoke", "--task", "twi*", "--method", "pca", "--jobs", "1", "--out", str(tmp_path)])

    (made,) = (tmp_path / "cells").iterdir()
    assert '"twins"' in made.read_text()
    with pytest.raises(SystemExit):
        traps.main(["--smoke", "--task", "twinz", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        traps.main(["--smoke", "--jobs", "0", "--out", str(tmp_path)])


def test_cells_of_other_records_are_shown_beside_ones_own(tmp_path: Path):
    cell = {"task": "twins", "method": "pca", "seed": 0}
    own = [{**cell, "score": 0.5, "commit": "new"}]
    others = [{**cell, "score": 0.1}, {**cell, "seed": 1, "score": 0.2}]
    record = tmp_path / "other.json"
    record.write_text(json.dumps({"provenance": {"commit": "old"}, "cells": others}))

    found = traps.joined(own, [traps.record(str(record))])

    assert [(one["seed"], one["score"], one["commit"]) for one in found] == [(0, 0.5, "new"), (1, 0.2, "old")]


_OF_ANOTHER_KIND = '{"provenance": {"commit": "old"}, "cells": [{"commit": "old"}]}'


@pytest.mark.parametrize(
    "text", [None, "no JSON", "{}", "[]", '{"provenance": 1, "cells": []}', '{"cells": [3]}', _OF_ANOTHER_KIND]
)
def test_a_file_that_is_no_record_is_refused_before_anything_is_run(text: str | None, tmp_path: Path):
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)

    with pytest.raises(argparse.ArgumentTypeError, match="expected a record of this benchmark"):
        traps.record(str(file))


def test_another_configuration_is_another_cell():
    cell = traps.cells(TINY)[0]

    assert traps.key(cell, TINY) != traps.key(cell, TINY._replace(steps=6))
    assert traps.key(cell, TINY) == traps.key(cell, TINY._replace(seeds=5))


@pytest.mark.parametrize("word", ["0/2", "3/2", "x", "1"])
def test_a_bad_shard_is_refused(word: str):
    with pytest.raises(argparse.ArgumentTypeError, match="expected i/n"):
        traps.shard(word)
