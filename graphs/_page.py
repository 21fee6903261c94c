"""Page: a graph as one HTML file that needs no network."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

import networkx as nx

from graphs._influence import edge_shares
from graphs._layout import label, layout
from graphs._modules import modules
from graphs._prune import cut

_MANY = 400  # nodes; above, modules are shown first
_LOUVAIN = 4_000  # nodes; above, sites stand in for modules
_EDGES = 50_000  # in one page
_FACTS = [
    "kind",
    "site",
    "index",
    "call",
    "position",
    "circuit",
    "module",
    "top_inputs",
    "reads",
    "writes",
    "status",
    "n",
]
_FIGURES = ["importance", "frequency", "activation", "std", "influence", "unaccounted", "minimality", "before", "after"]
_EDGE = ("error", "evidence", "status", "before", "after")


def page(graph: nx.DiGraph) -> str:
    """The page of a sanitised graph; whatever the labels hold, they stay text."""
    if len(graph) > _MANY and not any("module" in data for _, data in graph.nodes(data=True)):
        graph = _grouped(graph)
    # No `<` in the data, so that nothing in it can end its element or begin another.
    data = json.dumps(document(graph), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    return (
        _resource("page.html")
        .replace("{{policy}}", escape(policy, quote=True).replace("&#x27;", "'"))
        .replace("{{title}}", escape(title(graph)))
        .replace("{{style}}", style)
        .replace("{{script}}", script)
        .replace("{{data}}", data)
    )


def title(graph: nx.DiGraph) -> str:
    """What the graph is of, in a few words."""
    if graph.graph.get("schema") == "weightdecomp.diff":
        return "What changed between two circuits"
    n = graph.graph.get("inputs", {}).get("n", 0) if isinstance(graph.graph.get("inputs"), dict) else 0
    return "Circuit on one input" if n == 1 else f"Circuit on {n:,} inputs" if n else "Circuit"


def document(graph: nx.DiGraph) -> dict[str, Any]:
    """What the page's script draws: columns of node attributes, and edges in the order in which they are shown."""
    places, nodes = layout(graph), list(graph)
    number = {node: i for i, node in enumerate(nodes)}
    shares = edge_shares(graph)
    edges = _in_turns(graph, shares, places.row)
    shown = edges[:_EDGES]
    columns: dict[str, list] = {
        "id": nodes,
        "title": [label(node, graph.nodes[node]) for node in nodes],
        "row": [places.row[node] for node in nodes],
        "x": [round(places.x[node], 4) for node in nodes],
    }
    for name in (*_FACTS, *_FIGURES):
        found = _short([graph.nodes[node].get(name) for node in nodes])
        if any(one is not None for one in found):
            columns[name] = found
    lines: dict[str, list] = {
        "s": [number[source] for source, _ in shown],
        "t": [number[target] for _, target in shown],
        "w": _short([graph.edges[edge].get("weight", 1.0) for edge in shown]),
        "share": _short([shares[edge] for edge in shown], 3),
    }
    for name in _EDGE:
        found = _short([graph.edges[edge].get(name) for edge in shown], 3)
        if len(set(found)) > 1:
            lines[name] = found
    own = {name: value for name, value in graph.graph.items() if name not in ("scores", "sites", "rows")}
    return {
        "title": title(graph),
        "rows": places.rows,
        "columns": places.columns,
        "nodes": columns,
        "edges": lines,
        "unembedded": len(edges) - len(shown),
        "hidden": graph.graph.get("hidden_edges", 0),
        "cut": dict(zip(("nodes", "edges"), cut(graph), strict=True)),
        "scores": scores(graph),
        "overview": len(graph) > _MANY,
        "about": {name: value for name, value in own.items() if len(json.dumps(value)) < 4000},
    }


def _in_turns(
    graph: nx.DiGraph, shares: Mapping[tuple[str, str], float], row: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Edges, those that carry most first, the rows that they enter taking turns.

    Flow spreads over more edges the deeper it comes from, so that the largest of all would leave the inputs bare.
    """
    carried = {edge: share * abs(graph.nodes[edge[1]].get("influence", 1.0)) for edge, share in shares.items()}
    turn: Counter[int] = Counter()
    placed = []
    for edge in sorted(carried, key=lambda edge: -carried[edge]):
        turn[row[edge[1]]] += 1
        placed.append((turn[row[edge[1]]], len(placed), edge))
    return [edge for *_, edge in sorted(placed)]


def scores(graph: nx.DiGraph) -> list[dict[str, Any]]:
    """The newest record of every figure."""
    newest = {}
    for one in graph.graph.get("scores", []):
        if isinstance(one, dict) and "damage" in one:
            newest[one.get("figure"), one.get("regime")] = one
    return list(newest.values())


def _short(values: list, digits: int = 5) -> list:
    """Numbers to a few digits, which is all that is printed."""
    return [float(f"{value:.{digits}g}") if isinstance(value, float) else value for value in values]


def _grouped(graph: nx.DiGraph) -> nx.DiGraph:
    """A copy with modules: Louvain's with one seed, or sites where that would take long."""
    if len(graph) <= _LOUVAIN:
        return modules(graph, resolutions=[1.0], seeds=1, nulls=0)
    found = nx.DiGraph(graph)
    found.graph = dict(graph.graph)
    sites = {site: i for i, site in enumerate(Counter(data.get("site") for _, data in graph.nodes(data=True)))}
    for node, data in graph.nodes(data=True):
        found.nodes[node]["module"] = sites[data.get("site")]
    return found


def _resource(name: str) -> str:
    return files("graphs").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
