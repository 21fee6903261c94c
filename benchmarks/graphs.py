"""What do circuit graphs cost, do their edges agree with interventions, and which method's graph is simplest?

Sizes: build, prune, score, modules, paths, write and read at 300/2k, 3k/30k and 10k/100k nodes/edges, of random
ReLU networks cut into singular pieces, all of them shown. Agreement: every edge of component sources, by gradient
and along a path, against taking the source away in the running model. Methods: see `graph_methods`.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor, nn

import graphs
from benchmarks.closed_form import closed_form, svd
from benchmarks.graph_methods import CASES, GRAPHED, STEPS, methods_table, ranged, spreads
from benchmarks.graph_methods import measured as of_methods
from benchmarks.report import RESULTS, provenance, table, write, write_json
from benchmarks.targets import make, one_thread
from weightdecomp import Decomposition, NumericalWarning, decompose

SUFFIXES = (".json", ".graphml", ".gexf", ".cyjs", ".dot", ".ct.json", ".html")
INPUTS = 32


class Size(NamedTuple):
    """A network whose graph has about this many nodes, and this many edges are kept."""

    nodes: int
    edges: int
    widths: tuple[int, ...]


SIZES = (
    Size(300, 2_000, (40, *[55] * 4, 20)),
    Size(3_000, 30_000, (100, *[480] * 6, 20)),
    Size(10_000, 100_000, (200, *[1_080] * 9, 20)),
)
SMOKE_SIZES = (Size(30, 60, (6, 8, 8, 3)),)


def network(size: Size, seed: int) -> nn.Module:
    """A ReLU network with random weights."""
    rng = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in zip(size.widths, size.widths[1:], strict=False):
        layer = nn.utils.skip_init(nn.Linear, d_in, d_out)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(d_out, d_in, generator=rng) * (2 / d_in) ** 0.5)
            layer.bias.copy_(torch.randn(d_out, generator=rng) / 10)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call, and what it returned."""
    gc.collect()
    start = time.process_time()
    found = function()
    return time.process_time() - start, found


def sized(size: Size, seeds: Sequence[int]) -> dict[str, Any]:
    """All times and file sizes of one size; one run a seed."""
    runs = [_sized(size, seed) for seed in seeds]
    return spreads(runs)


