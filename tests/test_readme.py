"""The README's example runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
DOCS = sorted((README.parent / "docs").glob("*.md"))
EXAMPLES = [page for page in DOCS if "```python" in page.read_text()]


def example(heading: str) -> str:
    """The first example below a heading."""
    section = README.read_text().split(heading, 1)[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_examples_of_the_engine_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}

    exec(example("# weightdecomp"), names)

    assert names["logits"].shape == (144, 10)
    assert torch.isfinite(names["logits"]).all()
    assert (tmp_path / "decomposition" / "decomposition.json").exists()

    exec(example("## Editing"), names | {"torch": torch})

    exec(example("## Beside activation-based methods"), names)

    assert [row.method for row in names["comparison"].rows][1:] == ["neurons", "pca", "svd", "sae topk"]

    exec(example("## Circuits as graphs"), names)

    assert (tmp_path / "circuit.html").exists()
    assert len(names["small"]) < len(names["graph"])


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_one_after_the_other(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict = {}

    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_every_file_that_a_page_links_is_there(page: Path):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
