import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import weightdecomp as wd
from tests.models import QUICK, mlp, sparse
from weightdecomp import _checkpoint, _decompose, _storage
from weightdecomp._batches import digest
from weightdecomp._checkpoint import Checkpoint

# A run that writes a checkpoint whenever it could, says so, and leaves its result as a file. A fork of one process
# serves as many runs as a test asks for: importing torch takes longer than a run.
RUN = """
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

import weightdecomp as wd
from tests.models import mlp, sparse
from weightdecomp import _checkpoint, _rounds, _storage

torch.set_num_threads(1)
warnings.simplefilter("ignore", wd.NumericalWarning)
_checkpoint._LEAST, _checkpoint._SHARE = 0.0, 1e9
_rounds._BETTER = 2.0  # rounds are kept, and with them all that a resumed run must know of kept rounds
directory, result, limits = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")


def killing(limit):
    commit, written = _storage.commit, iter(range(1000))
    def replacement(files):
        now = next(written) == limit // 2
        if now and limit % 2 == 0:
            os.kill(os.getpid(), 9)
        commit(files)
        if now:
            os.kill(os.getpid(), 9)
    return replacement


def run(limit):
    if limit >= 0:
        _storage.commit = killing(limit)
    config = wd.Config(steps=12, rounds=3, sample=256, batch=64)
    found = wd.decompose(mlp(), [sparse(256, 5)], checkpoint=directory, progress=False, config=config)
    tensors = {
        f"{path} {i}": x
        for path, parts in found.parts.items()
        for i, x in enumerate((*parts.pieces, parts.thresholds, parts.frequencies))
    }
    torch.save({"tensors": tensors, "outcome": found.outcome, "groups": found.groups}, result)


for limit in limits:
    child = os.fork()
    if not child:
        code = 1
        try:
            run(int(limit))
            code = 0
        except Exception:
            traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    there = _storage.exists(directory, "checkpoint")
    step = _storage.read(directory, "checkpoint").document.get("step", 0) if there else -1
    print(os.WTERMSIG(status), os.WEXITSTATUS(status), step, flush=True)
"""


def runs(directory: Path, result: Path, limits: list[int]) -> list[list[int]]:
    """Signal, exit code and the step that the checkpoint stands at, for one run after the other in one folder.

    A run is killed at its write number limit // 2: before it where the limit is even, else after it; -1 lets it end.
    """
    command = [sys.executable, "-c", RUN, str(directory), str(result), ",".join(map(str, limits))]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("unbroken")
    assert runs(directory / "run", directory / "result", [-1]) == [[0, 0, 12]]
    return torch.load(directory / "result", weights_only=False)


def test_a_run_killed_again_and_again_ends_as_an_unbroken_one(unbroken: dict, tmp_path: Path):
    """R1: real processes and SIGKILL, in the starts and between any two steps of the refinement."""
    draw = random.Random(0)
    limits = [0, 1, 2, *(draw.randrange(1, 7) for _ in range(5)), -1]

    ends = runs(tmp_path / "run", tmp_path / "result", limits)

    assert [end[0] for end in ends] == [signal.SIGKILL] * (len(limits) - 1) + [0]
    assert ends[-1][1] == 0
    steps = [step for _, _, step in ends]
    assert {-1, 0} <= set(steps), "no run was killed in the starts"
    assert len({step for step in steps if 0 < step < 12}) >= 3, "too few were killed in the refinement"
    found = torch.load(tmp_path / "result", weights_only=False)
    assert found["tensors"].keys() == unbroken["tensors"].keys()
    different = [n for n, x in unbroken["tensors"].items() if not torch.equal(found["tensors"][n], x)]
    assert not different
    assert found["outcome"] == unbroken["outcome"]
    assert found["groups"] == unbroken["groups"]


INTERRUPTED = """
import sys, warnings
import weightdecomp as wd
from tests.models import mlp, sparse

warnings.simplefilter("ignore", wd.NumericalWarning)
config = wd.Config(steps=10**6, rounds=1, sample=64, batch=64)
wd.decompose(mlp(), [sparse(64, 5)], checkpoint=sys.argv[1], config=config, progress=False,
             on_step=lambda step, terms: print(step, flush=True))
"""


def test_control_c_keeps_the_checkpoint_and_says_how_to_resume(tmp_path: Path):
    """A real SIGINT to a real process, once its checkpoint holds steps."""
    directory = tmp_path / "run"
    command = [sys.executable, "-c", INTERRUPTED, str(directory)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        while not _step(directory):
            assert process.stdout.readline(), process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)

    last = errors.strip().splitlines()[-1]
    assert last == f"KeyboardInterrupt: interrupted; progress is in {str(directory)!r}: repeat the same call to resume"
    assert process.returncode == -signal.SIGINT
    assert _step(directory) > 0


def _step(directory: Path) -> int:
    if not _storage.exists(directory, "checkpoint"):
        return 0
    return _storage.read(directory, "checkpoint").document.get("step", 0)


