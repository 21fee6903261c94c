"""Circuits as networkx graphs: built from a decomposition, measured on its model, exported and looked at."""

from graphs._aggregate import aggregate
from graphs._build import circuit_graph

__all__ = ["aggregate", "circuit_graph"]
