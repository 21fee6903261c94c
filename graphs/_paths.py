"""Paths: the ways through a graph that carry most of the outputs."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import networkx as nx

from graphs._influence import edge_shares, output_weights, topological
from graphs._select import known


class Path(NamedTuple):
    """One way from an input to an output.

    Attributes:
        nodes: From the input to the output.
        share: Share of all ways to the outputs: the product of the edges' shares and the output's weight. Over all
            ways from all ends these sum to 1, where no edge is hidden.
        effect: Signed change of the output along this way alone: weights, each as a share of the activation that it
            leads to. On linear models the effects of all ways add up to the output.
    """

    nodes: tuple[str, ...]
    share: float
    effect: float


def paths(
    graph: nx.DiGraph, k: int = 10, *, sources: Sequence[str] | None = None, targets: Sequence[str] | None = None
) -> list[Path]:
    """The k ways with the largest share, exactly, largest first.

    Args:
        graph: A circuit graph.
        k: How many.
        sources: Where they begin; None takes all inputs.
        targets: Where they end; None takes all outputs.

    Raises:
        ValueError: For a graph with a cycle, unknown nodes, or a k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    kinds = graph.nodes(data="kind")
    begin = {node for node, kind in kinds if kind == "input"} if sources is None else set(known(graph, sources))
    weights = output_weights(graph)
    end = set(weights) if targets is None else set(known(graph, targets))
    shares = edge_shares(graph)
    # The k best ways to a node extend the k best ways to its sources, since all shares are at most 1.
    best: dict[str, list[tuple[float, tuple[str, ...]]]] = {}
    for node in topological(graph):
        ways = [(1.0, (node,))] if node in begin else []
        for source in graph.predecessors(node):
            ways += [(share * shares[source, node], (*way, node)) for share, way in best[source]]
        best[node] = heapq.nlargest(k, ways)
    # An end that is no output counts as if it were the only one.
    every = [(share * weights.get(node, 1.0), way) for node in end for share, way in best[node] if len(way) > 1]
    return [Path(way, share, _effect(graph, way)) for share, way in heapq.nlargest(k, every)]


def _effect(graph: nx.DiGraph, way: tuple[str, ...]) -> float:
    effect = 1.0
    for source, target in zip(way, way[1:], strict=False):
        activation = graph.nodes[source].get("activation", 1.0) if source != way[0] else 1.0
        if not activation:
            return 0.0
        effect *= graph.edges[source, target].get("weight", 1.0) / activation
    return effect
