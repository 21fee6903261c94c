import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from weightdecomp import digits
from weightdecomp.__main__ import main

ROOT = Path(__file__).parents[1]
MODULE = """
import torch
from torch import nn

number = 3

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 2))

def tied():
    one = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    one[2].weight = one[0].weight
    return one

def batches():
    return [torch.rand(64, 4, generator=torch.Generator().manual_seed(1))]

def far(output, target):
    return (output - target).abs().sum(-1)

def broken():
    raise RuntimeError("no such checkpoint")

def nothing():
    return None

def none():
    return []

def one():
    return batches()[0]

def ends():
    yield batches()[0]
    raise KeyError("of a row")

def endless():
    while True:
        yield batches()[0]
"""
MODEL = ["--model", "toy:model", "--weights", "toy.safetensors", "--data", "toy:batches"]
RUN = ["decompose", *MODEL, "--out", "out", "--steps", "2", "--no-progress"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    line = [sys.executable, "-m", "weightdecomp", *words]
    return subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user who has a model, its weights and data."""
    folder = tmp_path_factory.mktemp("user") / "folder"
    folder.mkdir()
    (folder / "toy.py").write_text(MODULE)
    rng = torch.Generator().manual_seed(2)
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "3.weight": (2, 6), "3.bias": (2,)}
    weights = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    safetensors.torch.save_file(weights, folder / "toy.safetensors")
    del weights["3.bias"]
    weights["4.bias"], weights["0.bias"] = torch.zeros(2), torch.zeros(7)
    safetensors.torch.save_file(weights, folder / "other.safetensors")
    safetensors.torch.save_file({"0.weight": torch.zeros(4, 4)}, folder / "tied.safetensors")
    torch.save(torch.nn.Linear(2, 2), folder / "toy.pt")
    return folder


@pytest.fixture(scope="module")
def made(template: Path) -> subprocess.CompletedProcess[str]:
    """`decompose` in that folder's neighbour, with a progress bar."""
    shutil.copytree(template, template.with_name("saved"))
    return command(template.with_name("saved"), *[word for word in RUN if word != "--no-progress"])


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A copy of the user's folder."""
    return Path(shutil.copytree(template, tmp_path / "own"))


@pytest.fixture
def saved(made: subprocess.CompletedProcess[str], folder: Path, template: Path) -> Path:
    """Another one, with the decomposition in `out`."""
    shutil.copytree(template.with_name("saved") / "out", folder / "out")
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current one, for calls in this process, which spare the start of another."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    return folder


def test_decompose_prints_its_table_and_keeps_progress_apart(made: subprocess.CompletedProcess[str]):
    assert made.returncode in (0, 1)
    assert made.stdout.startswith("site ")
    assert "/s]" in made.stderr
    assert "/s]" not in made.stdout


def test_a_saved_decomposition_can_be_verified_by_the_next_command(saved: Path):
    done = command(saved, "verify", "out", *MODEL, "--steps", "20", "--no-progress")

    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""
    assert "Verification on 64 inputs" in done.stdout


def test_the_document_holds_every_figure_of_the_run(here: Path, capsys: pytest.CaptureFixture[str]):
    main([*RUN, "--json", "--sites", "3", "--seed", "5", "--tolerance", "0.1", "--divergence", "kl"])

    document = json.loads(capsys.readouterr().out)
    assert [site["path"] for site in document["sites"]] == ["3"]
    assert (document["seed"], document["tolerance"], document["divergence"]["name"]) == (5, 0.1, "kl")
    assert document["config"]["steps"] == 2
    assert {"converged", "reason", "damage", "verdict", "ledger", "circuits", "skipped"} <= document.keys()


def test_verify_says_in_json_what_it_says_in_its_exit_code(saved: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    code = main(["verify", "out", *MODEL, "--steps", "20", "--json", "--no-progress"])

    assert json.loads(capsys.readouterr().out)["converged"] == (code == 0)


def test_an_unmet_tolerance_is_exit_code_one_and_still_saved(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("weightdecomp.Decomposition.converged", False)

    code = main(RUN)

    assert code == 1
    assert (here / "out" / "decomposition.json").exists()


def test_a_divergence_of_the_users_own_is_found_by_name(here: Path, capsys: pytest.CaptureFixture[str]):
    own = ["--divergence", "toy:far"]
    main([*RUN, *own])

    code = main(["verify", "out", *MODEL, *own, "--steps", "20", "--no-progress", "--json"])

    assert code in (0, 1)
    assert '"divergence": "far"' in capsys.readouterr().out


def test_the_weights_of_the_file_are_those_that_are_decomposed(here: Path):
    from weightdecomp._loading import loaded_model

    model = loaded_model("toy:model", "toy.safetensors")

    given = safetensors.torch.load_file("toy.safetensors")
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_a_file_may_hold_a_tied_weight_once(here: Path):
    from weightdecomp._loading import loaded_model

    with pytest.raises(ValueError, match=r"missing: 0.bias, 2.bias\)"):
        loaded_model("toy:tied", "tied.safetensors")


def test_tied_weights_that_differ_in_the_file_are_refused(here: Path):
    from weightdecomp._loading import loaded_model

    own = loaded_model("toy:tied").state_dict()
    first, last = [name for name in own if name.endswith("weight")]
    safetensors.torch.save_file(
        {**{name: x.clone() for name, x in own.items()}, last: own[last] + 1}, "untied.safetensors"
    )

    with pytest.raises(ValueError, match=f"one parameter of the model, but not the same: {first} and {last}"):
        loaded_model("toy:tied", "untied.safetensors")


def test_quantised_weights_are_not_taken_for_numbers(here: Path):
    from weightdecomp._loading import loaded_model

    whole = {name: x.to(torch.int8) for name, x in loaded_model("toy:model").state_dict().items()}
    safetensors.torch.save_file(whole, "whole.safetensors")

    with pytest.raises(ValueError, match="of another type: 0.weight is torch.int8, expected floating point"):
        loaded_model("toy:model", "whole.safetensors")


MISTAKES = {
    "missing module": (["--model", "tow:model"], "there is no module 'tow'"),
    "missing function": (["--model", "toy:modle"], "did you mean one of ['model'"),
    "no colon": (["--model", "toy.model"], "must look like package.module:name"),
    "factory not callable": (["--model", "toy:number"], "'toy:number' is of type int, expected a function"),
    "factory that fails": (["--model", "toy:broken"], "RuntimeError: no such checkpoint"),
    "factory without a model": (["--model", "toy:nothing"], "returned None, expected a torch.nn.Module"),
    "data that is none": (["--data", "toy:nothing"], "returned None, expected an iterable of batches"),
    "data without batches": (["--data", "toy:none"], "batches is empty; pass at least one batch"),
    "data without batches, folded": (
        ["--data", "toy:none", "--fold-norms"],
        "batches is empty; pass at least one batch",
    ),
    "data that is one batch": (["--data", "toy:one"], "--data: 'toy:one' returned one batch (of type Tensor)"),
    "data that ends in an error": (
        ["--data", "toy:ends"],
        "reading the batches of 'toy:ends' failed: KeyError: ",
    ),
    "endless data, folded": (
        ["--data", "toy:endless", "--fold-norms"],
        "no layer norm is read by linear modules alone",
    ),
    "pickle as weights": (["--weights", "toy.pt"], "is a pickle that holds more than tensors"),
    "no weights there": (
        ["--weights", "tow.safetensors"],
        "there is no file 'tow.safetensors'; did you mean",
    ),
    "wrong weights": (
        ["--weights", "other.safetensors"],
        "missing: 3.bias; unexpected: 4.bias; of another shape",
    ),
    "pattern without a match": (["--sites", "layers.*"], "no decomposable module at 'layers.*'"),
    "tolerance": (["--tolerance", "2"], "tolerance must be between 0 and 1"),
    "steps": (["--steps", "-1"], "steps must be at least 0"),
    "seed": (["--seed", "-1"], "expected a number from 0 to 2^32 - 1"),
    "seed of a sample": (["--sample-seed", str(10**25)], "--sample-seed: expected a number from 0 to 2^32 - 1"),
    "tolerance in words": (["--tolerance", "little"], "invalid float value"),
    "unknown divergence": (["--divergence", "kld"], "divergence must be 'auto', 'mse', 'kl'"),
    "out is taken": (["--out", "."], "is not empty and holds no decomposition"),
    "out is a file": (["--out", "toy.py"], "it is a file, expected a directory"),
    "out is under a file": (["--out", "toy.py/out"], "cannot save to 'toy.py/out': "),
    "checkpoint is under a file": (["--checkpoint", "toy.py/run"], "cannot save to 'toy.py/run': "),
    "checkpoint is out": (["--checkpoint", "out"], "--checkpoint 'out' lies in --out 'out'; give another folder"),
    "checkpoint lies in out": (["--checkpoint", "out/run"], "--checkpoint 'out/run' lies in --out 'out'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_on_stderr_with_exit_code_two(mistake: str, here: Path, capsys: pytest.CaptureFixture[str]):
    words, message = MISTAKES[mistake]

    try:
        code = main([*RUN, *words])
    except SystemExit as stop:  # argparse's own
        code = stop.code

    said = capsys.readouterr()
    assert code == 2
    assert message in said.err
    assert said.out == ""
    assert not (here / "out").exists()


def test_a_folder_that_is_taken_is_refused_before_the_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("weightdecomp.__main__.decompose", lambda *args, **options: pytest.fail("it ran"))

    code = main([*RUN, "--out", "."])

    assert code == 2
    assert "is not empty and holds no decomposition" in capsys.readouterr().err


def test_a_decomposition_is_not_replaced(
    saved: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("weightdecomp.__main__.decompose", lambda *args, **options: pytest.fail("it ran"))
    before = (saved / "out" / "decomposition.json").read_bytes()

    code = main([*RUN, "--checkpoint", "progress"])

    assert code == 2
    assert capsys.readouterr().err == (
        "weightdecomp: 'out' already holds a decomposition; give another --out, or delete it first\n"
    )
    assert (saved / "out" / "decomposition.json").read_bytes() == before


def test_a_finished_run_can_be_repeated_and_another_is_refused(
    here: Path, quick: None, capsys: pytest.CaptureFixture[str]
):
    resumed = [*RUN, "--checkpoint", "progress"]
    first = main(resumed)
    before = (here / "out" / "decomposition.json").read_bytes()

    again = main(resumed)
    other = main([*resumed, "--seed", "5"])

    assert again == first
    assert other == 2
    assert "holds another run: seed differ" in capsys.readouterr().err
    assert json.loads((here / "out" / "decomposition.json").read_bytes())["tensors"] == json.loads(before)["tensors"]


@pytest.mark.parametrize("mistake", ["missing module", "pickle as weights", "pattern without a match"])
def test_a_mistake_shows_no_traceback(mistake: str, folder: Path):
    words, message = MISTAKES[mistake]

    done = command(folder, *RUN, *words)

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", *MODEL], "there is no directory 'nowhere'"),
        (["out", *MODEL, "--divergence", "mse"], "--divergence of verify is a function"),
        (["out", *MODEL, "--steps", "0"], "steps must be at least 1"),
        (["out", "--model", "toy:model", "--data", "toy:batches"], "another model"),
    ],
)
def test_a_mistake_in_verify_is_named(
    words: list[str], message: str, saved: Path, here: Path, capsys: pytest.CaptureFixture[str]
):
    code = main(["verify", *words, "--no-progress"])

    assert code == 2
    assert message in capsys.readouterr().err


def test_a_graph_of_no_data_is_refused(saved: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    code = main(["graph", "out", *MODEL, "--data", "toy:none", "--out", "graph.json", "--no-progress"])

    assert code == 2
    assert "batches is empty" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_resume(folder: Path):
    line = [sys.executable, "-m", "weightdecomp", *RUN, "--steps", "100000", "--checkpoint", "progress"]
    process = subprocess.Popen(line, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "progress" / "checkpoint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)

    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "repeat the same call to resume" in said
    assert "Traceback" not in said


def test_the_demo_writes_a_report_and_the_decomposition(
    here: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    few = {split: [digits.batches(split)[0][:64]] for split in ("train", "test")}
    classes = digits.labels("test")[:64]
    monkeypatch.setattr("weightdecomp.digits.batches", few.get)
    monkeypatch.setattr("weightdecomp.digits.labels", lambda split: classes)
    monkeypatch.setattr("weightdecomp.__main__._ATTACK", 20)
    monkeypatch.setattr("weightdecomp.__main__._rivals", lambda: ["pca"])

    code = main(["demo", "--steps", "0", "--tolerance", "0.3", "--json", "--no-progress"])

    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert document["verification"]["n_inputs"] == 64
    assert [row["method"] for row in document["comparison"]["rows"]] == ["weight decomposition", "pca"]
    found = sorted(path.name for path in (here / "demo").iterdir())
    assert found == [
        "circuit.graphml",
        "circuit.html",
        "comparison.svg",
        "decomposition",
        "report.html",
        "report.md",
    ]


@pytest.mark.slow
def test_the_whole_demo_ends_within_three_minutes(tmp_path: Path):
    done = command(tmp_path, "demo", "--no-progress")

    assert done.returncode == 0, done.stderr
    assert "Report with pictures: demo/report.html" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime < 180


def test_the_demo_leaves_a_folder_of_others_alone(here: Path, capsys: pytest.CaptureFixture[str]):
    code = main(["demo", "--out", "."])

    assert code == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_demo_names_the_extra_that_is_missing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    code = main(["demo"])

    assert code == 2
    assert "pip install 'weightdecomp[demo]'" in capsys.readouterr().err
