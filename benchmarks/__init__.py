"""Targets with known mechanisms, scores of a decomposition of them, and timings; nothing imports this."""
