"""Aggregate: graphs of single inputs added up to the graph of all of them."""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

import networkx as nx
import numpy as np

from graphs._columns import Key
from graphs._influence import add_influence
from graphs._tally import Tally

_SAME = ("decomposition", "effects", "components", "collapsed", "divergence", "outputs")
_OF_SITES = ("layer", "order", "circuit", "reads", "writes")


def aggregate(graphs: Iterable[nx.DiGraph], *, positions: bool = False, edges: int | None = 100_000) -> nx.DiGraph:
    """Add up graphs of single inputs: the graph that `circuit_graph` builds of all these inputs at once.

    Weights and activations become means over inputs with standard errors; what an input has not counts 0 there.

    Args:
        graphs: Graphs of one input each, with all their edges (`edges=None`), of the same decomposition and outputs.
        positions: Keep positions apart; else effects are summed over the positions of an input.
        edges: Largest number of edges kept; None keeps all.

    Returns:
        A graph with the same attributes, but for the names of the top inputs.

    Raises:
        ValueError: For no graphs, pruned ones, graphs of several inputs, or of different decompositions or settings.
    """
    found = list(graphs)
    if not found:
        raise ValueError("no graphs to add up")
    first = found[0].graph
    for i, graph in enumerate(found):
        n = graph.graph.get("inputs", {}).get("n")
        if n != 1:
            raise ValueError(f"graphs[{i}] is of {n} inputs, expected a graph of one input")
        for name in _SAME:
            own, its = _setting(found[0], name), _setting(graph, name)
            if its != own:
                raise ValueError(
                    f"graphs[{i}] has another {name} ({its!r}) than graphs[0] ({own!r}); "
                    "only graphs of one decomposition, built in the same way, add up; name outputs= and "
                    "output_positions= where the model has so many that each input shows its own"
                )
        if graph.graph["pruning"]:
            raise ValueError(f"graphs[{i}] has been pruned; add up whole graphs, and prune what they add up to")
        if graph.graph["hidden_edges"]:
            raise ValueError(
                f"graphs[{i}] leaves out {graph.graph['hidden_edges']} edges, which cannot be added up; build it with "
                "edges=None"
            )
    tally = Tally(len(found))
    # What positions cancel to is rounding again.
    tally.precision = max(graph.graph.get("precision", 0.0) for graph in found)
    kept: dict[str, dict] = {}
    for graph in found:
        _count(tally, graph, positions, kept)
    total = tally.graph(edges, "estimate")
    for node, data in total.nodes(data=True):
        data |= kept[node]
    counted = {name: total.graph[name] for name in ("hidden_edges", "precision", "rows")}
    joined = "".join(graph.graph["inputs"]["sha256"] for graph in found)
    inputs = {"n": len(found), "sha256": sha256(joined.encode()).hexdigest(), "positions": positions}
    total.graph.update({**first, **counted, "inputs": inputs, "pruning": [], "scores": []})
    add_influence(total, _output_sizes(found, positions))
    return total


def _setting(graph: nx.DiGraph, name: str) -> Any:
    """A graph attribute that graphs share which add up; the size of what is shown is each input's own."""
    found = graph.graph.get(name)
    return {key: value for key, value in found.items() if key != "size"} if isinstance(found, dict) else found


def _output_sizes(graphs: Sequence[nx.DiGraph], positions: bool) -> dict[str, float]:
    """Mean size of every output over graphs; its importance in a graph is its share of all that are shown."""
    found: dict[str, float] = {}
    for graph in graphs:
        for _, data in graph.nodes(data=True):
            if data["kind"] == "output":
                node, size = _key(data, positions).id, data["importance"] * graph.graph["outputs"]["size"]
                found[node] = found.get(node, 0.0) + size / len(graphs)
    return found


def _key(data: dict, positions: bool) -> Key:
    """What a node is called in the sum."""
    position = data.get("position") if positions else None
    return Key(data["kind"], data["site"], data.get("index"), data.get("call"), position)


def _count(tally: Tally, graph: nx.DiGraph, positions: bool, kept: dict[str, dict]) -> None:
    keys, values, gates = {}, {}, {}
    for node, data in graph.nodes(data=True):
        key = _key(data, positions)
        keys[node] = key
        kept.setdefault(key.id, {name: data[name] for name in _OF_SITES if name in data})
        if data["title"] != node:
            kept[key.id]["title"] = data["title"]
        values[key] = values.get(key, 0.0) + data["activation"]
        rows = 1 if "position" in data else graph.graph["rows"].get(_place(data), 1)
        opened, importance = gates.get(key, (0.0, 0.0))
        gates[key] = opened + rows * data.get("frequency", 0), importance + rows * data.get("importance", 0)
    for key, value in values.items():
        tally.add(int(tally.numbers([key])[0]), np.array([value]), *gates[key])
    for place, rows in graph.graph["rows"].items():
        site, call = _split(place, graph)
        tally.rows[site, call] = tally.rows.get((site, call), 0) + rows
    weights: dict[tuple[Key, Key], float] = {}
    for source, target, data in graph.edges(data=True):
        pair = keys[source], keys[target]
        weights[pair] = weights.get(pair, 0.0) + data["weight"]
    if weights:
        fro, to = (tally.numbers([pair[i] for pair in weights]) for i in (0, 1))
        w = np.array(list(weights.values()))
        tally.blocks.append((fro, to, w, w**2, np.abs(w)))


def _place(data: dict) -> str:
    return f"{data['site']}@{data['call']}" if "call" in data else data["site"]


def _split(place: str, graph: nx.DiGraph) -> tuple[str, int | None]:
    if place in graph.graph["sites"]:
        return place, None
    site, _, call = place.rpartition("@")
    return site, int(call)
