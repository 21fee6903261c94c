"""The README's examples of bilinear layers run as they are printed, one after the other."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_of_bilinear_layers_run(capsys: pytest.CaptureFixture[str]):
    section = README.read_text().split("## Bilinear layers")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict = {}

    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        for code in blocks:
            assert len([line for line in code.splitlines() if line.strip()]) <= 6
            exec(code, names)

    x = names["x"]
    assert torch.allclose(names["layer"](x), names["module"](x), atol=1e-5)
    assert (names["lower"] <= names["layer"](x)).all() and (names["layer"](x) <= names["upper"]).all()
    assert torch.isfinite(names["changed"](x)).all()
    assert {site.path for site in names["decomposition"].sites} == {"0.read", "0.write"}
    assert "explains" in capsys.readouterr().out