def test_control_c_without_a_checkpoint_is_passed_on(quick: None):
    def interrupt(step: int, terms: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="^$"):
        wd.decompose(mlp(), [sparse(64, 5)], config=QUICK, progress=False, on_step=interrupt)


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_a_run_stopped_by_an_error_resumes_from_its_last_checkpoint(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """R1, and no step is made twice."""
    monkeypatch.setattr(_checkpoint, "_LEAST", 0.0)
    monkeypatch.setattr(_checkpoint, "_SHARE", 1e9)
    seen: list[int] = []

    def stop_once(step: int, terms: dict[str, float]) -> None:
        seen.append(step)
        if seen == [0, 1, 2]:
            raise RuntimeError("the disk of the tracker is full")

    def run(checkpoint: Path | None) -> wd.Decomposition:
        return wd.decompose(
            mlp(), [sparse(64, 5)], config=QUICK, progress=False, checkpoint=checkpoint, on_step=stop_once
        )

    with pytest.raises(RuntimeError, match="tracker"):
        run(tmp_path / "run")
    resumed = run(tmp_path / "run")

    assert seen == [0, 1, 2, 2, 3]
    assert_same(resumed, run(None))


def assert_same(one: wd.Decomposition, other: wd.Decomposition) -> None:
    assert one.outcome == other.outcome
    assert one.groups == other.groups
    for path, parts in one.parts.items():
        assert torch.equal(parts.thresholds, other.parts[path].thresholds)
        assert all(torch.equal(a, b) for a, b in zip(parts.pieces, other.parts[path].pieces, strict=True))


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_repeating_a_finished_run_gives_its_result_without_a_step(quick: None, tmp_path: Path):
    def run(seen: list[int]) -> wd.Decomposition:
        return wd.decompose(
            mlp(),
            [sparse(64, 5)],
            config=QUICK,
            progress=False,
            checkpoint=tmp_path / "run",
            on_step=lambda step, terms: seen.append(step),
        )

    first, again = run(seen := []), run(seen_again := [])

    assert seen and not seen_again
    assert_same(again, first)


KEY = {"model": "a1", "batches": "b2", "sites": ["0", "2"], "tolerance": 0.02, "seed": 0, "config": {"steps": 4}}


@pytest.mark.parametrize("name, value", [("seed", 1), ("tolerance", 0.1), ("sites", ["0"]), ("config", {"steps": 5})])
def test_another_runs_folder_is_refused_with_what_differs(name: str, value: object, tmp_path: Path):
    Checkpoint(tmp_path, KEY).keep({"x": torch.ones(2)}, {"step": 3}, now=True)

    with pytest.raises(ValueError, match=f"holds another run: {name} differ; choose an empty folder, or repeat"):
        Checkpoint(tmp_path, KEY | {name: value})

    assert Checkpoint(tmp_path, KEY).document["step"] == 3


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("change", ["model", "batches", "seed", "tolerance", "config", "divergence", "sites"])
def test_every_argument_of_a_run_is_part_of_what_its_folder_is_known_by(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(**options: Any) -> None:
        arguments = {"model": mlp(), "batches": [sparse(64, 5)], "divergence": "mse", "checkpoint": tmp_path}
        wd.decompose(**(arguments | options), progress=False)

    def stop(self: Checkpoint, *_: object, **__: object) -> None:
        Checkpoint.keep(self, {}, {}, now=True)
        raise _Stopped

    other = {
        "model": mlp(seed=1),
        "batches": [sparse(64, 5, seed=2)],
        "seed": 1,
        "tolerance": 0.03,
        "config": wd.Config(steps=5),
        "divergence": "kl",
        "sites": ["0"],
    }
    with monkeypatch.context() as patch, pytest.raises(_Stopped):
        patch.setattr(_decompose, "Checkpoint", type("Stopping", (Checkpoint,), {"keep": stop}))
        run()

    with pytest.raises(ValueError, match=f"holds another run: {change} differ; "):
        run(**{change: other[change]})


@given(order=st.permutations(["a", "b", "c"]))
def test_the_order_of_a_dict_of_inputs_does_not_matter(order: list[str]):
    """R1."""
    batch = {"a": torch.ones(2, 3), "b": torch.zeros(2), "c": None}

    assert digest([{name: batch[name] for name in order}]) == digest([batch])


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2), "b": torch.ones(2, 3)},
        {"a": torch.ones(2, 3), "b": torch.zeros(2), "c": 1},
        {"a": torch.ones(3, 2), "b": torch.zeros(2)},
        {"a": torch.ones(2, 3).double(), "b": torch.zeros(2)},
        (torch.ones(2, 3), torch.zeros(2)),
    ],
)
def test_other_inputs_have_another_fingerprint(other: Any):
    assert digest([other]) != digest([{"a": torch.ones(2, 3), "b": torch.zeros(2)}])


def test_a_folder_with_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("do not lose this")

    with pytest.raises(ValueError, match="not empty and holds no checkpoint, but 'thesis.txt'"):
        wd.decompose(mlp(), [sparse(64, 5)], checkpoint=tmp_path, progress=False)


def test_kept_values_are_found_by_their_prefix(tmp_path: Path):
    saved = Checkpoint(tmp_path, KEY)

    saved.keep({"start|0|v": torch.ones(1), "start|01|v": torch.zeros(1)}, {"step": 1}, now=True)

    assert list(saved.under("start|0|")) == ["v"]
    assert saved.document == {"step": 1}
