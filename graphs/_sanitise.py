"""Sanitise: the one step before all writers, after which every format can hold the graph exactly.

- Node ids and attribute names are strings; control characters become the pictures that Unicode has for them, and
  characters that XML cannot hold become U+FFFD.
- Attributes are bool, int, float or str; NumPy and torch scalars become those, `None` and "" are left out, lists,
  dicts and arrays become JSON text under `<name>_json`.
- One attribute has one type on all nodes, and one on all edges; where integers meet floats all are floats.
- Names with a meaning of their own in some format get a trailing underscore.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import networkx as nx
import numpy as np
from torch import Tensor

_OF_GEXF = {"id", "label", "pid", "viz", "start", "end", "parents", "slices", "spells", "type", "networkx_key", "mode"}
_OF_CYTOSCAPE = {"id", "name", "value", "source", "target", "key"}
_OF_DOT = {"label", "style", "penwidth"}
RESERVED = _OF_GEXF | _OF_CYTOSCAPE | _OF_DOT | {"node_default", "edge_default"}
_PICTURES = {i: 0x2400 + i for i in range(32)} | {127: 0x2421}
_OUTSIDE_XML = {i: 0xFFFD for i in (*range(0xD800, 0xE000), 0xFFFE, 0xFFFF)}
_TABLE = _PICTURES | _OUTSIDE_XML


def sanitise(graph: nx.Graph, *, nonfinite: str = "error") -> nx.DiGraph:
    """A copy of a graph that every format can hold; a sanitised graph stays as it is.

    Args:
        graph: Any directed graph with at most one edge from a node to another.
        nonfinite: "error" refuses NaN and infinity; "omit" leaves such attributes out, and counts them in the
            graph's attribute `omitted`.

    Raises:
        TypeError: For other graphs, or an attribute that has no plain form.
        ValueError: For two ids that become one, an attribute of mixed types, or NaN and infinity; names the node.
    """
    if nonfinite not in ("error", "omit"):
        raise ValueError(f"nonfinite must be 'error' or 'omit', got {nonfinite!r}")
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise TypeError(f"expected a networkx.DiGraph, got {type(graph).__name__}; convert it with networkx.DiGraph()")
    clean = _Cleaner(nonfinite == "omit")
    ids = _ids(graph)
    found = nx.DiGraph()
    nodes = [(ids[node], clean.attributes(data, (node,))) for node, data in graph.nodes(data=True)]
    edges = [
        (ids[source], ids[target], clean.attributes(data, (source, target)))
        for source, target, data in graph.edges(data=True)
    ]
    _unify([data for _, data in nodes], [(node,) for node in graph])
    # GEXF has one type for an edge's weight.
    _unify([data for *_, data in edges], list(graph.edges), "weight")
    found.add_nodes_from(nodes)
    found.add_edges_from(edges)
    found.graph.update({_name(key): clean.json(value, (), key) for key, value in graph.graph.items()})
    if clean.omitted:
        found.graph["omitted"] = clean.omitted + found.graph.get("omitted", 0)
    return found


def text(value: str) -> str:
    """A string without characters that some format cannot hold."""
    # Most strings have none, and are themselves then.
    return value if value.isascii() and value.isprintable() else value.translate(_TABLE)


def _ids(graph: nx.DiGraph) -> dict[Any, str]:
    ids, before = {}, {}
    for node in graph:
        one = text(str(node))
        if not one:
            raise ValueError("a node has an empty id; give it a name")
        if one in before:
            raise ValueError(f"nodes {before[one]!r} and {node!r} have the same id {one!r} in a file; rename one")
        ids[node], before[one] = one, node
    return ids


# Typed, as 1 and True are names of their own.
@lru_cache(maxsize=1024, typed=True)
def _name(name: object) -> str:
    """What an attribute is called in a file."""
    found = text(str(name))
    if not found:
        raise ValueError("an attribute has an empty name; give it a name")
    return f"{found}_" if found in RESERVED else found


Place = tuple[Any, ...]  # a node, the ends of an edge, or nothing for the graph itself


def _said(place: Place) -> str:
    """A place in words; made only where there is a mistake."""
    return ("the graph", "node {!r}", "edge {!r} -> {!r}")[len(place)].format(*place)


class _Cleaner:
    """Makes plain values, and counts what it leaves out."""

    def __init__(self, omit: bool) -> None:
        self.omit, self.omitted = omit, 0

    def attributes(self, data: Mapping[Any, Any], place: Place) -> dict[str, Any]:
        """Plain attributes of one node or edge."""
        found: dict[str, Any] = {}
        for key, value in data.items():
            # Most values are plain numbers.
            is_plain = type(value) is int or (type(value) is float and math.isfinite(value))
            name, plain = _name(key), value if is_plain else self.json(value, place, key)
            if plain is None or plain == "":
                continue
            if isinstance(plain, list | dict):
                name, plain = f"{name}_json", json.dumps(plain)
            if name in found:
                raise ValueError(f"two attributes of {_said(place)} are called {name!r} in a file; rename one")
            found[name] = plain
        return found

    def json(self, value: Any, place: Place, key: object) -> Any:
        """A value of JSON; None stands for nothing."""
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.item() if not value.ndim else value.tolist()
        elif isinstance(value, np.ndarray | np.generic):
            value = value.item() if not value.ndim else value.tolist()
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return self._finite(float(value), place, key)
        if isinstance(value, str):
            return text(str(value))
        if isinstance(value, Mapping):
            return {text(str(name)): self.json(one, place, key) for name, one in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            every = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            return [self.json(one, place, key) for one in every]
        kind = type(value).__name__
        raise TypeError(
            f"{key!r} of {_said(place)} is a {kind}, which files cannot hold; use numbers, strings, lists or dicts"
        )

    def _finite(self, value: float, place: Place, key: object) -> float | None:
        if math.isfinite(value):
            return value
        if not self.omit:
            where = f"{key!r} of {_said(place)}"
            raise ValueError(f"{where} is {value}; repair it, or leave such attributes out with nonfinite='omit'")
        self.omitted += 1
        return None


def _unify(every: Sequence[dict[str, Any]], places: Sequence[Place], real: str = "") -> None:
    """One type for each attribute name; that of `real` is float."""
    types: dict[str, dict[type, int]] = {}
    for i, data in enumerate(every):
        for name, value in data.items():
            types.setdefault(name, {}).setdefault(type(value), i)
    for name, found in types.items():
        if found.keys() == {int, float} or (name == real and found.keys() == {int}):
            _to_float(every, name, places)
        elif len(found) > 1 or (name == real and found.keys() != {float}):
            kinds = ", ".join(f"{kind.__name__} on {_said(places[i])}" for kind, i in found.items())
            raise ValueError(f"attribute {name!r} must have one type{' of number' * (name == real)}, got {kinds}")


def _to_float(every: Sequence[dict[str, Any]], name: str, places: Sequence[Place]) -> None:
    for data, place in zip(every, places, strict=True):
        if name in data:
            try:
                data[name] = float(data[name])
            except OverflowError as error:
                raise ValueError(f"{name!r} of {_said(place)} is too large for a float") from error
