"""Show: a graph in a notebook: the page in a frame, a still picture where no script runs, and text."""

from collections import Counter
from collections.abc import Sequence
from html import escape

import networkx as nx

from graphs._columns import UNITS
from graphs._page import page, scores, title
from graphs._prune import cut
from graphs._sanitise import sanitise
from graphs._svg import svg


def show(graph: nx.DiGraph, *, height: int = 640) -> "View":
    """What a notebook displays for a graph, when it is the last expression of a cell.

    Args:
        graph: A circuit graph.
        height: Of the frame, in pixels.
    """
    return View(sanitise(graph), height)


class View:
    """A graph as a notebook shows it; see `show`."""

    def __init__(self, graph: nx.DiGraph, height: int) -> None:
        """Hold a sanitised graph."""
        self.graph, self.height = graph, height

    @property
    def page(self) -> str:
        """The page that `graphs.write` puts into an `.html` file, as text."""
        return page(self.graph)

    def __repr__(self) -> str:
        """Nodes, edges, scores and the strongest nodes, in a few lines."""
        return summary(self.graph)

    def _repr_mimebundle_(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, str]:
        """The page in a frame of its own, the picture where scripts do not run, and text."""
        frame = (
            f'<iframe sandbox="allow-scripts" width="100%" height="{self.height}" style="border:0" '
            f'title="{escape(title(self.graph))}" srcdoc="{escape(self.page, quote=True)}"></iframe>'
        )
        found = {"text/plain": repr(self), "text/html": frame, "image/svg+xml": svg(self.graph)}
        return {kind: one for kind, one in found.items() if (not include or kind in include) and kind not in exclude}


def summary(graph: nx.DiGraph) -> str:
    """A graph in a few lines of text."""
    kinds = Counter(str(data.get("kind")) for _, data in graph.nodes(data=True))
    counted = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    lines = [title(graph), f"{len(graph)} nodes ({counted}), {graph.number_of_edges()} edges"]
    if any(cut(graph)):
        lines[-1] += ", {:,} nodes and {:,} edges pruned away".format(*cut(graph))
    if graph.graph.get("hidden_edges"):
        lines[-1] += f", {graph.graph['hidden_edges']} more left out"
    for one in scores(graph):
        lines.append(f"{one['figure']}, {one['regime']}: {one['damage']:.3g} ({one['evidence']}, {one['budget']})")
    strong = [node for node, data in graph.nodes(data=True) if data.get("kind") in UNITS]
    strong.sort(key=lambda node: -graph.nodes[node].get("influence", 0.0))
    if strong:
        lines.append("most influential: " + ", ".join(strong[:5]))
    return "\n".join(lines)
