"""Prune: the part of a graph that matters, by influence, by a number of edges, or until a measured damage."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import torch

from graphs._influence import edge_shares, influences
from graphs._run import REGIMES, Stage
from graphs._run import damage as damage_of
from graphs._score import check_budget, stage_for
from graphs._select import check_same, masks
from graphs._tally import add_accounts
from weightdecomp import Decomposition
from weightdecomp.engine import Batch, tensors

_ALWAYS = ("input", "output")  # never pruned for lack of influence


def prune(
    graph: nx.DiGraph,
    *,
    influence: float | None = None,
    edge_influence: float = 0.98,
    edges: int | None = None,
    damage: float | None = None,
    regime: str = "stochastic",
    decomposition: Decomposition | None = None,
    inputs: Batch | None = None,
    reference: Batch | None = None,
    steps: int = 40,
    restarts: int = 3,
    seed: int = 0,
) -> nx.DiGraph:
    """Keep the nodes and edges that matter; exactly one of `influence`, `edges` and `damage` says how many.

    Args:
        graph: A circuit graph.
        influence: Keep nodes, most influential first, until they have this share of all nodes' influence; then edges
            until they carry the share `edge_influence` of what flows between them.
        edge_influence: See there.
        edges: Keep this many edges, those that carry most influence of which none dangles; fewer where the next one
            would bring several with it.
        damage: Keep the fewest nodes, most influential first, with which the model's measured damage is at most this.
        regime: How all else is ablated while damage is measured, as in `score`.
        decomposition: For `damage`.
        inputs: For `damage`, one batch.
        reference: For `damage` under "mean" and "resample".
        steps: Of the attack.
        restarts: Of the attack.
        seed: Of draws and the attack.

    Returns:
        A new graph with fewer nodes and edges and their own attributes. The graph attribute `pruning` has the recipe
        appended. Nodes that lead nowhere any more, or that nothing enters any more, are dropped too; inputs and
        outputs stay where an edge does.

    Raises:
        ValueError: For a graph with a cycle (names the closing edge), no or several criteria, or a damage that the
            whole graph exceeds.

    Source:
        Cumulative influence: circuit-tracer (Ameisen et al. 2025). Bisection on the measured damage: after the edge
        bisection of RIB (Bushnaq et al. 2024, arXiv 2405.10928).
    """
    given = [name for name, one in (("influence", influence), ("edges", edges), ("damage", damage)) if one is not None]
    if len(given) != 1:
        raise ValueError(f"prune needs exactly one of influence, edges and damage, got {given or 'none'}")
    flow = influences(graph)
    if edges is not None:
        if edges < 0:
            raise ValueError(f"edges must be at least 0, got {edges}")
        return _with_edges(graph, flow, edges, {"by": "edges", "limit": edges})
    if influence is not None:
        for name, one in (("influence", influence), ("edge_influence", edge_influence)):
            if not 0 <= one <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {one}")
        recipe = {"by": "influence", "influence": influence, "edge_influence": edge_influence}
        return _by_influence(graph, flow, influence, edge_influence, recipe)
    assert damage is not None
    if decomposition is None or inputs is None:
        raise ValueError("pruning until a damage runs the model; pass decomposition= and inputs=")
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}; choose from {list(REGIMES)}")
    check_same(graph, decomposition)
    check_budget(steps, restarts)
    stage, budget = stage_for(decomposition, inputs, reference, [regime]), (steps, restarts)
    recipe = {"by": "damage", "limit": damage, "regime": regime, "seed": seed}
    recipe |= {"steps": steps, "restarts": restarts} if regime == "adversarial" else {}
    return _until(graph, flow, damage, lambda part: _measured(part, stage, regime, budget, seed), recipe)


def _ranked(graph: nx.DiGraph, flow: dict[str, float]) -> list[str]:
    """Nodes that can be pruned, most influential first."""
    able = [node for node, data in graph.nodes(data=True) if data.get("kind") not in _ALWAYS]
    return sorted(able, key=lambda node: -flow[node])


def _by_influence(
    graph: nx.DiGraph, flow: dict[str, float], influence: float, edge_influence: float, recipe: dict[str, Any]
) -> nx.DiGraph:
    ranked = _ranked(graph, flow)
    kept = set(graph) - set(ranked)
    kept |= set(_until_share(ranked, [flow[node] for node in ranked], influence))
    part = nx.DiGraph(graph.subgraph(kept))
    within = influences(part)
    carried = _carried(part, within)
    chosen = _until_share(list(carried), list(carried.values()), edge_influence)
    return _subgraph(graph, kept, chosen, recipe)


def _with_edges(graph: nx.DiGraph, flow: dict[str, float], edges: int, recipe: dict[str, Any]) -> nx.DiGraph:
    """The most edges, largest first, of which no more than `edges` stay when what dangles is gone.

    An edge more never lets another one dangle, so that the number that stays can be bisected.
    """
    ranked, nodes = list(_carried(graph, flow)), set(graph)

    def staying(n: int) -> int:
        return _tied(graph, nodes, ranked[:n]).number_of_edges()

    low, step = min(edges, len(ranked)), 1
    # Few edges dangle as a rule, so that the number is near.
    while low + step <= len(ranked) and staying(low + step) <= edges:
        low, step = low + step, 2 * step
    most = bisect_right(range(len(ranked) + 1), edges, lo=low, hi=min(low + step, len(ranked) + 1), key=staying) - 1
    return _subgraph(graph, nodes, ranked[:most], recipe)


def _carried(graph: nx.DiGraph, flow: dict[str, float]) -> dict[tuple[str, str], float]:
    """Influence that every edge carries, most first."""
    found = {edge: share * flow[edge[1]] for edge, share in edge_shares(graph).items()}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _until_share(items: Sequence[Any], sizes: Sequence[float], share: float) -> list[Any]:
    """Items, given largest first, until they have a share of the sum of all."""
    limit, so_far, kept = share * sum(sizes), 0.0, []
    for item, one in sorted(zip(items, sizes, strict=True), key=lambda pair: -pair[1]):
        # Rounding of the running sum shall not cost the last item.
        if so_far >= limit * (1 + 1e-12) or (so_far >= limit and share < 1):
            break
        kept.append(item)
        so_far += one
    return kept


def _subgraph(graph: nx.DiGraph, nodes: set[str], edges: Sequence[Any], recipe: dict[str, Any]) -> nx.DiGraph:
    """The nodes with these edges, without what they leave dangling."""
    tied, found = _tied(graph, nodes, edges), nx.DiGraph()
    found.add_nodes_from((node, dict(graph.nodes[node])) for node in tied)
    found.add_edges_from((*edge, dict(graph.edges[edge])) for edge in edges if tied.has_edge(*edge))
    add_accounts(found)
    counts = {"nodes": found.number_of_nodes(), "edges": found.number_of_edges()}
    before = {"nodes_before": graph.number_of_nodes(), "edges_before": graph.number_of_edges()}
    found.graph = {**graph.graph, "pruning": [*graph.graph.get("pruning", []), {**recipe, **counts, **before}]}
    return found


def _tied(graph: nx.DiGraph, nodes: set[str], edges: Sequence[Any]) -> nx.DiGraph:
    """Names of the nodes and of these edges, without what they leave dangling."""
    found = nx.DiGraph()
    found.add_nodes_from(node for node in graph if node in nodes)
    found.add_edges_from(edges)
    while loose := [node for node in found if _dangles(graph, found, node)]:
        found.remove_nodes_from(loose)
    return found


def cut(graph: nx.DiGraph) -> tuple[int, int]:
    """Numbers of nodes and edges that pruning has taken away."""
    steps = [one for one in graph.graph.get("pruning", []) if isinstance(one, dict) and "edges_before" in one]
    nodes, edges = (sum(one[f"{what}_before"] - one[what] for one in steps) for what in ("nodes", "edges"))
    return nodes, edges


def _dangles(before: nx.DiGraph, now: nx.DiGraph, node: str) -> bool:
    kind = before.nodes[node].get("kind")
    if kind == "output":
        return False
    return (not now.out_degree(node)) or (kind != "input" and not now.in_degree(node) and bool(before.in_degree(node)))


def _measured(graph: nx.DiGraph, stage: Stage, regime: str, budget: tuple[int, int], seed: int) -> float:
    """Damage of a graph's nodes."""
    kept = masks(stage.decomposition, graph, graph.nodes, dict(stage.pieces), stage.record)
    rng = torch.Generator(device=tensors(stage.batch)[0].device).manual_seed(seed)
    return damage_of(stage, kept, regime, budget, rng).damage


def _until(
    graph: nx.DiGraph,
    flow: dict[str, float],
    limit: float,
    measured: Callable[[nx.DiGraph], float],
    recipe: dict[str, Any],
) -> nx.DiGraph:
    """The graph of the fewest most influential nodes with a damage within the limit, by bisection."""
    ranked = _ranked(graph, flow)
    always = set(graph) - set(ranked)

    def at(n: int) -> nx.DiGraph:
        # What dangles is gone before the damage is measured, so that it is the returned graph's own.
        kept = always | set(ranked[:n])
        part = _subgraph(graph, kept, list(graph.subgraph(kept).edges), recipe)
        part.graph["pruning"][-1]["damage"] = measured(part)
        return part

    low, high, best = -1, len(ranked), at(len(ranked))
    most = best.graph["pruning"][-1]["damage"]
    if most > limit:
        raise ValueError(
            f"the whole graph of {len(graph)} nodes does damage {most:.3g} under {recipe['regime']} ablation of all "
            f"else, more than the limit {limit:g}; build the graph with components='all', or allow more"
        )
    while high - low > 1:
        middle = (low + high) // 2
        part = at(middle)
        if part.graph["pruning"][-1]["damage"] <= limit:
            high, best = middle, part
        else:
            low = middle
    return best
