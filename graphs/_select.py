"""Select: which parts of a decomposition the nodes of a graph stand for."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from graphs._build import fingerprint
from weightdecomp import Decomposition
from weightdecomp.engine import Pieces, Record, Site


def check_same(graph: nx.DiGraph, decomposition: Decomposition) -> None:
    """Refuse a graph of another decomposition.

    Raises:
        ValueError: If it is of another one, or of none.
    """
    expected = fingerprint(decomposition)
    came = graph.graph.get("decomposition")
    if came != expected:
        raise ValueError(
            f"the graph is of another decomposition ({str(came)[:12]}..., this one is {expected[:12]}...); "
            "build it anew with circuit_graph, or load the decomposition that it was built from"
        )


def known(graph: nx.DiGraph, ids: Iterable[str]) -> list[str]:
    """The ids, if the graph has them all.

    Raises:
        ValueError: For an unknown id, naming the nearest ones.
        TypeError: For a single string.
    """
    if isinstance(ids, str):
        raise TypeError(f"expected a list of node ids, got the string {ids!r}; write [{ids!r}]")
    found = list(ids)
    for one in found:
        if one not in graph:
            near = difflib.get_close_matches(str(one), list(graph), n=3, cutoff=0.0)
            raise ValueError(f"the graph has no node {one!r}; did you mean one of {near}?")
    return found


def check_single(name: str, inputs: object) -> None:
    """Refuse a list of batches where one is run.

    Raises:
        TypeError: For a list.
    """
    if isinstance(inputs, list):
        raise TypeError(
            f"{name} must be one batch, got a list of {len(inputs)}; pass one of them, or all of them joined"
        )


class Part(NamedTuple):
    """Where a node's components are.

    Attributes:
        site: Module path.
        components: Their numbers; the number of the remainder follows on those of the components.
        call: Number of the call, or None for all.
        position: Position, or None for all.
    """

    site: str
    components: list[int]
    call: int | None
    position: int | None


def part(decomposition: Decomposition, node: str, data: dict) -> Part | None:
    """What a node stands for; None for inputs, outputs and biases, which are no components."""
    kind, site = data.get("kind"), data.get("site", "")
    if kind not in ("component", "circuit", "remainder"):
        return None
    n = decomposition.parts[decomposition.site(site).path].pieces.n
    if kind == "remainder":
        members = [n]
    elif kind == "component":
        members = [decomposition.component(site, data["index"]).index]
    else:
        members = [c for path, c in decomposition.groups[data["index"]] if path == site]
    return Part(site, members, data.get("call"), data.get("position"))


def with_remainders(decomposition: Decomposition) -> dict[str, Pieces]:
    """Components of every site, and its remainder as one more where that is beyond rounding."""
    found, left = {}, decomposition.ablation().remainders
    for path, parts in decomposition.parts.items():
        own = parts.pieces
        if path in left:
            u, s, v = torch.linalg.svd(left[path], full_matrices=False)
            rank = int((s > 1e-7 * s[0]).sum())
            owner = torch.full((rank,), own.n, dtype=own.owner.dtype, device=own.owner.device)
            rest = Pieces(v[:rank], (u[:, :rank] * s[:rank]).T, owner)
            own = Pieces(*(torch.cat(pair) for pair in zip(own, rest, strict=True)))
        found[path] = own
    return found


Masks = dict[str, list[Float[Tensor, "*batch component"]]]


def masks(
    decomposition: Decomposition, graph: nx.DiGraph, ids: Iterable[str], pieces: dict[str, Pieces], record: Record
) -> Masks:
    """1 for what the nodes stand for and 0 elsewhere, in the shapes of a recorded pass.

    Raises:
        ValueError: If the inputs have fewer positions than the graph.
    """
    found: Masks = {}
    for site in decomposition.sites:
        own = pieces[site.path]
        found[site.path] = [_nothing(site, operands, own) for operands in record.operands[site.path]]
    for node in ids:
        one = part(decomposition, node, graph.nodes[node])
        if one is None or max(one.components, default=-1) >= pieces[one.site].n:
            continue
        calls = found[one.site]
        for mask in calls if one.call is None else calls[one.call : one.call + 1]:
            rows = mask if one.position is None else _at(mask, one.position, node)
            rows[..., one.components] = 1
    return found


def _nothing(site: Site, operands: tuple, own: Pieces) -> Tensor:
    shape = site.read(operands, own.v[:1]).shape[:-1]
    return torch.zeros(*shape, own.n, dtype=own.v.dtype, device=own.v.device)


def _at(mask: Tensor, position: int, node: str) -> Tensor:
    # Positions are flattened after the inputs; rows that no single input owns have no axis of inputs.
    rows = mask.reshape(len(mask), -1, mask.shape[-1]) if mask.ndim > 2 else mask[None]
    if position >= rows.shape[1]:
        raise ValueError(f"node {node!r} is at position {position}, but the inputs have {rows.shape[1]} positions")
    return rows[:, position]
