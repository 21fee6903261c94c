"""Circuits as networkx graphs: built from a decomposition, measured on its model, exported and looked at."""

from graphs._aggregate import aggregate
from graphs._build import circuit_graph
from graphs._diff import diff, match
from graphs._edit import Edited, ablate, edit
from graphs._files import check_path, read, validate, write
from graphs._modules import Complexity, complexity, modules
from graphs._paths import Path, paths
from graphs._prune import prune
from graphs._sanitise import sanitise
from graphs._score import score
from graphs._show import show
from graphs._tensor import bilinear_graph

__all__ = [
    "Complexity",
    "Edited",
    "Path",
    "ablate",
    "aggregate",
    "bilinear_graph",
    "check_path",
    "circuit_graph",
    "complexity",
    "diff",
    "edit",
    "match",
    "modules",
    "paths",
    "prune",
    "read",
    "sanitise",
    "score",
    "show",
    "validate",
    "write",
]
