"""Modules: communities of a graph, how stable they are, and how much of them shuffled weights would show."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import comb
from statistics import mean, stdev
from typing import Any, NamedTuple

import networkx as nx
import numpy as np

from graphs._influence import edge_shares, influences

_LEFT_OUT = ("remainder", "bias")  # hubs that belong to no module
_ASSIGNED = 1.0  # resolution whose communities nodes are labelled with, if it is among those asked for


def modules(
    graph: nx.DiGraph,
    *,
    resolutions: Sequence[float] = (0.5, 1.0, 2.0),
    seeds: int = 10,
    nulls: int = 10,
    seed: int = 0,
) -> nx.DiGraph:
    """Communities on |weight| by Louvain's method, with what makes them believable.

    Args:
        graph: A circuit graph; remainders and biases are left out, edges count both ways.
        resolutions: Larger ones give smaller communities.
        seeds: Runs at each resolution; the one with the largest modularity counts.
        nulls: Graphs whose weights are shuffled among the edges between the same two layers.
        seed: Of all draws.

    Returns:
        A copy with `module` on nodes, and the graph attribute `modules`: for every resolution the number of
        communities, modularity Q, stability (mean adjusted Rand index over pairs of seeds), and Q of the nulls.

    Raises:
        ValueError: For no resolutions or seeds.

    Source:
        Blondel et al. 2008 (networkx's implementation); Hubert and Arabie 1985; the layered null is ours.
    """
    if not resolutions or min(resolutions) <= 0:
        raise ValueError(f"resolutions must be one positive number or more, got {list(resolutions)}")
    if seeds < 1 or nulls < 0:
        raise ValueError(f"modules needs at least one seed and no fewer than 0 nulls, got {seeds} and {nulls}")
    found = nx.DiGraph(graph)
    found.graph = dict(graph.graph)
    plain = undirected(graph)
    table, chosen = [], {}
    for resolution in resolutions:
        runs = [_communities(plain, resolution, seed + i) for i in range(seeds)]
        scores = [_q(plain, run, resolution) for run in runs]
        best = runs[int(np.argmax(scores))]
        chosen[resolution] = best
        random = [_null_q(graph, resolution, seed + i) for i in range(nulls)]
        pairs = [rand_index(a, b, list(plain)) for a, b in combinations(runs, 2)]
        row = {"resolution": resolution, "modules": len(best), "q": max(scores), "q_mean": mean(scores)}
        row |= {"stability": mean(pairs) if pairs else 1.0, "seeds": seeds, "nulls": nulls}
        if random:
            row |= {"q_null": mean(random), "q_null_std": stdev(random) if nulls > 1 else 0.0}
        table.append(row)
    label = _ASSIGNED if _ASSIGNED in chosen else resolutions[0]
    for number, members in enumerate(sorted(chosen[label], key=lambda one: -len(one))):
        for node in members:
            found.nodes[node]["module"] = number
    found.graph["modules"] = {"by": "|weight|, Louvain", "resolution": label, "seed": seed, "table": table}
    return found


def undirected(graph: nx.DiGraph) -> nx.Graph:
    """|weight| between nodes, both directions added up."""
    plain = nx.Graph()
    # Louvain's result depends on the order of nodes as well as on its seed.
    kept = sorted(node for node, data in graph.nodes(data=True) if data.get("kind") not in _LEFT_OUT)
    plain.add_nodes_from(kept)
    for source, target, weight in graph.edges(data="weight", default=1.0):
        if source in plain and target in plain and weight:
            before = plain.edges[source, target]["weight"] if plain.has_edge(source, target) else 0.0
            plain.add_edge(source, target, weight=before + abs(weight))
    return plain


def _communities(plain: nx.Graph, resolution: float, seed: int) -> list[set[str]]:
    return list(nx.community.louvain_communities(plain, weight="weight", resolution=resolution, seed=seed))


def _q(plain: nx.Graph, communities: list[set[str]], resolution: float) -> float:
    if not plain.size(weight="weight"):
        return 0.0
    return float(nx.community.modularity(plain, communities, weight="weight", resolution=resolution))


def _null_q(graph: nx.DiGraph, resolution: float, seed: int) -> float:
    plain = undirected(shuffled(graph, seed))
    return _q(plain, _communities(plain, resolution, seed), resolution)


def shuffled(graph: nx.DiGraph, seed: int) -> nx.DiGraph:
    """The same edges with weights shuffled among those that join the same two layers."""
    rng = np.random.default_rng(seed)
    groups: dict[Any, list[tuple[str, str]]] = {}
    for source, target in graph.edges:
        groups.setdefault(tuple(graph.nodes[end].get("layer") for end in (source, target)), []).append((source, target))
    found = nx.DiGraph()
    found.add_nodes_from(graph.nodes(data=True))
    for edges in groups.values():
        weights = [graph.edges[edge].get("weight", 1.0) for edge in edges]
        for edge, i in zip(edges, rng.permutation(len(edges)), strict=True):
            found.add_edge(*edge, weight=weights[i])
    return found


def rand_index(one: list[set[str]], other: list[set[str]], nodes: Sequence[str]) -> float:
    """Adjusted Rand index of two partitions: 1 the same, 0 as chance would have it."""
    a = {node: i for i, members in enumerate(one) for node in members}
    b = {node: i for i, members in enumerate(other) for node in members}
    both = sum(comb(n, 2) for n in Counter((a[node], b[node]) for node in nodes).values())
    first, second = (sum(comb(len(members), 2) for members in part) for part in (one, other))
    expected = first * second / max(comb(len(nodes), 2), 1)
    most = (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


class Complexity(NamedTuple):
    """How few edges, and how separate the modules.

    Attributes:
        edges_90: Fewest edges that carry 90 % of the influence on outputs that all edges carry.
        edges_99: The same for 99 %.
        q: Modularity at resolution 1.
        q_null: Mean modularity with weights shuffled between layers.
        q_excess: Their difference.
    """

    edges_90: int
    edges_99: int
    q: float
    q_null: float
    q_excess: float


def complexity(graph: nx.DiGraph, *, seeds: int = 10, seed: int = 0) -> Complexity:
    """Measure a graph: the fewest edges and the most separate modules are best.

    Args:
        graph: A circuit graph with all its edges (`edges=None`).
        seeds: Of communities and nulls.
        seed: The first of them.

    Raises:
        ValueError: For a graph with a cycle or without outputs.
    """
    flow = influences(graph)
    carried = np.sort([share * flow[target] for (_, target), share in edge_shares(graph).items()])[::-1]
    total = carried.cumsum()
    row = modules(graph, resolutions=[1.0], seeds=seeds, nulls=seeds, seed=seed).graph["modules"]["table"][0]
    return Complexity(_reaching(total, 0.9), _reaching(total, 0.99), row["q"], row["q_null"], row["q"] - row["q_null"])


def _reaching(total: np.ndarray, share: float) -> int:
    """How many of the largest, by their running sum, have a share of the whole."""
    if not len(total):
        return 0
    # Rounding of the running sum shall not cost an edge.
    return int(np.searchsorted(total, share * total[-1] * (1 - 1e-12))) + 1
