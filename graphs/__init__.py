"""Networkx graphs of decompositions: not written yet, so this package offers nothing."""

__all__: list[str] = []
