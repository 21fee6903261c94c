"""Layout: where the nodes of a graph are drawn; rows are calls of sites in traced order, columns are positions."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import networkx as nx
import numpy as np

_SWEEPS = 6  # of barycentres, up and down


class Layout(NamedTuple):
    """Places of nodes.

    Attributes:
        rows: A title for each row, inputs first.
        columns: A title for each column; empty where there are no positions.
        row: Row of every node.
        x: Place of every node in its row, from 0 to 1.
    """

    rows: list[str]
    columns: list[str]
    row: dict[str, int]
    x: dict[str, float]


def layout(graph: nx.DiGraph) -> Layout:
    """Place all nodes: rows by the traced order, within a row by position, or near what they are joined to."""
    orders = sorted({_order(data) for _, data in graph.nodes(data=True)})
    number = {order: i for i, order in enumerate(orders)}
    row = {node: number[_order(data)] for node, data in graph.nodes(data=True)}
    titles = [""] * len(orders)
    for node, data in graph.nodes(data=True):
        call = f", call {data['call']}" if "call" in data else ""
        titles[row[node]] = f"{data.get('site') or 'model'}{call}"
    positions = sorted({data["position"] for _, data in graph.nodes(data=True) if "position" in data})
    if len(positions) > 1:
        return Layout(titles, _columns(graph, positions), row, _by_position(graph, row, positions))
    return Layout(titles, [], row, _by_neighbours(graph, row, len(orders)))


def label(node: str, data: Mapping[str, Any]) -> str:
    """What a reader sees of a node: its title, with the spaces at its ends drawn, which tell tokens apart."""
    return re.sub("^ +| +$", lambda spaces: "␣" * len(spaces[0]), str(data.get("title", node)))


def _order(data: dict) -> tuple:
    return data.get("order", data.get("layer", 0)), str(data.get("site", "")), data.get("call", 0)


def _columns(graph: nx.DiGraph, positions: list[int]) -> list[str]:
    titles = {position: str(position) for position in positions}
    for node, data in graph.nodes(data=True):
        if data.get("kind") == "input" and data.get("title", node) != node and "position" in data:
            titles[data["position"]] = label(node, data)
    return [titles[position] for position in positions]


def _by_position(graph: nx.DiGraph, row: dict[str, int], positions: list[int]) -> dict[str, float]:
    place = {position: i for i, position in enumerate(positions)}
    cells: dict[tuple[int, int], list[str]] = {}
    for node, data in graph.nodes(data=True):
        cells.setdefault((row[node], place.get(data.get("position", positions[0]), 0)), []).append(node)
    x = {}
    for (_, column), nodes in cells.items():
        for i, node in enumerate(sorted(nodes, key=lambda one: _rank(graph, one))):
            x[node] = (column + (i + 1) / (len(nodes) + 1)) / len(positions)
    return x


def _rank(graph: nx.DiGraph, node: str) -> tuple:
    data = graph.nodes[node]
    return data.get("kind") in ("remainder", "bias"), data.get("index", 0), node


def _by_neighbours(graph: nx.DiGraph, row: dict[str, int], n_rows: int) -> dict[str, float]:
    """Order every row by the weighted mean place of neighbours, a few times up and down."""
    nodes = list(graph)
    number = {node: i for i, node in enumerate(nodes)}
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    for node in nodes:
        rows[row[node]].append(number[node])
    place = np.zeros(len(nodes))
    for members in rows:
        members.sort(key=lambda i: _rank(graph, nodes[i]))
        _spread(place, members)
    edges = list(graph.edges(data="weight", default=1.0))
    source = np.array([number[s] for s, _, _ in edges], dtype=int)
    target = np.array([number[t] for _, t, _ in edges], dtype=int)
    size = np.abs([float(w) for *_, w in edges]) if edges else np.zeros(0)
    for sweep in range(_SWEEPS):
        near, own = (source, target) if sweep % 2 == 0 else (target, source)
        total = np.bincount(own, size, len(nodes))
        pull = np.bincount(own, size * place[near], len(nodes))
        wanted = np.where(total > 0, pull / np.maximum(total, 1e-300), place)
        for members in rows:
            members.sort(key=lambda i: (wanted[i], i))
            _spread(place, members)
    return {node: float(place[i]) for i, node in enumerate(nodes)}


def _spread(place: np.ndarray, members: list[int]) -> None:
    for i, one in enumerate(members):
        place[one] = (i + 1) / (len(members) + 1)
