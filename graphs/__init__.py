"""Circuits as networkx graphs: built from a decomposition, measured on its model, exported and looked at."""

from graphs._aggregate import aggregate
from graphs._build import circuit_graph
from graphs._files import read, validate, write
from graphs._sanitise import sanitise

__all__ = ["aggregate", "circuit_graph", "read", "sanitise", "validate", "write"]
