"""Diff: what changed between two graphs, as a graph that can be written and looked at like any other."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import networkx as nx
import torch
from scipy.optimize import linear_sum_assignment

from graphs._build import SCHEMA_VERSION
from graphs._select import check_same
from weightdecomp import Decomposition
from weightdecomp.engine import Pieces, package_version

_KEPT = ("kind", "site", "index", "call", "position", "layer", "order", "title", "circuit", "reads", "writes")


def diff(
    before: nx.DiGraph, after: nx.DiGraph, *, matching: Mapping[str, str] | None = None, tolerance: float = 0.1
) -> nx.DiGraph:
    """Compare two graphs: of two inputs, two checkpoints, or before and after an edit.

    Args:
        before: A circuit graph.
        after: Another one.
        matching: Node ids of `before` with those of `after`; None matches equal ids, which needs graphs of one
            decomposition. For two decompositions see `match`.
        tolerance: A weight or activation has changed if it did so by more than this share of the larger one.

    Returns:
        All nodes and edges of both, with `status` ("added", "removed", "changed" or "same"), `before`, `after` (edge
        weights, node activations; left out where there is none) and `weight`, the change. Ids are those of `before`;
        nodes that only `after` has keep theirs, with a ' (after)' where it is taken.

    Raises:
        ValueError: For graphs of two decompositions without a matching, or a matching of unknown nodes.
    """
    if matching is None:
        one, other = (graph.graph.get("decomposition") for graph in (before, after))
        if one != other:
            raise ValueError(
                f"the graphs are of two decompositions ({str(one)[:12]}... and {str(other)[:12]}...), whose ids mean "
                "different components; pass matching=match(before, after, decomposition, other_decomposition)"
            )
        matching = {node: node for node in before if node in after}
    for node, partner in matching.items():
        if node not in before or partner not in after:
            missing = node if node not in before else partner
            raise ValueError(f"matching names {missing!r}, which is no node of its graph")
    names = {partner: node for node, partner in matching.items()}
    for node in after:
        if node not in names:
            names[node] = f"{node} (after)" if node in before else node
    found = nx.DiGraph()
    for graph in (before, after):
        for node, data in graph.nodes(data=True):
            own = node if graph is before else names[node]
            if own not in found:
                found.add_node(own, **{name: data[name] for name in _KEPT if name in data})
    _compare(found.nodes, dict(before.nodes), {names[n]: d for n, d in after.nodes(data=True)}, "activation", tolerance)
    old = dict(before.edges)
    new = {(names[source], names[target]): data for source, target, data in after.edges(data=True)}
    found.add_edges_from([*old, *new])
    _compare(found.edges, old, new, "weight", tolerance)
    _finish(found, before, after)
    return found


def _compare(view: Any, old: Mapping, new: Mapping, name: str, tolerance: float) -> None:
    """Set status and values of nodes or edges."""
    for key in view:
        data, values = view[key], {}
        for when, side in (("before", old), ("after", new)):
            if key in side:
                values[when] = float(side[key].get(name, 0.0))
        data |= values
        a, b = values.get("before"), values.get("after")
        if a is None or b is None:
            data["status"] = "added" if a is None else "removed"
        else:
            data["status"] = "changed" if abs(b - a) > tolerance * max(abs(a), abs(b)) else "same"
        data[name] = (b or 0.0) - (a or 0.0)


def _finish(found: nx.DiGraph, before: nx.DiGraph, after: nx.DiGraph) -> None:
    """Shares of change, and the graph's own attributes."""
    for node in found:
        total = sum(abs(weight) for _, _, weight in found.in_edges(node, data="weight"))
        for _, _, data in found.in_edges(node, data=True):
            data["share"] = abs(data["weight"]) / total if total else 0.0
    counts = {
        what: dict(Counter(status for *_, status in items))
        for what, items in (("nodes", found.nodes(data="status")), ("edges", found.edges(data="status")))
    }
    found.graph = {
        "schema": "weightdecomp.diff",
        "schema_version": SCHEMA_VERSION,
        "package_version": package_version(),
        "decomposition": before.graph.get("decomposition", ""),
        "before": _origin(before),
        "after": _origin(after),
        "changes": counts,
    }


def _origin(graph: nx.DiGraph) -> dict[str, Any]:
    return {name: graph.graph[name] for name in ("model", "decomposition", "inputs") if name in graph.graph}


def match(
    before: nx.DiGraph,
    after: nx.DiGraph,
    decomposition: Decomposition,
    other: Decomposition,
    *,
    similarity: float = 0.5,
) -> dict[str, str]:
    """Pair the nodes of graphs of two decompositions: components by their weights, all else by id.

    Args:
        before: A graph of `decomposition`.
        after: A graph of `other`.
        decomposition: Of the one checkpoint.
        other: Of the other checkpoint; sites of the same paths and shapes are compared.
        similarity: Least |cosine| of two components' weights that makes a pair.

    Returns:
        Node ids of `before` with those of `after`; every node at most once (Hungarian method, per site).

    Raises:
        ValueError: For graphs of other decompositions than those.
    """
    check_same(before, decomposition)
    check_same(after, other)
    pairs: dict[tuple[str, int], int] = {}
    for path, parts in decomposition.parts.items():
        if path in other.parts and other.site(path).shape == decomposition.site(path).shape:
            cosine = cosines(parts.pieces, other.parts[path].pieces).abs()
            rows, columns = linear_sum_assignment(-cosine.cpu().numpy())
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                if cosine[row, column] >= similarity:
                    pairs[path, row] = column
    place = {_place(data, data.get("index")): node for node, data in after.nodes(data=True)}
    found = {}
    for node, data in before.nodes(data=True):
        index = data.get("index")
        if data.get("kind") == "component":
            index = pairs.get((data["site"], data["index"]))
            if index is None:
                continue
        partner = place.get(_place(data, index))
        if partner is not None:
            found[node] = partner
    return found


def _place(data: Mapping[str, Any], index: int | None) -> tuple:
    return data.get("kind"), data.get("site"), index, data.get("call"), data.get("position")


def cosines(one: Pieces, other: Pieces) -> torch.Tensor:
    """Cosine of every pair of components' weights, from their factors."""

    def products(a: Pieces, b: Pieces) -> torch.Tensor:
        by_piece = ((a.u @ b.u.T) * (a.v @ b.v.T)).double()
        rows = by_piece.new_zeros(a.n, by_piece.shape[1]).index_add_(0, a.owner, by_piece)
        return by_piece.new_zeros(a.n, b.n).index_add_(1, b.owner, rows)

    norms = [products(x, x).diagonal().clamp_min(1e-300).sqrt() for x in (one, other)]
    return products(one, other) / norms[0][:, None] / norms[1]
