"""Several processes: real ones, started by torchrun, that exchange by gloo. Inputs do not divide evenly among them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import mlp, sparse
from weightdecomp import __main__, _checkpoint
from weightdecomp._processes import ALONE, Processes

pytestmark = [
    pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()),
        reason="this torch has no gloo, through which processes exchange on CPUs",
    ),
]

STEPS = 60
COMMAND = ["-m", "weightdecomp", "decompose", "--model", "together:model", "--data", "together:inputs"]
COMMAND += ["--steps", str(STEPS), "--no-progress"]

# What the command line is given, and what three processes do together.
MODULE = """
import os
import sys

import torch

import weightdecomp as wd
from tests.models import QUICK, Calls, drawn, ids, mlp, seeded, sparse
from weightdecomp import _checkpoint, _gatekeeper, _null, _trade
from weightdecomp._processes import Processes, job, local


def model():
    return mlp(torch.float64, seed=2)


def inputs():
    return [sparse(513, 5, torch.float64)]


def table():
    read = lambda m, x: m.read(m.token(x) + m.place(torch.eye(3, dtype=torch.float64)))
    parts = {"token": torch.nn.Embedding(7, 4), "place": torch.nn.Linear(3, 4), "read": torch.nn.Linear(4, 2)}
    return seeded(Calls(read, **parts)).double()


def refusal(group, *arguments, **options):
    try:
        wd.decompose(*arguments, progress=False, group=group, **options)
    except ValueError as error:
        return str(error)
    return "accepted"


def refused(group):
    apart = sparse(64, 5, torch.float64, seed=torch.distributed.get_rank())
    yield refusal(group, model(), [apart], config=QUICK)
    yield refusal(group, model(), [sparse(2, 5, torch.float64)], config=QUICK)
    yield refusal(group, model(), inputs(), config=wd.Config(batch=2))
    yield refusal(group, table(), [ids(7, 64, 3)], config=QUICK)


def exchanged(group):
    processes, every = Processes(group, shard=True), drawn(7, 3, 5)
    own = processes.own(every)
    assert len(own) == processes.count(7) and own.equal(every[processes.indices(7)])
    torch.testing.assert_close(processes.sum(own.sum(0)), every.sum(0))
    torch.testing.assert_close(processes.mean(own), every.mean())
    torch.testing.assert_close(processes.mean(own, 0), every.mean(0))
    assert processes.total(len(own)) == 7
    assert processes.columns(own).equal(every.tensor_split(processes.n, -1)[processes.index])
    assert processes.columns(own[..., :1]).shape == (7, 3, int(processes.index == 0))
    parts = processes.sharded(every.clone()).requires_grad_()
    assert local(parts).equal(every.tensor_split([3, 6])[processes.index]) and processes.whole(parts).equal(every)
    (slope,) = torch.autograd.grad((processes.whole(parts) * (processes.index + 1)).sum(), [parts])
    assert local(slope).equal(torch.full_like(local(parts), 6))  # 1 + 2 + 3, summed where the rows are
    assert processes.rows(own).equal(torch.cat([every[i :: processes.n] for i in range(processes.n)]))
    for first in range(4):
        whole = torch.rand(7 - first, 3, generator=torch.Generator().manual_seed(first))
        mine = torch.empty(processes.count(7) - processes.count(first), 3)
        processes.uniform_(mine, first, 7, torch.Generator().manual_seed(first))
        assert mine.equal(whole[[i - first for i in range(first, 7) if i % processes.n == processes.index]])
    given = ({"x": every, "none": every[:0]}, {"a": 1}) if processes.index == 1 else (None, None)
    found, document = processes.sent(1, *given)
    assert document == {"a": 1} and found["x"].equal(every) and found["none"].shape == (0, 3, 5)


def sharded(group, checkpoint):
    _gatekeeper.REVIEW, _gatekeeper._SCOUT, _trade._ROUNDS, _null._DRAWS = (4, 1, 64), (2, 1, 64), 6, 1
    _checkpoint._LEAST, _checkpoint._SHARE = 0.0, 1e9
    call = {"config": wd.Config(steps=20, sample=256, batch=32, rounds=2), "seed": 2, "progress": False}
    found = wd.decompose(model(), inputs(), group=group, shard=True, checkpoint=checkpoint, **call)
    again = wd.decompose(model(), inputs(), group=group, shard=True, checkpoint=checkpoint, **call)
    alone = wd.decompose(model(), inputs(), **call)
    assert alone.outcome.steps > 0, "no round of refinement was kept"
    for path, parts in alone.parts.items():
        for one in (found, again):
            for x, y in zip((*one.parts[path].pieces, one.parts[path].thresholds), (*parts.pieces, parts.thresholds)):
                torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


if __name__ == "__main__":
    with job() as group:
        exchanged(group)
        sharded(group, sys.argv[1] + ".run")
        told = "\\n".join(refused(group))
        open(f"{sys.argv[1]}.{torch.distributed.get_rank()}", "w").write(told)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module above."""
    directory = tmp_path_factory.mktemp("job")
    (directory / "together.py").write_text(MODULE)
    return directory


@pytest.fixture(scope="module")
def alone() -> wd.Decomposition:
    """What one process finds."""
    return decomposed(None)


def decomposed(checkpoint: Path | None, stop: int = -1) -> wd.Decomposition:
    """The command line's run in this process, stopped by Ctrl-C at a step."""

    def stopping(step: int, terms: dict[str, float]) -> None:
        if step == stop:
            raise KeyboardInterrupt

    return wd.decompose(
        mlp(torch.float64, seed=2),
        [sparse(513, 5, torch.float64)],
        config=wd.Config(steps=STEPS),
        checkpoint=checkpoint,
        progress=False,
        on_step=stopping,
    )


