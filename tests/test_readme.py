"""The README's example runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}

    exec(code, names)

    assert names["logits"].shape == (144, 10)
    assert torch.isfinite(names["logits"]).all()
    assert (tmp_path / "decomposition" / "decomposition.json").exists()

    comparison = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    exec(comparison, names)

    assert [row.method for row in names["comparison"].rows][1:] == ["neurons", "pca", "nmf", "svd", "sae topk"]


@pytest.mark.slow
def test_the_example_of_graphs_runs_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, graph = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[:2]
    monkeypatch.chdir(tmp_path)
    names: dict = {}

    exec(first, names)
    exec(graph, names)

    assert {"circuit.html", "circuit.graphml", "diff.html"} <= {path.name for path in tmp_path.iterdir()}
    assert len(names["small"]) < len(names["graph"])


def test_every_file_that_it_links_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
