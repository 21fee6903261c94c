"""Networkx's own formats, wrapped so that a sanitised graph comes back exactly.

What networkx adds (labels, ids, defaults) is taken off again, and the graph's own attributes, which it drops or
refuses, travel as one JSON text.
"""

import json
from typing import Any
from xml.etree import ElementTree

import networkx as nx
from networkx.readwrite.gexf import GEXFReader, GEXFWriter
from networkx.readwrite.graphml import GraphMLReader, GraphMLWriter

_GRAPH = "graph_json"
_ADDED = {"gexf": ("label", "id"), "graphml": ("id",), "cytoscape": ("id", "name", "value", "source", "target")}


def node_link(graph: nx.DiGraph) -> bytes:
    """Node-link JSON: every attribute as it is."""
    return _json(nx.node_link_data(graph, edges="edges"))


def read_node_link(data: bytes) -> nx.DiGraph:
    """Read node-link JSON; older files say `links` for `edges`."""
    document = loaded(data)
    _check_keys(document, "nodes", list)
    edges = "edges" if "edges" in document else "links"
    _check_keys(document, edges, list)
    if not document.get("directed") or document.get("multigraph"):
        raise ValueError("the file's graph is not directed, or has parallel edges; expected directed: true")
    check_elements(document["nodes"], "id", document[edges])
    return nx.node_link_graph(document, directed=True, multigraph=False, edges=edges)


def cytoscape(graph: nx.DiGraph) -> bytes:
    """Cytoscape JSON, as Cytoscape desktop and cytoscape.js read it."""
    document = nx.cytoscape_data(graph)
    document["data"] = {_GRAPH: json.dumps(graph.graph), "name": "circuit"}
    return _json(document)


def read_cytoscape(data: bytes) -> nx.DiGraph:
    """Read Cytoscape JSON."""
    document = loaded(data)
    _check_keys(document, "elements", dict)
    elements = document["elements"]
    nodes, edges = ([one.get("data", {}) for one in elements.get(name, [])] for name in ("nodes", "edges"))
    check_elements(nodes, "id", edges)
    for node in nodes:
        node.setdefault("value", node["id"])
        node.setdefault("name", node["id"])
    held = document.get("data", {})
    held = dict(held) if isinstance(held, list) else held
    document |= {"data": [], "directed": document.get("directed", True), "multigraph": False}
    return _restored(nx.cytoscape_graph(document), held, "cytoscape")


def graphml(graph: nx.DiGraph) -> bytes:
    """GraphML, as Gephi, yEd and igraph read it."""
    copy = nx.DiGraph()
    copy.graph[_GRAPH] = json.dumps(graph.graph)
    copy.add_nodes_from(graph.nodes(data=True))
    copy.add_edges_from(graph.edges(data=True))
    return str(GraphMLWriter(copy, prettyprint=False)).encode()


def read_graphml(data: bytes) -> nx.DiGraph:
    """Read GraphML."""
    root, reader = _xml(data), GraphMLReader()
    keys, defaults = reader.find_graphml_keys(root)
    found = root.findall(f"{{{reader.NS_GRAPHML}}}graph")
    if len(found) != 1:
        raise ValueError(f"the file holds {len(found)} graphs, expected one")
    graph = reader.make_graph(found[0], keys, defaults)
    return _restored(graph, graph.graph, "graphml")


def gexf(graph: nx.DiGraph) -> bytes:
    """GEXF, as Gephi reads it; titles are its labels."""
    copy = nx.DiGraph()
    copy.add_nodes_from((node, {**data, "label": data.get("title", node)}) for node, data in graph.nodes(data=True))
    copy.add_edges_from(graph.edges(data=True))
    writer = GEXFWriter(copy, prettyprint=False)
    meta = writer.xml.find("meta")
    assert meta is not None
    # GEXF has no attributes of a graph; its description is the one place for text.
    ElementTree.SubElement(meta, "description").text = json.dumps(graph.graph)
    return str(writer).encode()


def read_gexf(data: bytes) -> nx.DiGraph:
    """Read GEXF."""
    root, reader = _xml(data), GEXFReader()
    for version in reader.versions:
        reader.set_version(version)
        found = root.find(f"{{{reader.NS_GEXF}}}graph")
        if found is not None:
            description = root.find(f"{{{reader.NS_GEXF}}}meta/{{{reader.NS_GEXF}}}description")
            held = {_GRAPH: None if description is None else description.text}
            return _restored(reader.make_graph(found), held, "gexf")
    raise ValueError("the file has no <graph> of a version of GEXF that can be read")


def _restored(graph: nx.Graph, held: dict[str, Any], form: str) -> nx.DiGraph:
    """The graph without what the format added, with the attributes that it was written with."""
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise ValueError("the file's graph is not directed, or has parallel edges")
    for _, data in graph.nodes(data=True):
        for name in _ADDED[form]:
            data.pop(name, None)
    for _, _, data in graph.edges(data=True):
        for name in _ADDED[form]:
            data.pop(name, None)
    try:
        own = json.loads(held[_GRAPH]) if held.get(_GRAPH) else {}
    except ValueError:
        own = {}  # a description that another program wrote
    graph.graph = own if isinstance(own, dict) else {}
    return graph


def _json(document: Any) -> bytes:
    return json.dumps(document, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def loaded(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: If it is none.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the file is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise ValueError(f"the file holds a JSON {type(document).__name__}, expected an object")
    return document


def _check_keys(document: dict[str, Any], key: str, kind: type) -> None:
    if not isinstance(document.get(key), kind):
        raise ValueError(f"the file has no {key!r}; it has {sorted(document)[:8]}")


def check_elements(nodes: list[Any], name: str, edges: list[Any]) -> None:
    """Refuse nodes without an id of their own, and edges that lead nowhere.

    Raises:
        ValueError: Naming the node.
    """
    ids: set[str] = set()
    for i, node in enumerate(nodes):
        if not isinstance(node, dict) or not isinstance(node.get(name), str | int | float):
            raise ValueError(f"node number {i} has no {name!r}")
        if node[name] in ids:
            raise ValueError(f"two nodes have the id {node[name]!r}")
        ids.add(node[name])
    pairs: set[tuple[Any, Any]] = set()
    for i, edge in enumerate(edges):
        pair = (edge.get("source"), edge.get("target")) if isinstance(edge, dict) else (None, None)
        for end in pair:
            if not isinstance(end, str | int | float) or end not in ids:
                raise ValueError(f"edge number {i}, {pair[0]!r} -> {pair[1]!r}, leads to no node {end!r}")
        if pair in pairs:
            raise ValueError(f"two edges lead from {pair[0]!r} to {pair[1]!r}")
        pairs.add(pair)


def _xml(data: bytes) -> ElementTree.Element:
    """A file's XML, with nodes and edges that fit together; parsed once, as parsing is half the time of reading."""
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"the file is not XML ({error})") from error
    found: dict[str, list[Any]] = {"node": [], "edge": []}
    for one in root.iter():
        kind = one.tag.rpartition("}")[2]
        if kind in found:
            found[kind].append(one.attrib)
    check_elements(found["node"], "id", found["edge"])
    return root
