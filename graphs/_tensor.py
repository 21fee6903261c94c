"""Tensor: the graph of a bilinear layer from its weights alone; edges are exact entries of its third-order tensor."""

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from bilinear import Layer
from graphs._build import SCHEMA_VERSION
from graphs._influence import influences
from weightdecomp.engine import package_version, tensor_digest

_AT_ONCE = 1 << 24  # entries in memory
_ONE = "one"  # the constant coordinate


def bilinear_graph(layer: Layer, *, edges: int | None = 10_000) -> nx.DiGraph:
    """The graph of a bilinear layer, without any data.

    In the layer's coordinates x~ every output is the sum over pairs i <= j of B[o, i, j] x~_i x~_j, with B[o, i, j] =
    sum_h d[o, h] (w[h, i] v[h, j] + w[h, j] v[h, i]) and half of that on the diagonal. A pair is a node "tensor/i.j"
    of input numbers; its edges to the outputs are the entries of B, and what it multiplies enters it with weight 1.
    Biases and a skip path are pairs with the constant 1, which is the node "input/one". Behind a norm the inputs are
    normalised ones.

    Args:
        layer: The layer; `bilinear.read(module)` reads it, `bilinear.Layer(w, v, d)` takes matrices.
        edges: Largest number of entries kept, those of largest size; None keeps all that are not 0.

    Raises:
        TypeError: For what is no layer.
        ValueError: For a skip path around a norm, which no pair of normalised inputs is, or edges below 0.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"expected a bilinear.Layer, got {type(layer).__name__}; see bilinear.read and bilinear.Layer")
    if layer.norm is not None and layer.skip is not None:
        raise ValueError(
            "a skip path around a norm is no function of normalised inputs; leave it out with "
            "dataclasses.replace(layer, skip=None)"
        )
    if edges is not None and edges < 0:
        raise ValueError(f"edges must be at least 0 or None, got {edges}")
    w, v, d = (x.detach() for x in layer.factors())
    entries, hidden, n_entries = _entries(w, v, d, edges)
    graph = nx.DiGraph()
    for i, j in sorted({(i, j) for _, i, j, _ in entries}):
        _add_pair(graph, layer, i, j)
    totals = dict.fromkeys(range(len(d)), 0.0)
    for o, _, _, x in entries:
        totals[o] += abs(x)
    for o in totals:
        data = {"kind": "output", "site": "output", "index": o, "layer": 2, "order": 2, "title": f"y{o}"}
        graph.add_node(f"output/{o}", **data, activation=1.0)
    for o, i, j, x in entries:
        share = float(abs(x) / (totals[o] + hidden[o]))
        pair = f"tensor/{_number(layer, i)}.{_number(layer, j)}"
        graph.add_edge(pair, f"output/{o}", weight=x, share=share, evidence="exact")
    graph.graph.update(
        schema="weightdecomp.graph",
        schema_version=SCHEMA_VERSION,
        package_version=package_version(),
        model=tensor_digest({"w": w, "v": v, "d": d}),
        effects="tensor",
        inputs={"n": 0},
        hidden_edges=n_entries - len(entries),
        pruning=[],
        scores=[],
    )
    for node, influence in influences(graph).items():
        graph.nodes[node]["influence"] = influence
    return graph


def _number(layer: Layer, coordinate: int) -> int | str:
    """Number of the input that a coordinate is; the constant, where there is one, comes first."""
    if not layer.affine:
        return coordinate
    return coordinate - 1 if coordinate else _ONE


def _add_pair(graph: nx.DiGraph, layer: Layer, i: int, j: int) -> None:
    """A pair of coordinates, and what enters it."""
    left, right = (_number(layer, one) for one in (i, j))
    pair = f"tensor/{left}.{right}"
    titles = [f"x{one}" for one in (left, right) if one != _ONE]
    title = f"{titles[0]} squared" if titles and left == right else " ".join(titles) or "1"
    data = {"kind": "pair", "site": "tensor", "layer": 1, "order": 1, "activation": 1.0, "title": title}
    numbers = {name: one for name, one in (("left", left), ("right", right)) if one != _ONE}
    graph.add_node(pair, **data, **numbers)
    for one in {left, right}:
        own = {"kind": "bias", "title": "1"} if one == _ONE else {"kind": "input", "title": f"x{one}", "index": one}
        graph.add_node(f"input/{one}", site="input", layer=0, order=0, activation=1.0, **own)
        graph.add_edge(f"input/{one}", pair, weight=1.0, share=0.5 if i != j else 1.0, evidence="exact")


def _entries(
    w: Tensor, v: Tensor, d: Tensor, most: int | None
) -> tuple[list[tuple[int, int, int, float]], np.ndarray, int]:
    """The largest entries (output, i, j, value), i <= j; per output the size of all others; how many there are."""
    upper = torch.ones(w.shape[1], w.shape[1], device=w.device).triu().bool()
    at, values, sizes, n = [], [], np.zeros(len(d)), 0
    step = max(1, _AT_ONCE // upper.numel())
    for start in range(0, len(d), step):
        tensor = torch.einsum("oh,hi,hj->oij", d[start : start + step], w, v)
        diagonal = torch.diag_embed(tensor.diagonal(dim1=1, dim2=2))
        whole = torch.where(upper, tensor + tensor.mT - diagonal, 0)
        sizes[start : start + len(whole)] = whole.abs().sum((1, 2)).double().cpu().numpy()
        n += int(whole.count_nonzero())
        place = whole.flatten().abs().topk(min(most, whole.numel())).indices if most is not None else None
        place = whole.flatten().nonzero()[:, 0] if place is None else place
        found = whole.flatten()[place]
        at.append(torch.stack(torch.unravel_index(place[found != 0], whole.shape), 1) + torch.tensor([start, 0, 0]))
        values.append(found[found != 0])
    places, numbers = torch.cat(at), torch.cat(values)
    order = numbers.abs().argsort(descending=True, stable=True)[:most]
    entries = [(*place, x) for place, x in zip(places[order].tolist(), numbers[order].tolist(), strict=True)]
    for o, _, _, x in entries:
        sizes[o] -= abs(x)
    return entries, np.where(sizes > 1e-9 * (sizes.max(initial=0.0) + 1e-30), sizes, 0), n
