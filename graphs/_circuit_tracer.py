"""Circuit-tracer JSON: for its local viewer and Neuronpedia, with example files that the former finds by itself.

What the format has no field for travels in `attributes`, which viewers ignore, so that a graph comes back exactly.
Every site is a layer of its own, because a feature has one number a layer; a graph without positions has one column
a site, because the viewer draws nothing in a single column.
"""

import json
from collections.abc import Mapping
from typing import Any

import networkx as nx

from graphs._columns import UNITS
from graphs._influence import influences
from graphs._networkx_formats import check_elements, loaded

_NEEDED = {
    "nodes": ("node_id", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"),
    "links": ("source", "target", "weight"),
}
_KINDS = {"embedding": "input", "logit": "output", "mlp reconstruction error": "remainder"}
# The local viewer puts labels into the page as HTML.
_NO_HTML = str.maketrans({"<": "\u2039", ">": "\u203a", "&": "\uff06"})


def trimmed(graph: nx.DiGraph) -> nx.DiGraph:
    """The graph without components that nothing enters or leaves, on which the viewer fails."""
    found = nx.DiGraph(graph)
    while True:
        loose = [
            node
            for node, data in found.nodes(data=True)
            if (data.get("kind") not in ("input", "output") and not found.out_degree(node))
            or (data.get("kind") in UNITS and not found.in_degree(node))
        ]
        if not loose:
            return found
        found.remove_nodes_from(loose)


def circuit_tracer(graph: nx.DiGraph, stem: str) -> tuple[bytes, dict[str, bytes]]:
    """The JSON of a trimmed graph, and the example files that lie in the folder `stem` beside it, by name.

    Raises:
        ValueError: For a graph that the viewer cannot draw.
    """
    if not any(data.get("kind") == "output" for _, data in graph.nodes(data=True)):
        raise ValueError("the graph has no node of kind 'output'; the circuit-tracer viewer needs one")
    columns = _columns(graph)
    ranks = _cumulative(graph)
    names = {node: _node_id(data, columns) for node, data in graph.nodes(data=True)}
    nodes = [_node(node, data, names[node], columns, ranks, graph) for node, data in graph.nodes(data=True)]
    links = [
        {"source": names[source], "target": names[target], "weight": float(data.get("weight", 0)), "attributes": data}
        for source, target, data in graph.edges(data=True)
    ]
    slug = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in stem) or "circuit"
    metadata = {
        "slug": slug,
        "scan": f"./{stem}",
        "prompt_tokens": [title.translate(_NO_HTML) for title in columns.titles],
        "prompt": " ".join(columns.titles).translate(_NO_HTML),
        "node_threshold": 1.0,
        "schema_version": 1,
        "info": {"generator": {"name": "weightdecomp", "version": str(graph.graph.get("package_version", ""))}},
        "graph": graph.graph,
    }
    pins: dict[str, list] = {"pinnedIds": [], "supernodes": []}
    document = {"metadata": metadata, "qParams": pins, "nodes": nodes, "links": links}
    text = json.dumps(document, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode(), _examples(graph)


class _Columns:
    """Columns of the picture: positions, or sites where there are none."""

    def __init__(self, titles: list[str], of: Mapping[str, int] | None) -> None:
        self.titles, self.of = titles, of

    def __call__(self, data: Mapping[str, Any]) -> int:
        """Column of a node."""
        if self.of is None:
            return int(data.get("position", len(self.titles) - 1 if data["kind"] == "output" else 0))
        return self.of[_row(data)]


def _row(data: Mapping[str, Any]) -> str:
    return f"{data.get('order', 0):06d}"


def _columns(graph: nx.DiGraph) -> _Columns:
    positions = {data["position"] for _, data in graph.nodes(data=True) if "position" in data}
    if len(positions) > 1:
        titles = [f"{i}" for i in range(max(positions) + 1)]
        for _, data in graph.nodes(data=True):
            if data["kind"] == "input" and "position" in data:
                titles[data["position"]] = str(data.get("title", data["position"]))
        return _Columns(titles, None)
    rows = {_row(data): str(data.get("site", "")) for _, data in graph.nodes(data=True)}
    order = sorted(rows)
    return _Columns([rows[row] or "model" for row in order] or ["model"], {row: i for i, row in enumerate(order)})


def _node_id(data: Mapping[str, Any], columns: _Columns) -> str:
    layer, index, at = data.get("order", 0), data.get("index", 0), columns(data)
    place = f"{data['call']}_{at}" if "call" in data else str(at)
    prefix = {"input": f"E_{data.get('site', '')}", "remainder": f"R_{layer}", "bias": f"B_{layer}"}
    return f"{prefix.get(data['kind'], layer)}_{index}_{place}"


def _node(
    node: str,
    data: Mapping[str, Any],
    name: str,
    columns: _Columns,
    ranks: Mapping[str, float],
    graph: nx.DiGraph,
) -> dict[str, Any]:
    kind, index, layer, at = data["kind"], int(data.get("index", 0)), int(data.get("order", 0)), columns(data)
    title = str(data.get("title", node)).translate(_NO_HTML)
    found: dict[str, Any] = {"node_id": name, "ctx_idx": at, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": name}
    if kind == "input":
        found |= {"feature": at, "layer": "E", "feature_type": "embedding", "clerp": title}
    elif kind == "output":
        # A logit whose label has no probability leaves the viewer blank.
        p = float(data.get("importance", 0.0))
        found |= {"feature": index, "layer": str(layer), "feature_type": "logit", "token_prob": p}
        found |= {"clerp": f"{title} (p={p:.3f})", "is_target_logit": True}
    elif kind in UNITS:
        found |= {"feature": cantor(layer, index), "layer": str(layer), "clerp": title}
        found |= {"feature_type": "cross layer transcoder", "jsNodeId": f"{layer}_{index}-0"}
    else:
        found |= {"feature": -1, "layer": str(layer), "feature_type": "mlp reconstruction error", "clerp": title}
    found |= {"influence": ranks[node], "activation": float(data.get("activation", 0.0))}
    return found | {"id_in_graph": node, "attributes": dict(data)}


def cantor(layer: int, index: int) -> int:
    """One number for a layer and an index, as the viewer expects it."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _cumulative(graph: nx.DiGraph) -> dict[str, float]:
    """Cumulative share of influence in sorted order, which the format calls influence: small is important."""
    found = influences(graph)
    total, so_far, ranks = sum(found.values()) or 1.0, 0.0, {}
    for node in sorted(found, key=lambda one: -found[one]):
        so_far += found[node]
        ranks[node] = min(1.0, so_far / total)
    return ranks


def _examples(graph: nx.DiGraph) -> dict[str, bytes]:
    """One file a component with its top inputs."""
    found = {}
    for _, data in graph.nodes(data=True):
        if data["kind"] not in UNITS or "top_inputs" not in data:
            continue
        number = cantor(int(data.get("order", 0)), int(data["index"]))
        pairs = [one.split(": ") for one in data["top_inputs"].split("; ")]
        examples = [
            {"tokens": [f"input {i} "], "tokens_acts_list": [abs(float(x))], "train_token_ind": 0} for i, x in pairs
        ]
        largest = max(one["tokens_acts_list"][0] for one in examples)
        document = {
            "index": number,
            "examples_quantiles": [{"quantile_name": "Top activations", "examples": examples}],
            "top_logits": [],
            "bottom_logits": [],
            "act_min": 0,
            "act_max": largest,
            "quantile_values": [],
            "histogram": [],
            "activation_frequency": data.get("frequency", 0.0),
        }
        found[f"{number}.json"] = json.dumps(document, allow_nan=False).encode()
    return found


def read_circuit_tracer(data: bytes) -> nx.DiGraph:
    """Read circuit-tracer JSON: exactly what was written here, of others the fields that the format has."""
    document = loaded(data)
    for key, fields in _NEEDED.items():
        if not isinstance(document.get(key), list):
            raise ValueError(f"the file has no list {key!r}; it has {sorted(document)[:8]}")
        for i, one in enumerate(document[key]):
            missing = [name for name in fields if not isinstance(one, dict) or name not in one]
            if missing:
                named = one.get("node_id", i) if isinstance(one, dict) else i
                raise ValueError(f"{key[:-1]} {named!r} has no {missing[0]!r}")
    nodes, links = document["nodes"], document["links"]
    check_elements(nodes, "node_id", links)
    ids = {one["node_id"]: one.get("id_in_graph", one["node_id"]) for one in nodes}
    graph = nx.DiGraph(**document.get("metadata", {}).get("graph", {}))
    for one in nodes:
        graph.add_node(ids[one["node_id"]], **(one.get("attributes") or _foreign(one)))
    for one in links:
        graph.add_edge(
            ids[one["source"]], ids[one["target"]], **(one.get("attributes") or {"weight": float(one["weight"])})
        )
    return graph


def _foreign(one: Mapping[str, Any]) -> dict[str, Any]:
    """A node of a file that another program wrote."""
    layer = one["layer"]
    return {
        "kind": _KINDS.get(one["feature_type"], "component"),
        "site": str(layer),
        "title": str(one["clerp"]),
        "position": int(one["ctx_idx"]),
        "order": 0 if layer == "E" else int(layer) + 1,
        "layer": 0 if layer == "E" else int(layer) + 1,
        **{name: one[name] for name in ("activation", "feature") if isinstance(one.get(name), int | float)},
    }
