"""What do circuit graphs cost, do their edges agree with interventions, and which method's graph is simplest?

Sizes: build, prune, score, modules, paths, write and read at 300/2k, 3k/30k and 10k/100k nodes/edges, of random
ReLU networks cut into singular pieces, all of them shown. Agreement: every edge of component sources,
by gradient and along a path, against taking the source away in the running model. Simplicity: edges needed for 90
and 99 % of the influence and modularity above its null, of the weight decomposition and of activation bases with
as many components active.
"""

import argparse
import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor, nn

import graphs
from benchmarks.closed_form import ACTIVATION_BASES, closed_form, svd
from benchmarks.report import RESULTS, provenance, spread, table, write, write_json
from benchmarks.speed import Transformer
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
    keys = dict.fromkeys(key for run in runs for key in run)
    return {key: spread([run[key] for run in runs])._asdict() for key in keys}


def _runs(size: Size, seeds: Sequence[int]) -> dict[str, Any]:
    """All seeds, or the first alone where one takes minutes."""
    print(f"{size.nodes:,} nodes", file=sys.stderr)
    return sized(size, seeds[:1] if size.nodes >= 10_000 else seeds)


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


def transformer(seed: int, smoke: bool) -> tuple[Decomposition, Tensor]:
    """A small transformer of random weights, cut into singular pieces, and token ids."""
    d, layers, vocabulary = (8, 1, 16) if smoke else (16, 2, 64)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        model = Transformer(d, layers, vocabulary).eval()
    tokens = torch.randint(vocabulary, (16, 6), generator=torch.Generator().manual_seed(seed))
    return closed_form(model, tokens, svd, sites=["blocks.*"]), tokens


# ------------------------------------------------------------ simplicity


def simplicity(
    decomposition: Decomposition, inputs: Tensor, seeds: int, edges: int | None
) -> dict[str, dict[str, float]]:
    """Edges needed and modularity above its null, of ours and of every activation basis at the same number active.

    Where `edges` is given, only that many are kept; what the others would carry is in the figures too.
    """
    importances = decomposition.importances(inputs)
    active = {path: float((gate > 0).sum(-1).double().mean()) for path, gate in importances.items()}
    sites = [site.path for site in decomposition.sites]
    candidates: dict[str, Decomposition] = {"weight decomposition": decomposition}
    for name, cut in ACTIVATION_BASES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ICA warns where it has not converged; its graph counts as it is
            candidates[name] = closed_form(decomposition.target, inputs, cut, active=active, sites=sites)
    found = {}
    for name, one in candidates.items():
        graph = graphs.circuit_graph(one, inputs, edges=edges)
        measured = graphs.complexity(graph, seeds=seeds)._asdict()
        shares = {target: 0.0 for _, target in graph.edges}
        for _, target, share in graph.edges(data="share"):
            shares[target] += share
        hidden = sum((1 - share) * graph.nodes[target]["influence"] for target, share in shares.items())
        rest = sum(d["influence"] for _, d in graph.nodes(data=True) if d["kind"] == "remainder")
        found[name] = {key: float(x) for key, x in measured.items()} | {"through remainders": rest, "hidden": hidden}
    return found


# ------------------------------------------------------------ the whole run


def measured(smoke: bool) -> dict[str, Any]:
    """All figures, with where and how they were measured."""
    sizes, seeds = (SMOKE_SIZES, [0]) if smoke else (SIZES, [0, 1, 2])
    tasks = ["tms_5_2"] if smoke else ["tms_5_2", "tms_40_10", "resid_mlp_1"]
    agreed: dict[str, list[dict[str, float]]] = {}
    simple: dict[str, list[dict[str, dict[str, float]]]] = {}
    large = "resid_mlp_1"  # a thousand inputs: one seed, fewer inputs, and the strongest edges only
    for task in tasks:
        for seed in seeds if task != large else seeds[:1]:
            decomposition, inputs = trained(task, seed, smoke)
            n = 1 if smoke else 2 if task == large else 8
            agreed.setdefault(task, []).append(agreement(Case(decomposition, inputs[:n].split(1))))
            options = (inputs[:64], 2, 20_000) if task == large else (inputs, 2 if smoke else 10, None)
            simple.setdefault(task, []).append(simplicity(decomposition, *options))
            print(f"{task}, seed {seed}", file=sys.stderr)
    for seed in seeds:
        decomposition, tokens = transformer(seed, smoke)
        agreed.setdefault("transformer", []).append(
            agreement(Case(decomposition, tokens[: 1 if smoke else 2].split(1)))
        )
    return {
        "sizes": {f"{size.nodes:,} / {size.edges:,}": _runs(size, seeds) for size in sizes},
        "agreement": {name: _spreads(runs) for name, runs in agreed.items()},
        "simplicity": {
            task: {method: _spreads([run[method] for run in runs]) for method in runs[0]}
            for task, runs in simple.items()
        },
        "inputs": INPUTS,
        "seeds": seeds,
        "provenance": provenance(),
    }


def _spreads(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {key: spread([run[key] for run in runs])._asdict() for key in runs[0]}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result."""
    blocks = [_sizes_table(result["sizes"]), _agreement_table(result["agreement"])]
    blocks += [f"{task}:\n\n{_simplicity_table(found)}" for task, found in result["simplicity"].items()]
    where = result["provenance"]
    legend = (
        f"Medians over seeds {result['seeds']} (ranges in the JSON; the residual MLP and the largest size have one "
        f"seed); CPU seconds of one thread. Build: gradient effects on {result['inputs']} inputs. Score: five regimes, "
        "the attack with 20 steps x 3 restarts. Every write reads back and compares. Agreement: worst error as a share "
        "of the largest intervention, mean error as a share of their mean size. Simplicity: all methods have as many "
        "components active per input as the weight decomposition; what they leave inactive flows through remainders. "
        "Hidden: influence of edges beyond the 20,000 strongest of the residual MLP, which no other column counts.\n\n"
        f"{where['machine']}, torch {where['torch']}, {where['date'][:10]}, commit {where['commit'][:9]}."
    )
    return "\n\n".join([*blocks, legend]) + "\n"


def _sizes_table(sizes: Mapping[str, Any]) -> str:
    names = list(next(iter(sizes.values())))
    rows = [[name, *(f"{one[name]['median']:.3g}" for one in sizes.values())] for name in names]
    return table(["nodes / edges", *sizes], rows)


def _agreement_table(agreed: Mapping[str, Any]) -> str:
    names = ("correlation", "mean error", "worst error")
    head = ["model", "edges", *(f"{effects} {name}" for effects in ("gradient", "path") for name in names)]
    rows = [
        [model, f"{one['edges']['median']:,.0f}", *(f"{one[name]['median']:.4f}" for name in head[2:])]
        for model, one in agreed.items()
    ]
    return table(head, rows)


def _simplicity_table(found: Mapping[str, Any]) -> str:
    head = ["method", "edges_90", "edges_99", "q", "q_null", "q_excess", "through remainders", "hidden"]
    rows = []
    for method, one in found.items():
        counts = [f"{one[name]['median']:.0f}" for name in head[1:3]]
        rows.append([method, *counts, *(f"{one[name]['median']:.3f}" for name in head[3:])])
    return table(["method", "edges for 90 %", "99 %", "Q", "null", "Q - null", "through remainders", "hidden"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graphs", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny targets, in seconds; figures mean nothing")
    smoke = parser.parse_args(arguments).smoke
    with one_thread():
        result = measured(smoke)
    if not smoke:
        write_json(RESULTS / "graphs.json", result)
        write(RESULTS / "graphs.md", markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
