"""Closed-form decompositions of bilinear layers: not written yet, so this package offers nothing."""

__all__: list[str] = []
