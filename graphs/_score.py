"""Score: what the model does on a graph's components alone, under every kind of ablation of all else."""

from collections.abc import Sequence
from typing import Any

import networkx as nx
import torch

from graphs._run import REGIMES, Damage, Stage, damage, staged
from graphs._select import Masks, check_same, check_single, masks, with_remainders
from weightdecomp import Decomposition
from weightdecomp.engine import Batch, batch_digest, size, tensors


def score(
    graph: nx.DiGraph,
    decomposition: Decomposition,
    inputs: Batch,
    *,
    regimes: Sequence[str] | None = None,
    reference: Batch | None = None,
    steps: int = 40,
    restarts: int = 3,
    minimality: bool = True,
    seed: int = 0,
) -> nx.DiGraph:
    """Run the model on a graph: its components stay on, everything else is ablated.

    Args:
        graph: A circuit graph, pruned or not.
        decomposition: The one it was built from.
        inputs: One batch.
        regimes: Some of "zero", "mean", "resample", "stochastic" and "adversarial"; None takes all that the reference
            allows.
        reference: Inputs whose values replace ablated ones under "mean" and "resample"; None takes `inputs`. Two at
            least.
        steps: Of the attack.
        restarts: Of the attack.
        minimality: Also ablate every single node beside what is ablated already; a pass each.
        seed: Of draws and the attack.

    Returns:
        A copy whose graph attribute `scores` has one record a figure: the recipe, the damage (0 unchanged, 1 as if
        everything were ablated) and its evidence. "completeness" ablates the graph's own components and leaves all
        else on: near 1 for a circuit that nothing can stand in for. Nodes get `minimality`, the damage that ablating
        the node adds, near 0 for a node that is not needed; the record "minimality" has the least and the most.

    Raises:
        ValueError: For a graph of another decomposition, an unknown regime, or too few reference inputs.

    Source:
        Faithfulness, completeness and minimality: Wang et al. 2022 (arXiv 2211.00593); several ablations of one
        circuit: Miller et al. 2024 (arXiv 2407.08734). Damage and the attack: this package.
    """
    check_same(graph, decomposition)
    check_budget(steps, restarts)
    stage = stage_for(decomposition, inputs, reference, regimes)
    chosen, other = _regimes(regimes, stage), inputs if reference is None else reference
    kept = masks(decomposition, graph, graph.nodes, dict(stage.pieces), stage.record)
    found = nx.DiGraph(graph)
    recipe: dict[str, Any] = {
        "n_inputs": size(stage.batch),
        "inputs": batch_digest([stage.batch]),
        "nodes": graph.number_of_nodes(),
        "edges": graph.number_of_edges(),
        "seed": seed,
    }
    records = []
    for regime in chosen:
        one = damage(stage, kept, regime, (steps, restarts), _generator(stage, seed))
        values = {"reference": batch_digest([other])} if regime in ("mean", "resample") else {}
        records.append({"figure": "damage", "regime": regime, **_plain(one), **values, **recipe})
    rest: Masks = {path: [1 - mask for mask in calls] for path, calls in kept.items()}
    one = damage(stage, rest, "zero", (steps, restarts), _generator(stage, seed))
    records.append({"figure": "completeness", "regime": "zero", **_plain(one), **recipe})
    if minimality:
        added = _add_minimality(found, decomposition, stage, kept)
        spread = {"least": min(added), "most": max(added)} if added else {}
        records.append(
            {
                "figure": "minimality",
                "regime": "zero",
                **spread,
                "evidence": "exact",
                "budget": "a pass a node",
                **recipe,
            }
        )
    found.graph = {**graph.graph, "scores": [*graph.graph.get("scores", []), *records]}
    return found


def stage_for(
    decomposition: Decomposition, inputs: Batch, reference: Batch | None, regimes: Sequence[str] | None
) -> Stage:
    """Inputs and reference, checked and run.

    Raises:
        ValueError: For bad inputs, an unknown regime, or too few reference inputs.
        TypeError: For a list of batches.
    """
    if isinstance(regimes, str):
        raise TypeError(f"expected a list of regimes, got the string {regimes!r}; write [{regimes!r}]")
    for regime in regimes or ():
        if regime not in REGIMES:
            raise ValueError(f"unknown regime {regime!r}; choose from {list(REGIMES)}")
    for name, one in (("inputs", inputs), ("reference", reference)):
        check_single(name, one)
    (batch,) = decomposition.read([inputs])
    (other,) = decomposition.read([inputs if reference is None else reference])
    enough = size(other) >= 2
    if not enough and {"mean", "resample"} & set(regimes or ()):
        raise ValueError(
            f"mean and resample take values from other inputs, got {size(other)}; pass reference= with two or more"
        )
    return staged(decomposition, with_remainders(decomposition), batch, other if enough else None)


def check_budget(steps: int, restarts: int) -> None:
    """Refuse an attack that takes no step.

    Raises:
        ValueError: For a number below 1.
    """
    for name, one in (("steps", steps), ("restarts", restarts)):
        if one < 1:
            raise ValueError(f"{name} of the attack must be at least 1, got {one}")


def _regimes(regimes: Sequence[str] | None, stage: Stage) -> Sequence[str]:
    if regimes is not None:
        return regimes
    return REGIMES if stage.reference is not None else [one for one in REGIMES if one not in ("mean", "resample")]


def _generator(stage: Stage, seed: int) -> torch.Generator:
    return torch.Generator(device=tensors(stage.batch)[0].device).manual_seed(seed)


def _plain(one: Damage) -> dict[str, Any]:
    return {name: value for name, value in one._asdict().items() if value is not None}


def _add_minimality(graph: nx.DiGraph, decomposition: Decomposition, stage: Stage, kept: Masks) -> list[float]:
    """Set what ablating each node adds to the damage, and return it."""
    added, rng = [], _generator(stage, 0)
    whole = damage(stage, kept, "zero", (0, 0), rng).damage
    for node, data in graph.nodes(data=True):
        if data["kind"] in ("component", "circuit", "remainder"):
            own = masks(decomposition, graph, [node], dict(stage.pieces), stage.record)
            without = {
                path: [(a - b).clamp_min(0) for a, b in zip(kept[path], own[path], strict=True)] for path in kept
            }
            added.append(damage(stage, without, "zero", (0, 0), rng).damage - whole)
            graph.nodes[node]["minimality"] = added[-1]
    return added
