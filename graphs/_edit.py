"""Edit: the model without some nodes of a graph, for one run or in the weights themselves."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import nn

from graphs._select import check_same, check_single, known, masks, part, with_remainders
from weightdecomp import Decomposition
from weightdecomp.engine import Batch, Parts, Pieces, Selection, masked, recorded


def ablate(graph: nx.DiGraph, ids: Iterable[str], decomposition: Decomposition, inputs: Batch) -> Any:
    """The target's output with the components of some nodes off, at their positions, and everything else on.

    Args:
        graph: A circuit graph.
        ids: Nodes; components, circuits or remainders.
        decomposition: The one it was built from.
        inputs: One batch.

    Raises:
        ValueError: For unknown ids, inputs and outputs (which cannot be ablated), or another decomposition.
        TypeError: For a list of batches.
    """
    check_same(graph, decomposition)
    check_single("inputs", inputs)
    chosen = known(graph, ids)
    for node in chosen:
        if part(decomposition, node, graph.nodes[node]) is None:
            raise ValueError(f"node {node!r} is of kind {graph.nodes[node].get('kind')!r}, which cannot be ablated")
    (batch,) = decomposition.read([inputs])
    with torch.no_grad():
        pieces = with_remainders(decomposition)
        record = recorded(decomposition.target, batch, decomposition.sites)
        off = masks(decomposition, graph, chosen, pieces, record)
        on = {path: [1 - mask for mask in calls] for path, calls in off.items()}
        return masked(decomposition.target, batch, decomposition.sites, pieces, on)


class Edited(NamedTuple):
    """An edited copy of a model.

    Attributes:
        model: The copy.
        decomposition: The same components of it, as far as they are left; for `circuit_graph`.
    """

    model: nn.Module
    decomposition: Decomposition


def edit(
    graph: nx.DiGraph,
    decomposition: Decomposition,
    *,
    remove: Iterable[str] = (),
    scale: Mapping[str, float] | None = None,
) -> Edited:
    """A copy of the target whose weights have the components of some nodes removed or scaled, everywhere.

    Args:
        graph: A circuit graph.
        decomposition: The one it was built from.
        remove: Nodes whose components go.
        scale: Nodes with the factor for their components.

    Raises:
        ValueError: For unknown ids, nodes that are no components, or another decomposition.
    """
    check_same(graph, decomposition)
    factors: dict[Selection, float] = {}
    for node, factor in [*((one, 0.0) for one in known(graph, remove)), *(scale or {}).items()]:
        known(graph, [node])
        one = part(decomposition, node, graph.nodes[node])
        if one is None or graph.nodes[node]["kind"] == "remainder":
            raise ValueError(
                f"node {node!r} is of kind {graph.nodes[node].get('kind')!r}; only components can be edited"
            )
        # Nodes of one component at several positions are one edit.
        factors |= {(one.site, c): factor for c in one.components}
    model = decomposition.edit(scale=factors)
    return Edited(model, _rebound(decomposition, model, factors))


def _rebound(decomposition: Decomposition, model: nn.Module, factors: Mapping[Selection, float]) -> Decomposition:
    parts = {}
    for path, old in decomposition.parts.items():
        by_component = torch.ones(old.pieces.n, dtype=old.pieces.u.dtype, device=old.pieces.u.device)
        for member, factor in factors.items():
            if isinstance(member, tuple) and member[0] == path:
                by_component[member[1]] = factor
        own = Pieces(old.pieces.v, old.pieces.u * by_component[old.pieces.owner, None], old.pieces.owner)
        parts[path] = Parts(own, old.thresholds, old.frequencies, old.start)
    sites = [dataclasses.replace(site, module=model.get_submodule(site.path)) for site in decomposition.sites]
    one = decomposition
    return Decomposition(
        model,
        sites,
        one.skipped,
        parts,
        one.divergence,
        one.tolerance,
        one.config,
        one.outcome,
        one.groups,
        one.group_frequencies,
    )
