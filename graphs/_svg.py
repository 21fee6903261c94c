"""SVG: a still picture of a graph, for places where no script runs."""

from html import escape

import networkx as nx

from graphs._influence import edge_shares
from graphs._layout import label, layout

_EDGES = 300  # drawn, largest first
_WIDTH, _ROW, _LEFT = 900, 90, 130
_POSITIVE, _NEGATIVE = "#0b6e99", "#c4500c"


def svg(graph: nx.DiGraph) -> str:
    """The graph as SVG: rows from the inputs below to the outputs above, negative edges dashed."""
    places = layout(graph)
    height = _ROW * len(places.rows) + 40.0

    def at(node: str) -> tuple[float, float]:
        return _LEFT + places.x[node] * (_WIDTH - _LEFT), height - 40 - _ROW * places.row[node]

    shares = edge_shares(graph)
    carried = {edge: share * graph.nodes[edge[1]].get("influence", 1.0) for edge, share in shares.items()}
    chosen = sorted(carried, key=lambda edge: -carried[edge])[:_EDGES]
    lines = [_edge(at(s), at(t), graph.edges[s, t].get("weight", 1.0), shares[s, t]) for s, t in reversed(chosen)]
    circles = [_node(at(node), node, data) for node, data in graph.nodes(data=True)]
    labels = [
        f'<text x="8" y="{height - 36 - _ROW * i:.0f}">{escape(title)}</text>' for i, title in enumerate(places.rows)
    ]
    note = f"{len(graph)} nodes, {len(chosen)} of {graph.number_of_edges()} edges"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{note}</title><rect width="100%" height="100%" fill="white"/>'
        f'<g fill="none">{"".join(lines)}</g>{"".join(circles)}{"".join(labels)}'
        f'<text x="8" y="16" fill="#555">{note}; solid raises, dashed lowers</text></svg>'
    )


def _edge(one: tuple[float, float], other: tuple[float, float], weight: float, share: float) -> str:
    (x, y), (u, v) = one, other
    middle = (y + v) / 2
    dash = ' stroke-dasharray="5 3"' if weight < 0 else ""
    return (
        f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {v:.0f}" stroke-opacity=".5" '
        f'stroke="{_NEGATIVE if weight < 0 else _POSITIVE}" stroke-width="{0.4 + 4 * share**0.5:.1f}"{dash}/>'
    )


def _node(at: tuple[float, float], node: str, data: dict) -> str:
    size = 3 + 7 * min(1.0, abs(data.get("influence", 0.1))) ** 0.5
    fill = {"input": "#555", "output": "#222", "remainder": "#fff", "bias": "#fff"}.get(data.get("kind", ""), "#7d8ca3")
    title = escape(label(node, data))
    return (
        f'<circle cx="{at[0]:.0f}" cy="{at[1]:.0f}" r="{size:.1f}" fill="{fill}" stroke="#333"><title>{title}</title>'
        "</circle>"
    )
