"""The examples of bilinear layers, in the README and on their page, run as they are printed, one after the other."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def ran(text: str) -> dict:
    """Names after all examples of a text."""
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        for code in blocks:
            assert len([line for line in code.splitlines() if line.strip()]) <= 6
            exec(code, names)
    return names


def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]):
    section = (ROOT / "README.md").read_text().split("## Bilinear layers")[1].split("\n## ")[0]

    names = ran(section)

    assert torch.allclose(names["layer"](names["x"]), names["module"](names["x"]), atol=1e-5)
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]):
    names = ran((ROOT / "docs" / "bilinear.md").read_text())

    x = names["x"]
    assert torch.allclose(names["layer"](x), names["module"](x), atol=1e-5)
    assert (names["lower"] <= names["layer"](x)).all() and (names["layer"](x) <= names["upper"]).all()
    assert torch.isfinite(names["changed"](x)).all()
    assert {site.path for site in names["decomposition"].sites} == {"0.read", "0.write"}
    assert "explains" in capsys.readouterr().out