def _sized(size: Size, seed: int) -> dict[str, float]:
    model = network(size, seed)
    x = torch.randn(INPUTS, size.widths[0], generator=torch.Generator().manual_seed(seed + 100))
    decomposition = closed_form(model, x, svd, active=0.1)
    found: dict[str, float] = {}
    found["build s"], graph = timed(lambda: graphs.circuit_graph(decomposition, x, components="all", edges=size.edges))
    found["prune s"], _ = timed(lambda: graphs.prune(graph, edges=size.edges // 2))
    found["nodes"], found["edges"] = len(graph), graph.number_of_edges()
    regimes = ["zero", "mean", "resample", "stochastic", "adversarial"]
    options: dict[str, Any] = {"regimes": regimes, "steps": 20, "minimality": False}
    found["score s"], graph = timed(lambda: graphs.score(graph, decomposition, x, **options))
    found["modules s"], graph = timed(lambda: graphs.modules(graph, resolutions=[1.0], seeds=1, nulls=0))
    found["paths s"], _ = timed(lambda: graphs.paths(graph, 10))
    with tempfile.TemporaryDirectory(prefix="graphs_") as folder:
        for suffix in SUFFIXES:
            path = Path(folder) / f"circuit{suffix}"
            found[f"write {suffix} s"], _ = timed(lambda path=path: graphs.write(graph, path))
            found[f"size {suffix} MB"] = path.stat().st_size / 1e6
            if suffix != ".html":
                found[f"read {suffix} s"], _ = timed(lambda path=path: graphs.read(path))
    return found


# ------------------------------------------------------------ agreement with interventions


class Case(NamedTuple):
    """A decomposition with inputs to compare edges on, one graph each."""

    decomposition: Decomposition
    inputs: Sequence[Tensor]


def agreement(case: Case) -> dict[str, float]:
    """Edges of component sources against interventions, over graphs of single inputs."""
    pairs: dict[str, list[tuple[float, float]]] = {"gradient": [], "path": []}
    seconds = dict.fromkeys((*pairs, "removal"), 0.0)
    for one in case.inputs:
        options: dict[str, Any] = {"components": "all", "edges": None, "positions": True}
        took, real = timed(
            lambda one=one, o=options: graphs.circuit_graph(case.decomposition, one, effects="removal", **o)
        )
        seconds["removal"] += took
        for effects, found in pairs.items():
            took, graph = timed(
                lambda one=one, o=options, e=effects: graphs.circuit_graph(case.decomposition, one, effects=e, **o)
            )
            seconds[effects] += took
            found += _pairs(graph, real)
    figures: dict[str, float] = {"edges": len(pairs["gradient"]), "inputs": len(case.inputs)}
    for effects, found in pairs.items():
        weights, real = torch.tensor(found, dtype=torch.float64).T
        largest = float(real.abs().max())
        figures[f"{effects} correlation"] = float(torch.corrcoef(torch.stack([weights, real]))[0, 1])
        figures[f"{effects} worst error"] = float((weights - real).abs().max()) / largest
        figures[f"{effects} mean error"] = float((weights - real).abs().sum() / real.abs().sum())
    return figures | {f"{effects} s": took for effects, took in seconds.items()}


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
    """Agreement on every model; inputs of a graph are few where a pass a source is long."""
    n_inputs = {"tms_5_2": 8, "tms_40_10": 8, "resid_mlp_1": 2}
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for task, n in list(n_inputs.items())[: 1 if smoke else None]:
            decomposition, inputs = trained(task, seed, smoke)
            runs.setdefault(task, []).append(agreement(Case(decomposition, inputs[: 1 if smoke else n].split(1))))
        case = CASES["transformer"](seed, smoke)
        own = Case(case.decomposition, case.held_out[: 1 if smoke else 4].split(1))
        runs.setdefault("transformer", []).append(agreement(own))
        print(f"agreement, seed {seed}", file=sys.stderr)
    return {name: spreads(found) for name, found in runs.items()}


# ------------------------------------------------------------ the whole run


def sizes(seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """Times and file sizes at every size."""
    return {f"{one.nodes:,} / {one.edges:,}": sized(one, seeds) for one in (SMOKE_SIZES if smoke else SIZES)}


PARTS: Mapping[str, Callable[[Sequence[int], bool], dict[str, Any]]] = {
    "sizes": sizes,
    "agreement": agreements,
    **{name: partial(of_methods, name) for name in CASES},
}


def measured(part: str, smoke: bool) -> dict[str, Any]:
    """One part's figures, with where and how they were measured."""
    seeds = [0] if smoke else [0, 1, 2]
    return {"figures": PARTS[part](seeds, smoke), "seeds": seeds, "provenance": provenance()}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result, each with what its figures are."""
    blocks = []
    for part, one in result.items():
        title = part.capitalize() if part in _LEGENDS else f"Methods on {part}"
        blocks += [f"## {title}", _TABLES.get(part, methods_table)(one["figures"])]
        blocks += [" ".join(text for text in (_LEGENDS.get(part), _measured(one)) if text)]
        if part == "agreement":
            blocks.append(_METHODS)
    return "\n\n".join(blocks) + "\n"


def _measured(one: Mapping[str, Any]) -> str:
    """Seeds, machine and commit of one part."""
    where, seeds = one["provenance"], one["seeds"]
    runs = f"Medians over seeds {seeds}, ranges in brackets" if len(seeds) > 1 else f"Seed {seeds[0]} alone"
    return f"{runs}. {where['machine']}, torch {where['torch']}, {where['date'][:10]}, commit {where['commit'][:9]}."


_LEGENDS = {
    "sizes": "CPU seconds of one thread, of random ReLU networks cut into singular pieces. Build: gradient effects on "
    f"{INPUTS} inputs. Score: five regimes, the attack with 20 steps x 3 restarts. Writes read back and compare.",
    "agreement": "Edges against taking the source away in the running model: worst error as a share of the largest "
    "intervention, mean error as a share of their mean size.",
}
_METHODS = (
    "The tables of methods below: every method's units at the same sites of the same models; graphs of "
    f"{GRAPHED} held-out inputs with all edges; {STEPS} training steps where there is training. Of a method's grid, "
    "every second setting where it is trained, the one counts that has the fewest active units within the tolerance of "
    "damage .02, else the least damage. Edges that carry 90 and 99 % of the influence on the outputs, of all edges; "
    "modularity Q, and Q with weights shuffled between the same two layers; influence through what the units do not "
    "explain, sites that the method leaves as they are included; damage of the model run on the units alone; active "
    "units per row, summed over sites. Random directions: as many active as the weight decomposition has. Few edges "
    "mean little where the damage is large or the influence goes through remainders."
)


def _sizes_table(sizes: Mapping[str, Any]) -> str:
    names = list(next(iter(sizes.values())))
    rows = [[name, *(ranged(one[name], ".3g") for one in sizes.values())] for name in names]
    return table(["nodes / edges", *sizes], rows)


def _agreement_table(agreed: Mapping[str, Any]) -> str:
    names = ("correlation", "mean error", "worst error")
    head = ["model", "edges", *(f"{effects} {name}" for effects in ("gradient", "path") for name in names)]
    rows = [
        [model, ranged(one["edges"], ",.0f"), *(ranged(one[name], ".3f") for name in head[2:])]
        for model, one in agreed.items()
    ]
    return table(head, rows)


_TABLES = {"sizes": _sizes_table, "agreement": _agreement_table}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graphs", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny targets, in seconds; figures mean nothing")
    parser.add_argument("--only", choices=list(PARTS), help="run this part and keep the others' last results")
    given = parser.parse_args(arguments)
    path = RESULTS / "graphs.json"
    result = json.loads(path.read_text()) if given.only and not given.smoke and path.exists() else {}
    with one_thread():
        for part in [given.only] if given.only else PARTS:
            result[part] = measured(part, given.smoke)
    result = {part: result[part] for part in PARTS if part in result}
    if not given.smoke:
        write_json(path, result)
        write(RESULTS / "graphs.md", markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
