"""Cards: what a reader is told of one component: its circuit, what it reads and writes, names."""

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import Tensor

from weightdecomp import Decomposition
from weightdecomp.engine import Pieces

if TYPE_CHECKING:
    from graphs._build import Titles

_LONGEST = 64  # numbers of one picture


def cards(
    graph: nx.DiGraph,
    decomposition: Decomposition,
    input_titles: "Titles | None",
    output_titles: "Titles | None",
) -> None:
    """Add titles, circuits and pictures of weights to the nodes."""
    number = {member: i for i, group in enumerate(decomposition.groups) for member in group}
    pictures: dict[tuple[str, int], dict[str, str]] = {}
    for _, data in graph.nodes(data=True):
        titles = {"input": input_titles, "output": output_titles}.get(data["kind"])
        index = data.get("index")
        if titles is not None and index is not None:
            name = titles.get(index) if isinstance(titles, Mapping) else _at(titles, index)
            data["title"] = data["title"] if name is None else str(name)
        if data["kind"] not in ("component", "circuit"):
            continue
        member = data["site"], data["index"]
        data["circuit"] = data["index"] if data["kind"] == "circuit" else number[member]
        if member not in pictures:
            pictures[member] = _picture(decomposition, _members(decomposition, data))
        data |= pictures[member]


def _at(titles: Sequence[str], index: int) -> str | None:
    return titles[index] if index < len(titles) else None


def _members(decomposition: Decomposition, data: Mapping[str, Any]) -> tuple[str, list[int]]:
    """The components that a node stands for."""
    path, index = data["site"], data["index"]
    if data["kind"] == "component":
        return path, [index]
    return path, [c for site, c in decomposition.groups[index] if site == path]


def _picture(decomposition: Decomposition, members: tuple[str, list[int]]) -> dict[str, str]:
    """What components read and write: their main pair of directions, 64 signed bytes each at most, as base64."""
    path, indices = members
    own: Pieces = decomposition.parts[path].pieces
    mine = torch.isin(own.owner, torch.tensor(indices, device=own.owner.device))
    u, v = own.u[mine], own.v[mine]
    if len(u) > 1:
        q_u, r_u = torch.linalg.qr(u.T)
        q_v, r_v = torch.linalg.qr(v.T)
        left, _, right = torch.linalg.svd(r_u @ r_v.T)
        u, v = (q_u @ left[:, :1]).T, (q_v @ right[:1].T).T
    return {"reads": _bytes(v[0]), "writes": _bytes(u[0])}


def _bytes(x: Tensor) -> str:
    """At most 64 neighbouring means of a vector, scaled to -127 .. 127."""
    if len(x) > _LONGEST:
        x = torch.nn.functional.adaptive_avg_pool1d(x[None, None].float(), _LONGEST)[0, 0]
    top = float(x.abs().max())
    scaled = (x / top * 127).round() if top else torch.zeros_like(x)
    return base64.b64encode(scaled.to(torch.int8).cpu().numpy().tobytes()).decode()
