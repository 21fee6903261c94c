import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Which of our packages, and which of others', each may import. `weightdecomp` and `bilinear` are leaves.
OURS = {
    "weightdecomp": set(),
    "bilinear": set(),
    "graphs": {"weightdecomp", "bilinear"},
    "benchmarks": {"weightdecomp", "bilinear", "graphs"},
    "tests": {"weightdecomp", "bilinear", "graphs", "benchmarks"},
}
_ENGINE = {"torch", "numpy", "scipy", "opt_einsum", "safetensors", "jaxtyping", "tqdm"}
OTHERS = {
    "weightdecomp": _ENGINE,
    "bilinear": _ENGINE,
    "graphs": _ENGINE | {"networkx"},
}
# Files that know one package more, inside functions and by its public names alone: the bridge, and the command line.
BRIDGES = {"bilinear/_bridge.py": "weightdecomp", "weightdecomp/__main__.py": "graphs"}
# Of extras: imported inside the function that needs them, so that the package works without.
OPTIONAL = {"sklearn", "matplotlib", "transformers", "sae_lens"}
SEES_PRIVATE_MODULES = {"benchmarks", "tests"}


def imports(tree: ast.AST, *, nested: bool = False) -> list[tuple[str, bool]]:
    """The dotted names that a module imports but for relative ones, and whether inside a function."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, nested) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [(f"{node.module}.{alias.name}", nested) for alias in node.names]
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            found += imports(node, nested=nested or inside)
    return found


def violations(package: str, source: str, file: str = "") -> list[str]:
    """What is wrong with the imports of one file of a package."""
    if package not in OURS:
        return [f"package {package} is not listed"]
    wrong = []
    for name, nested in imports(ast.parse(source)):
        top, *rest = name.split(".")
        if top in OURS.keys() - {package}:
            if top not in OURS[package] and not (nested and top == BRIDGES.get(file)):
                wrong.append(f"{name}: {package} may not import {top}")
            elif package not in SEES_PRIVATE_MODULES and any(part.startswith("_") for part in rest):
                wrong.append(f"{name}: private to {top}")
        elif top in OPTIONAL:
            if package in OTHERS and not nested:
                wrong.append(f"{name}: optional, import it inside the function that needs it")
        elif top not in sys.stdlib_module_names | {package} | OTHERS.get(package, {top}):
            wrong.append(f"{name}: not listed for {package}")
    return wrong


@pytest.mark.parametrize("path", sorted(ROOT.glob("[!.]*/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    package = path.relative_to(ROOT).parts[0]

    assert violations(package, path.read_text(), path.relative_to(ROOT).as_posix()) == []


def test_only_the_bridge_knows_the_engine_and_only_its_public_names():
    late = "def late():\n    import weightdecomp"

    assert violations("bilinear", late, "bilinear/_bridge.py") == []
    assert len(violations("bilinear", late, "bilinear/_eigen.py")) == 1
    assert len(violations("bilinear", "import weightdecomp", "bilinear/_bridge.py")) == 1
    assert len(violations("bilinear", late + "._pieces", "bilinear/_bridge.py")) == 1


@pytest.mark.parametrize(
    ("package", "source", "complaint"),
    [
        ("weightdecomp", "import graphs", "may not import graphs"),
        ("weightdecomp", "from bilinear import Layer", "may not import bilinear"),
        ("weightdecomp", "def late():\n    from graphs import read", "may not import graphs"),
        ("bilinear", "import weightdecomp", "may not import weightdecomp"),
        ("graphs", "from benchmarks.targets import tms", "may not import benchmarks"),
        ("graphs", "from weightdecomp._sites import Site", "private to weightdecomp"),
        ("graphs", "from weightdecomp import _sites", "private to weightdecomp"),
        ("graphs", "import weightdecomp._sites", "private to weightdecomp"),
        ("weightdecomp", "import networkx", "not listed for weightdecomp"),
        ("weightdecomp", "import pandas", "not listed for weightdecomp"),
        ("weightdecomp", "import matplotlib.pyplot", "optional"),
        ("weightdecomp", "class Late:\n    import sklearn", "optional"),
        ("plots", "", "plots is not listed"),
    ],
)
def test_a_forbidden_import_is_refused(package: str, source: str, complaint: str):
    found = violations(package, source)

    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("package", "source"),
    [
        (
            "graphs",
            "import networkx\nfrom weightdecomp import Decomposition\nfrom graphs._edges import edges",
        ),
        ("weightdecomp", "import json\nfrom weightdecomp._sites import Site\nfrom . import _gates"),
        ("weightdecomp", "def late():\n    import sklearn"),
        ("benchmarks", "import sklearn, psutil\nfrom weightdecomp._sites import Site"),
        ("tests", "from weightdecomp._sites import Site\nfrom benchmarks import targets"),
    ],
)
def test_an_allowed_import_is_accepted(package: str, source: str):
    assert violations(package, source) == []
