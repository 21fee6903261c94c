"""Do a graph's edges agree with interventions on the running model?

Every edge of a component, by gradient and along a path, against taking the component away. Per kind of effect also
what is left unaccounted, as a share of all activations.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor

import graphs
from benchmarks.graph_methods import CASES, ranged, spreads
from benchmarks.graph_sizes import timed
from benchmarks.report import table
from benchmarks.targets import make
from weightdecomp import Decomposition, NumericalWarning, decompose

_N_INPUTS = {"tms_5_2": 8, "tms_40_10": 8, "resid_mlp_1": 2, "transformer": 4}
"""Graphs of one input each; few where a pass a source is long."""


class Case(NamedTuple):
    """A decomposition with inputs to compare edges on, one graph each."""

    decomposition: Decomposition
    inputs: Sequence[Tensor]


def agreement(case: Case) -> dict[str, float]:
    """Edges of component sources against interventions, over graphs of single inputs."""
    pairs: dict[str, list[tuple[float, float]]] = {"gradient": [], "path": []}
    seconds, left = dict.fromkeys((*pairs, "removal"), 0.0), dict.fromkeys(pairs, (0.0, 0.0))
    for one in case.inputs:
        built = {}
        for effects in ("removal", *pairs):
            took, built[effects] = timed(lambda one=one, effects=effects: _built(case, one, effects))
            seconds[effects] += took
        for effects, found in pairs.items():
            found += _pairs(built[effects], built["removal"])
            left[effects] = tuple(a + b for a, b in zip(left[effects], _unaccounted(built[effects]), strict=True))
    figures: dict[str, float] = {"edges": len(pairs["gradient"]), "inputs": len(case.inputs)}
    for effects, found in pairs.items():
        weights, real = torch.tensor(found, dtype=torch.float64).T
        largest = float(real.abs().max())
        figures[f"{effects} correlation"] = float(torch.corrcoef(torch.stack([weights, real]))[0, 1])
        figures[f"{effects} worst error"] = float((weights - real).abs().max()) / largest
        figures[f"{effects} mean error"] = float((weights - real).abs().sum() / real.abs().sum())
        figures[f"{effects} unaccounted"] = left[effects][0] / left[effects][1]
    return figures | {f"{effects} s": took for effects, took in seconds.items()}


def _built(case: Case, one: Tensor, effects: str) -> nx.DiGraph:
    with warnings.catch_warnings():
        # What a path misses is one of the figures.
        warnings.simplefilter("ignore", NumericalWarning)
        return graphs.circuit_graph(
            case.decomposition, one, effects=effects, components="all", edges=None, positions=True
        )


def _unaccounted(graph: nx.DiGraph) -> tuple[float, float]:
    """Size of what edges do not account for, and of all that they should."""
    targets = [data for _, data in graph.nodes(data=True) if "unaccounted" in data]
    return sum(abs(data["unaccounted"]) for data in targets), sum(abs(data["activation"]) for data in targets)


def _pairs(graph: nx.DiGraph, real: nx.DiGraph) -> list[tuple[float, float]]:
    edges = {edge for edge in (*graph.edges, *real.edges) if graph.nodes[edge[0]]["kind"] == "component"}
    return [
        tuple(one.edges[edge]["weight"] if one.has_edge(*edge) else 0.0 for one in (graph, real))  # type: ignore[misc]
        for edge in sorted(edges)
    ]


def trained(task: str, seed: int, smoke: bool) -> tuple[Decomposition, Tensor]:
    """A trained toy target, decomposed, and unseen inputs."""
    target = make(task, seed, **({"cache": None, "steps": 5} if smoke else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        decomposition = decompose(
            target.model,
            target.batches(256 if smoke else 8_192, 1),
            sites=list(target.mechanisms),
            seed=seed,
            progress=False,
        )
    inputs = torch.cat(target.batches(256, 2))
    # One active feature alone interacts with none.
    return decomposition, inputs[target.active(inputs).sum(1) >= 2]


def agreements(seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """Agreement on every model."""
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for name, n in _N_INPUTS.items():
            if smoke and name in ("tms_40_10", "resid_mlp_1"):
                continue
            if name in CASES:
                case = CASES[name](seed, smoke)
                decomposition, inputs = case.decomposition, case.held_out
            else:
                decomposition, inputs = trained(name, seed, smoke)
            runs.setdefault(name, []).append(agreement(Case(decomposition, inputs[: 1 if smoke else n].split(1))))
        print(f"agreement, seed {seed}", file=sys.stderr)
    return {name: spreads(found) for name, found in runs.items()}


LEGEND = (
    "Edges against taking the source away in the running model, on single inputs: worst error as a share of the "
    "largest intervention, mean error as a share of their mean size. Unaccounted: what incoming edges leave of the "
    "activations, as a share of their size, what the model makes of constants that are no site's (position embeddings) "
    "included. Gradients are the default; on the transformer they miss most where queries and keys drive an attention "
    "that has made its choice, since a saturated softmax is flat: removals are exact there. Paths answer another "
    "question: they share out the change from nothing, so that a query and a key split what taking either away would "
    "do, and what passes a norm counts for more, since the norm divides by less on the way. More steps change nothing."
)


def agreement_table(agreed: Mapping[str, Any]) -> str:
    """A row for each model and kind of effects."""
    names = ("correlation", "mean error", "worst error", "unaccounted")
    rows = [
        [model, effects, ranged(one["edges"], ",.0f"), *(ranged(one[f"{effects} {name}"], ".3f") for name in names)]
        for model, one in agreed.items()
        for effects in ("gradient", "path")
    ]
    return table(["model", "effects", "edges", *names], rows)
