"""What do circuit graphs cost? Times and file sizes at 300/2k, 3k/30k and 10k/100k nodes/edges.

Graphs are of random ReLU networks cut into singular pieces, all of them shown.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import graphs
from benchmarks.closed_form import closed_form, svd
from benchmarks.graph_methods import ranged, spreads
from benchmarks.report import peak_bytes, reset_peak, table

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


def sizes(seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """Times, file sizes and peak memory at every size; one run a seed."""
    found = {}
    for size in SMOKE_SIZES if smoke else SIZES:
        found[f"{size.nodes:,} / {size.edges:,}"] = spreads([sized(size, seed) for seed in seeds])
        print(f"{size.nodes:,} nodes", file=sys.stderr)
    return found


def sized(size: Size, seed: int) -> dict[str, float]:
    """Figures of one graph."""
    reset_peak()
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
    found["peak MB"] = peak_bytes() / 1e6
    return found


LEGEND = (
    "CPU seconds of one thread, of random ReLU networks cut into singular pieces. Build: gradient effects on "
    f"{INPUTS} inputs. Score: five regimes, the attack with 20 steps x 3 restarts. Writes read back and compare. Peak: "
    "resident memory of the process."
)


def sizes_table(found: Mapping[str, Any]) -> str:
    """A row for each figure, a column for each size."""
    names = list(next(iter(found.values())))
    rows = [[name, *(ranged(one[name], ".3g") for one in found.values())] for name in names]
    return table(["nodes / edges", *found], rows)
