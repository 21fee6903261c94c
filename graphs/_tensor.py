"""Tensor: the graph of a bilinear layer from its weights alone; edges are exact entries of its third-order tensor."""

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from graphs._build import SCHEMA_VERSION
from graphs._influence import influences
from weightdecomp.engine import tensor_digest

_AT_ONCE = 1 << 24  # entries in memory


def bilinear_graph(
    w: Float[Tensor, "hidden d_in"],
    v: Float[Tensor, "_ _"],
    d: Float[Tensor, "d_out _"],
    *,
    edges: int | None = 10_000,
) -> nx.DiGraph:
    """The graph of y = d((w x) * (v x)), without any data.

    y_o is the sum over pairs i <= j of B[o, i, j] x_i x_j, with B[o, i, j] = sum_h d[o, h] (w[h, i] v[h, j] + w[h, j]
    v[h, i]) and half of that on the diagonal. A pair is a node "tensor/i.j"; its edges to the outputs are the entries
    of B, and its two inputs enter it with weight 1.

    Args:
        w: One factor of the layer.
        v: The other factor.
        d: What is written.
        edges: Largest number of entries kept, those of largest size; None keeps all that are not 0.

    Raises:
        ValueError: For shapes that do not fit together.
    """
    if w.shape != v.shape or w.ndim != 2 or d.ndim != 2 or d.shape[1] != w.shape[0]:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("w", w), ("v", v), ("d", d)))
        raise ValueError(f"expected w and v (hidden, d_in) and d (d_out, hidden), got {shapes}")
    entries, hidden, n_entries = _entries(w.detach(), v.detach(), d.detach(), edges)
    graph = nx.DiGraph()
    for i, j in sorted({(i, j) for _, i, j, _ in entries}):
        pair = f"tensor/{i}.{j}"
        data = {"kind": "pair", "site": "tensor", "layer": 1, "order": 1, "activation": 1.0}
        graph.add_node(pair, **data, left=i, right=j, title=f"x{i} x{j}" if i != j else f"x{i} squared")
        for one in {i, j}:
            name = f"input/{one}"
            graph.add_node(
                name, kind="input", site="input", index=one, layer=0, order=0, activation=1.0, title=f"x{one}"
            )
            graph.add_edge(name, pair, weight=1.0, share=0.5 if i != j else 1.0, evidence="exact")
    totals = dict.fromkeys(range(len(d)), 0.0)
    for o, _, _, x in entries:
        totals[o] += abs(x)
    for o in totals:
        data = {"kind": "output", "site": "output", "index": o, "layer": 2, "order": 2, "title": f"y{o}"}
        graph.add_node(f"output/{o}", **data, activation=1.0)
    for o, i, j, x in entries:
        share = abs(x) / (totals[o] + hidden[o])
        graph.add_edge(f"tensor/{i}.{j}", f"output/{o}", weight=x, share=share, evidence="exact")
    graph.graph.update(
        schema="weightdecomp.graph",
        schema_version=SCHEMA_VERSION,
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
