"""`python -m weightdecomp graph`: one call of the API, files written, mistakes named."""

import json
from pathlib import Path

import pytest

import graphs
from tests.graph_models import decomposed_exactly, relu_batches, relu_net
from weightdecomp.__main__ import main

MODEL = ["--model", "tests.graph_models:relu_net", "--data", "tests.graph_models:relu_batches"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    batch = relu_batches()[0]
    decomposed_exactly(relu_net(), batch, closed=0.3).save(tmp_path / "run")
    return tmp_path / "run"


def test_graph_writes_every_file_and_says_what_is_in_it(saved: Path, capsys: pytest.CaptureFixture[str]):
    out = [saved.parent / name for name in ("circuit.html", "circuit.json", "circuit.ct.json")]
    words = [word for path in out for word in ("--out", str(path))]

    code = main(["graph", str(saved), *MODEL, *words, "--influence", "0.9", "--score", "--json", "--no-progress"])

    document = json.loads(capsys.readouterr().out)
    graph = graphs.read(out[1])
    assert code == 0
    assert document["nodes"] == len(graph)
    assert {one["regime"] for one in graph.graph["scores"]} >= {"zero", "adversarial"}
    assert graph.graph["inputs"]["n"] == 12
    assert all(path.exists() for path in out)


def test_graph_of_one_input_prints_a_summary(saved: Path, capsys: pytest.CaptureFixture[str]):
    out = saved.parent / "one.graphml"

    code = main(["graph", str(saved), *MODEL, "--out", str(out), "--input", "9", "--outputs", "1"])

    said = capsys.readouterr().out
    assert code == 0
    assert "Circuit on one input" in said
    assert f"written      {out}" in said
    assert [node for node, kind in graphs.read(out).nodes(data="kind") if kind == "output"] == ["output/1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "12"], "there is no input 12; the data has 12, numbered 0 to 11"),
        (["--outputs", "7"], "outputs: 7 is out of range; the model has 3"),
        (["--effects", "magic"], "effects must be one of"),
        (["--edges", "3", "--influence", "0.5"], "exactly one of influence, edges and damage"),
        (["--out", "x.png"], "no suffix that names a format"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, saved: Path, capsys: pytest.CaptureFixture[str]):
    given = words if "--out" in words else [*words, "--out", str(saved.parent / "x.json")]

    code = main(["graph", str(saved), *MODEL, *given])

    assert code == 2
    assert message in capsys.readouterr().err
    assert not (saved.parent / "x.json").exists()
