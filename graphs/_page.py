"""Stub."""


def page(graph):
    """Stub."""
    return "<html></html>"
