"""Influence: how much of the output's weight flows through every node and edge; needs no run of the model."""

from collections.abc import Mapping
from typing import Any

import networkx as nx
import numpy as np
from scipy import sparse
from scipy.sparse.linalg import spsolve_triangular


def topological(graph: nx.DiGraph) -> list[str]:
    """Nodes, every source before its targets.

    Raises:
        ValueError: If there is a cycle, naming the edge that closes it.
        TypeError: For an undirected graph.
    """
    if not graph.is_directed():
        raise TypeError(f"expected a networkx.DiGraph, got {type(graph).__name__}; a circuit's edges have a direction")
    try:
        return list(nx.topological_sort(graph))
    except nx.NetworkXUnfeasible:
        pass
    cycle = nx.find_cycle(graph)
    source, target = cycle[-1][:2]
    raise ValueError(
        f"the graph has a cycle of {len(cycle)} edges, closed by the edge {source!r} -> {target!r}; "
        "influence and pruning need a graph without cycles: remove that edge"
    )


def output_weights(graph: nx.DiGraph) -> dict[str, float]:
    """How much every output node counts; they sum to 1."""
    outputs: dict[str, dict[str, Any]]
    outputs = {node: data for node, data in graph.nodes(data=True) if data.get("kind") == "output"}
    if not outputs:
        raise ValueError("the graph has no node of kind 'output', from which influence would start")
    sizes = {node: abs(float(data.get("importance", data.get("activation", 1.0)))) for node, data in outputs.items()}
    total = sum(sizes.values())
    return {node: size / total if total else 1 / len(sizes) for node, size in sizes.items()}


def influences(graph: nx.DiGraph) -> dict[str, float]:
    """Influence of every node: the outputs' weights, passed backwards along shares of incoming edges.

    I = p + A^T I with A[t, s] the share of source s in the incoming |weight| of target t and p the outputs' weights,
    solved as one triangular system in topological order.

    Raises:
        ValueError: For a cycle, or a graph without outputs.

    Source:
        circuit-tracer (Ameisen et al. 2025) sums the same series by iteration; the triangular solve is ours.
    """
    order = topological(graph)
    place = {node: i for i, node in enumerate(order)}
    start = np.zeros(len(order))
    for node, weight in output_weights(graph).items():
        start[place[node]] = weight
    shares = edge_shares(graph)
    rows = [place[source] for source, _ in shares]
    columns = [place[target] for _, target in shares]
    matrix = sparse.coo_array((-np.array(list(shares.values()), dtype=float), (rows, columns)), (len(order),) * 2)
    system = (sparse.eye_array(len(order)) + matrix).tocsr()
    found = spsolve_triangular(system, start, lower=False)
    return dict(zip(order, found.tolist(), strict=True))


def edge_shares(graph: nx.DiGraph) -> dict[tuple[str, str], float]:
    """Share of every edge in what enters its target; of |weight| where an edge carries no share."""
    totals: dict[str, float] = {}
    for _, target, data in graph.edges(data=True):
        totals[target] = totals.get(target, 0.0) + abs(data.get("weight", 1.0))
    return {
        (source, target): float(data["share"])
        if "share" in data
        else abs(data.get("weight", 1.0)) / (totals[target] or 1.0)
        for source, target, data in graph.edges(data=True)
    }


def add_influence(graph: nx.DiGraph, sizes: Mapping[str, float]) -> None:
    """Set every output's importance, its share of the sizes of all, and every node's influence."""
    total = sum(sizes.values())
    for node, size in sizes.items():
        graph.nodes[node]["importance"] = size / total if total else 1 / len(sizes)
    graph.graph["outputs"] = {**graph.graph["outputs"], "size": total}
    for node, influence in influences(graph).items():
        graph.nodes[node]["influence"] = influence
