"""What does a refinement step cost? Time and memory as multiples of the target's own forward and backward.

Both run on the same batch, in one process on one thread, in turns. A step does all there is to it: gates,
random and adversarial sources, the exact sum, Adam on the components and the ascent of the sources. Every
site has C = d pieces: as many as the target has features, or as its residual stream is wide.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import RESULTS, Spread, provenance, spread, table, write, write_json
from benchmarks.targets import make, one_thread
from weightdecomp import Config
from weightdecomp._attack import Ablation
from weightdecomp._divergence import choose
from weightdecomp._forward import recorded
from weightdecomp._frame import frame
from weightdecomp._pieces import Pieces
from weightdecomp._refine import Refiner
from weightdecomp._sample import ablated_entirely
from weightdecomp._sites import find_sites
from weightdecomp._starts import Reach

REPEATS, PASSES, WARM_UP = 9, 20, 10
GOAL = 4.0  # times the target's own forward and backward pass
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "einsum", "linear", "matmul")


class Case(NamedTuple):
    """What is timed.

    Attributes:
        name: For the table.
        model: The target.
        batch: One batch of it.
        sites: Patterns of the decomposed modules.
        width: Pieces of every site.
    """

    name: str
    model: nn.Module
    batch: Tensor
    sites: Sequence[str]
    width: int


class Block(nn.Module):
    """One transformer block: causal attention of four heads, then an MLP four times as wide."""

    def __init__(self, d: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.mlp_in, self.mlp_out = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: Float[Tensor, "batch position d"]) -> Float[Tensor, "batch position d"]:
        """The residual stream after this block."""
        read = self.norm_attention(x)
        heads = [site(read).unflatten(-1, (4, -1)).transpose(1, 2) for site in (self.q, self.k, self.v)]
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))


class Transformer(nn.Module):
    """A language model of random weights; only its shapes matter here."""

    def __init__(self, d: int, n_layers: int, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(n_layers))
        self.unembedding = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position vocabulary"]:
        """Logits."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembedding(x)


def cases(smoke: bool) -> list[Case]:
    """The three targets; smaller and untrained for a smoke run."""
    n = 64 if smoke else Config().batch
    rng = torch.Generator().manual_seed(0)
    steps, found = (0 if smoke else None), []
    for task in ("tms_40_10", "resid_mlp_1"):
        target = make(task, 0, steps=steps, **({"cache": None} if smoke else {}))
        width = target.inputs.n_features
        found.append(Case(task, target.model, target.batches(n, 1)[0], list(target.mechanisms), width))
    d, batch, positions = (16, 4, 8) if smoke else (128, 64, 32)
    with torch.random.fork_rng():
        model = Transformer(d, 2, 256).eval()
    tokens = torch.randint(256, (batch, positions), generator=rng)
    return [*found, Case(f"transformer, 2 layers, d={d}", model, tokens, ["blocks.*"], d)]


def random_pieces(reach: Reach, n: int, rng: torch.Generator) -> Pieces:
    """At least `n` pieces in random directions that sum to W on the inputs' span."""
    left, sizes, right = torch.linalg.svd(reach.weight, full_matrices=False)
    drawn = torch.randn(max(n, len(sizes)), len(sizes), generator=rng)
    directions = torch.linalg.qr(drawn).Q
    return reach.lifted(directions @ right, directions @ (left * sizes).T)


def step_of(case: Case) -> tuple[Callable[[], Any], Refiner]:
    """A function that makes one refinement step, and the state that it keeps."""
    rng = torch.Generator().manual_seed(0)
    sites, _ = find_sites(case.model, case.batch, case.sites)
    record = recorded(case.model, case.batch, sites)
    metric = choose("auto", record.output, not case.batch.is_floating_point())
    pieces, frames, thresholds = {}, {}, {}
    for site in sites:
        operands = record.operands[site.path][0]
        reach = Reach(site.matrix(), site.vectors(operands).flatten(0, -2))
        own = pieces[site.path] = random_pieces(reach, case.width, rng)
        frames[site.path] = frame(reach.basis, reach.power, reach.weight[:0], site.matrix(), own)
        sizes = own.activations(site.read(operands, own.v)).abs().flatten(0, -2)
        # One gate in ten is open.
        thresholds[site.path] = sizes.kthvalue(max(1, int(0.9 * len(sizes))), 0).values.repeat(2, 1)
    nothing = float(ablated_entirely(case.model, case.batch, sites, metric, record.output).mean())
    config = Config()
    refiner = Refiner(Ablation(case.model, sites, pieces, metric, {}), frames, nothing, config, rng)
    counter = iter(range(1 << 62))

    def step() -> None:
        refiner.step(case.batch, thresholds, next(counter) % config.steps, 0.01)

    return step, refiner