def started(folder: Path, n: int, *words: str) -> subprocess.Popen[str]:
    """A job of n processes."""
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    # The loopback address: not every machine resolves its own name.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", *words]
    pipe, own = subprocess.PIPE, os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=own)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


def assert_same(found: wd.Decomposition, expected: wd.Decomposition) -> None:
    """The same components, gates, bits and circuits, up to the rounding of sums over inputs (in float64)."""
    assert found.groups == expected.groups
    for path, parts in expected.parts.items():
        own = found.parts[path]
        for x, y in zip((*own.pieces, own.thresholds), (*parts.pieces, parts.thresholds), strict=True):
            assert_close(x, y, rtol=1e-8, atol=1e-10)
        assert own.frequencies.equal(parts.frequencies)
    one, other = found.outcome, expected.outcome
    assert (one.converged, one.steps, one.compresses) == (other.converged, other.steps, other.compresses)
    numbers = [[x.damage, x.effort, x.null_effort, x.ledger.total, x.ledger.residual] for x in (one, other)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-8)


@pytest.mark.parametrize(
    ("n", "words"), [(2, []), *(pytest.param(n, ["--shard"], marks=pytest.mark.slow) for n in (2, 3))]
)
def test_several_processes_find_what_one_finds(
    n: int, words: list[str], folder: Path, alone: wd.Decomposition, tmp_path: Path
):
    """R2; and they save and print once."""
    assert alone.outcome.steps > 0, "no round of refinement was kept"

    code, output, errors = ended(started(folder, n, *COMMAND, *words, "--out", str(tmp_path / "out"), "--json"))

    assert code == (0 if alone.converged else 1), errors
    assert json.loads(output)["steps"] == alone.outcome.steps
    assert_same(wd.load(tmp_path / "out", mlp(torch.float64, seed=2)), alone)


@pytest.mark.parametrize("shard", [[], pytest.param(["--shard"], marks=pytest.mark.slow)])
def test_a_run_of_one_process_goes_on_with_two(
    shard: list[str], folder: Path, alone: wd.Decomposition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """R2."""
    monkeypatch.setattr(_checkpoint, "_LEAST", 0.0)
    monkeypatch.setattr(_checkpoint, "_SHARE", 1e9)
    with pytest.raises(KeyboardInterrupt, match="repeat the same call to resume"):
        decomposed(tmp_path / "run", stop=STEPS // 10)  # in the second round
    assert kept(tmp_path / "run").get("step") == STEPS // 10

    words = [*shard, "--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    _, _, errors = ended(started(folder, 2, *COMMAND, *words))

    assert (tmp_path / "out").exists(), errors
    assert_same(wd.load(tmp_path / "out", mlp(torch.float64, seed=2)), alone)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_job_and_another_number_goes_on(
    killed: int, folder: Path, alone: wd.Decomposition, tmp_path: Path
):
    """R2: a real SIGKILL of one of two processes between two steps."""
    run, out = tmp_path / "run", tmp_path / "out"
    process = started(folder, 2, *COMMAND, "--checkpoint", str(run), "--out", str(out))
    while not kept(run).get("step"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == str(killed):
            child.send_signal(signal.SIGKILL)

    code, _, errors = ended(process)

    assert code != 0
    assert f"progress is in {str(run)!r}: repeat the same call to resume" in errors
    assert "Signal 9 (SIGKILL)" in errors
    assert not out.exists()
    assert kept(run)["step"] > 0 and not kept(run).get("finished")
    assert_same(decomposed(run), alone)


def kept(checkpoint: Path) -> dict:
    """How far a checkpoint has gone."""
    path = checkpoint / "checkpoint.json"
    return json.loads(path.read_text())["document"] if path.exists() else {}


def test_processes_exchange_what_one_process_has_and_refuse_what_cannot_be_shared(folder: Path, tmp_path: Path):
    code, _, errors = ended(started(folder, 3, str(folder / "together.py"), str(tmp_path / "told")))

    assert code == 0, errors
    first, *others = [(tmp_path / f"told.{i}").read_text() for i in range(3)]
    assert others == [first, first]
    for line, expected in zip(
        first.splitlines(),
        [
            "the 3 processes of this run were given different batches; every process must make the same call",
            "batches leave 2 inputs to measure on, fewer than there are processes (3); pass more inputs",
            "config.batch is 2, less than one input for each of 3 processes",
            "site 'place' is called with rows of shape (3,) on 1 inputs: rows that do not belong to single inputs",
        ],
        strict=True,
    ):
        assert line.startswith(expected)


def test_other_verbs_want_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(__main__, "job", lambda: nullcontext(object()))

    code = __main__.main(["verify", "nowhere", "--model", "together:model", "--data", "together:inputs"])

    assert code == 2
    assert "only decompose runs on several processes; start this verb with python -m" in capsys.readouterr().err


def test_one_process_exchanges_nothing(quick: None, monkeypatch: pytest.MonkeyPatch):
    for name in ("all_reduce", "all_gather", "all_to_all_single", "broadcast"):
        monkeypatch.setattr(dist, name, None)
    x = sparse(8, 5)

    assert ALONE.own(x) is x and ALONE.columns(x) is x and ALONE.rows(x) is x and ALONE.sum(x) is x
    assert Processes().mean(x).equal(x.mean())
    wd.decompose(mlp(), [sparse(64, 5)], config=wd.Config(steps=2, sample=64, batch=16), progress=False)
