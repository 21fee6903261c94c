"""Tally: sums over inputs of what nodes and edges measure, and the graph that they make."""

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
from scipy import sparse
from torch import Tensor

from graphs._columns import UNITS, Key, rounding
from graphs._edges import Block
from graphs._scene import Scene
from graphs._trace import by_position

_TOP = 5  # inputs named on a card
_SINGLES = ("remainder", "bias", "input")  # left out where they are 0 on all inputs


class Tally:
    """Sums over all inputs; a node that an input has not counts 0 there."""

    def __init__(self, n_inputs: int, circuits: Mapping[str, Sequence[int]] | None = None) -> None:
        """Begin with nothing counted; where nodes are circuits, `circuits` has the numbers of each site's."""
        self.n_inputs, self.seen, self.circuits = n_inputs, 0, circuits or {}
        self.number: dict[Key, int] = {}
        self.sums: list[np.ndarray] = []  # per node: value, value^2, open rows, importance
        self.rows: dict[tuple[str, int | None], int] = {}  # of all inputs, per site and call
        self.top: dict[int, list[tuple[float, int]]] = {}
        self.blocks: list[tuple[np.ndarray, ...]] = []
        self.precision = 1e-6

    def numbers(self, keys: Sequence[Key]) -> np.ndarray:
        """Numbers of nodes, new ones for new nodes."""
        for key in keys:
            if key not in self.number:
                self.number[key] = len(self.number)
                self.sums.append(np.zeros(4))
        return np.array([self.number[key] for key in keys], dtype=np.int64)

    def nodes(self, scene: Scene, importances: Mapping[str, Sequence[Tensor]]) -> None:
        """Count the nodes of one batch."""
        self.precision = rounding(scene.targets[-1].values.dtype)
        for i, columns in scene.sources.items():
            if i >= 0:
                event = scene.trace.events[i]
                gates = by_position(importances[event.site.path][event.call], scene.n)
                place = event.site.path, event.call if event.site.n_calls > 1 else None
                self.rows[place] = self.rows.get(place, 0) + gates.shape[:2].numel()
                self._count(scene.targets[i].keys, scene.targets[i].values, gates)
            singles = [j for j, key in enumerate(columns.keys) if key.kind not in UNITS]
            self._count([columns.keys[j] for j in singles], columns.values[:, singles], None)
        output = scene.targets[-1]
        self._count(output.keys, output.values, None)
        self.seen += scene.n

    def _count(self, keys: Sequence[Key], values: Tensor, gates: Tensor | None) -> None:
        if not keys:
            return
        numbers, size = self.numbers(keys), values.double().cpu().numpy()
        for i, (number, key) in enumerate(zip(numbers.tolist(), keys, strict=True)):
            if gates is None:
                self.add(number, size[:, i], 0.0, 0.0)
                continue
            at = slice(None) if key.position is None else slice(key.position, key.position + 1)
            gate = gates[:, at, key.number]
            self.add(number, size[:, i], float((gate > 0).sum()), float(gate.sum()))
            self._rank(number, size[:, i])

    def add(self, number: int, values: np.ndarray, opened: float, importance: float) -> None:
        """Count one node's values, and the sums of its open gates and importances."""
        self.sums[number] += (values.sum(), (values**2).sum(), opened, importance)

    def _rank(self, number: int, values: np.ndarray) -> None:
        best = np.argsort(-np.abs(values))[:_TOP]
        found = [(float(values[i]), self.seen + int(i)) for i in best if values[i]]
        self.top[number] = sorted(self.top.get(number, []) + found, key=lambda pair: -abs(pair[0]))[:_TOP]

    def edges(self, block: Block) -> None:
        """Count the edges of one block."""
        if not block.targets or not block.sources:
            return
        weights = block.weights.double()
        sums = [x.cpu().numpy() for x in (weights.sum(1), weights.square().sum(1), weights.abs().sum(1))]
        target, source = np.nonzero(sums[2])
        to, fro = self.numbers(block.targets)[target], self.numbers(block.sources)[source]
        self.blocks.append((fro, to, *(x[target, source] for x in sums)))

    def graph(self, edges: int | None, evidence: str) -> nx.DiGraph:
        """Means, standard errors and shares, with the largest edges."""
        graph = nx.DiGraph()
        keys = [self._named(key) for key in self.number]
        fro, to, weight, error, magnitude = self._edge_columns()
        total = np.bincount(to, magnitude, len(keys))
        share = magnitude / np.maximum(total[to], np.finfo(float).tiny)
        # What is nothing on all inputs is no node, and what seems to lead from it is rounding.
        there = np.array([key.kind not in _SINGLES or bool(own[1]) for key, own in zip(keys, self.sums, strict=True)])
        keep = np.flatnonzero((share > self.precision) & there[fro]) if len(fro) else np.zeros(0, dtype=int)
        n_found = len(keep)
        if edges is not None and n_found > edges:
            keep = np.sort(keep[np.argsort(-share[keep], kind="stable")[:edges]])
        ids = [key.id for key in keys]
        for number, key in enumerate(keys):
            if there[number]:
                graph.add_node(ids[number], **self._attributes(number, key))
        n = self.n_inputs
        for e in keep.tolist():
            data: dict[str, Any] = {"weight": float(weight[e]), "magnitude": float(magnitude[e])}
            data |= {"share": float(share[e]), "n": n, "evidence": evidence}
            if n > 1:
                data |= {"error": float(error[e]), "std": float(error[e] * n**0.5)}
            graph.add_edge(ids[fro[e]], ids[to[e]], **data)
        add_accounts(graph)
        graph.graph |= {"hidden_edges": n_found - len(keep), "precision": self.precision}
        graph.graph["rows"] = {site if call is None else f"{site}@{call}": n for (site, call), n in self.rows.items()}
        return graph

    def _named(self, key: Key) -> Key:
        """The key with the number that a circuit has in the whole decomposition."""
        if key.kind != "circuit" or key.number is None or key.site not in self.circuits:
            return key
        return key._replace(number=self.circuits[key.site][key.number])

    def _edge_columns(self) -> tuple[np.ndarray, ...]:
        if not self.blocks:
            return tuple(np.zeros(0, dtype=np.int64 if i < 2 else float) for i in range(5))
        columns = [np.concatenate(column) for column in zip(*self.blocks, strict=True)]
        n_nodes, n = len(self.number), self.n_inputs
        # COO to CSR adds up what several batches say of one edge.
        sums = [sparse.coo_array((x, (columns[0], columns[1])), (n_nodes, n_nodes)).tocsr() for x in columns[2:]]
        place = sums[2].tocoo()
        fro, to = place.coords
        weight, square, magnitude = (np.asarray(x[fro, to]).reshape(-1) for x in sums)
        mean = weight / n
        variance = spread(square, weight, n)
        return fro, to, mean, np.sqrt(variance / n), magnitude / n

    def _attributes(self, number: int, key: Key) -> dict[str, Any]:
        value, square, opened, importance = self.sums[number]
        n = self.n_inputs
        data: dict[str, Any] = {"kind": key.kind, "site": key.site, "title": key.id}
        for name, one in (("index", key.number), ("call", key.call), ("position", key.position)):
            if one is not None:
                data[name] = one
        data |= {"activation": float(value / n), "n": n}
        if n > 1:
            data["std"] = float(np.sqrt(spread(square, value, n)))
        if key.kind in UNITS:
            rows = n if key.position is not None else self.rows[key.site, key.call]
            data |= {"importance": float(importance / rows), "frequency": float(opened / rows)}
        if number in self.top and n > 1:
            data["top_inputs"] = "; ".join(f"{i}: {x:.4g}" for x, i in self.top[number])
        return data


def spread(square: Any, total: Any, n: int) -> Any:
    """Variance of a sample from its sums, with n - 1; what is rounding of the sums is 0."""
    found = square - total**2 / n
    return np.where(found > 1e-13 * square, found, 0) / max(n - 1, 1)


def add_accounts(graph: nx.DiGraph) -> None:
    """What the incoming edges of every target do not account for: constants that are no site's, and curvature."""
    for node, data in graph.nodes(data=True):
        if data["kind"] in (*UNITS, "output"):
            explained = sum(edge["weight"] for _, _, edge in graph.in_edges(node, data=True))
            data["unaccounted"] = data["activation"] - explained
