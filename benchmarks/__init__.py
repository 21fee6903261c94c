"""Targets with known mechanisms, the scores that judge a decomposition of them, and timings; nothing imports this."""