def target_of(case: Case) -> Callable[[], Any]:
    """A function that runs the target forward and backward to all its parameters."""
    parameters = [x for x in case.model.parameters() if x.requires_grad]

    def both() -> None:
        torch.autograd.grad(case.model(case.batch).square().mean(), parameters)

    return both


def measured(case: Case, repeats: int, passes: int, warm_up: int) -> dict[str, Any]:
    """All figures of one case."""
    target = target_of(case)
    step, refiner = step_of(case)
    for _ in range(warm_up):
        target()
        step()
    # In turns, so that a busy machine slows both.
    pairs = [(seconds(target, passes), seconds(step, passes)) for _ in range(repeats)]
    own = sum(x.numel() * x.element_size() for x in (*case.model.parameters(), *case.model.buffers()))
    state = sum(x.numel() * x.element_size() for x in refiner.state().values())
    target_peak, step_peak = own + peak_of(target), own + state + peak_of(step)
    products, operators = operator_seconds(step, passes)
    return {
        "pieces_per_site": {path: len(pieces.owner) for path, pieces in refiner.ablation.pieces.items()},
        "batch": list(case.batch.shape),
        "target_seconds": spread([pair[0] for pair in pairs])._asdict(),
        "step_seconds": spread([pair[1] for pair in pairs])._asdict(),
        "multiple": spread([after / before for before, after in pairs])._asdict(),
        "outside_products": 1 - products / operators,
        "target_peak_bytes": target_peak,
        "step_peak_bytes": step_peak,
        "memory_multiple": step_peak / target_peak,
    }


def seconds(function: Callable[[], Any], passes: int) -> float:
    """CPU seconds of one call, from several in a row."""
    start = time.process_time()
    for _ in range(passes):
        function()
    return (time.process_time() - start) / passes


def operator_seconds(function: Callable[[], Any], passes: int) -> tuple[float, float]:
    """Seconds of one call in matrix products and in all of torch's operators, without Python's own time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(passes):
            function()
    products = total = 0.0
    for event in profiler.key_averages():
        total += event.self_cpu_time_total
        if event.key.removeprefix("aten::").startswith(_PRODUCTS):
            products += event.self_cpu_time_total
    return products / passes * 1e-6, total / passes * 1e-6


def peak_of(function: Callable[[], Any]) -> int:
    """Most bytes of tensors that one call holds at a time, beyond those that lived before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    inner: Any = profiler.profiler  # torch has no stubs for what it recorded
    found = [one for one in inner.kineto_results.events() if one.name() == "[memory]"]
    for event in sorted(found, key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def markdown(result: Mapping[str, Any]) -> str:
    """The table of a result."""
    head = ("target", "C", "target ms", "step ms", "multiple", "outside products", "memory")
    rows = []
    for name, one in result["cases"].items():
        times = [
            Spread(*(1e3 * x for x in one[key].values())).text(".2f") for key in ("target_seconds", "step_seconds")
        ]
        widths = sorted(set(one["pieces_per_site"].values()))
        rows.append(
            [
                name,
                "-".join(str(n) for n in sorted({widths[0], widths[-1]})),
                *times,
                Spread(**one["multiple"]).text(".2f"),
                f"{one['outside_products']:.0%}",
                f"{one['memory_multiple']:.1f}",
            ]
        )
    where = result["provenance"]
    legend = (
        f"Median (range) of {result['repeats']} repeats of {result['passes']} passes, CPU time of one "
        f"thread, after {result['warm_up']} warm-up steps; the goal is a multiple of at most "
        f"{result['goal']:g}. Outside products: share of a step's time in torch's operators (torch profiler, "
        "without Python's own) that is no matrix product. Memory: peak bytes of tensors (torch profiler), "
        "weights and the refinement's state included, over the target's.\n\n"
        f"{where['machine']}, torch {where['torch']}, {where['date'][:10]}, commit {where['commit'][:9]}."
    )
    return f"{table(head, rows)}\n\n{legend}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny targets, in seconds; figures mean nothing")
    smoke = parser.parse_args(arguments).smoke
    with one_thread():
        result = compared(smoke)
    if not smoke:
        write_json(RESULTS / "speed.json", result)
        write(RESULTS / "speed.md", markdown(result))
    print(markdown(result))
    return 0


def compared(smoke: bool) -> dict[str, Any]:
    """All cases, with where and how they were measured."""
    repeats, passes, warm_up = (2, 1, 1) if smoke else (REPEATS, PASSES, WARM_UP)
    return {
        "cases": {case.name: measured(case, repeats, passes, warm_up) for case in cases(smoke)},
        "repeats": repeats,
        "passes": passes,
        "warm_up": warm_up,
        "goal": GOAL,
        "seed": 0,
        "provenance": provenance(),
    }


if __name__ == "__main__":
    sys.exit(main())
