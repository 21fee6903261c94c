"""Trap tasks: small models built in closed form, whose mechanisms and their effects on the output are known exactly.

Each task states what activations are said to hide, an exact answer, and the sites that methods are asked about. The
effect of a mechanism is the change of the output when it alone is deleted from the weights (in the controls: from the
activations, where the mechanisms are features of the data).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.targets import linear

Effects = Float[Tensor, "mechanism input d_output"]


@dataclass(frozen=True, eq=False)
class Trap:
    """One built task.

    Attributes:
        model: The target.
        sites: Module paths that methods are asked about.
        sample: Draws inputs, with the exact answer: what deleting each mechanism takes from the output.
        parts: The mechanisms' shares of the weights, by site; empty where they are features of the data.
        most: Units that may make up one mechanism; None: any number.
    """

    model: nn.Module
    sites: Sequence[str]
    sample: Callable[[int, torch.Generator], tuple[Tensor, Effects]]
    parts: Sequence[dict[str, Tensor]] = ()
    most: int | None = None


@dataclass(frozen=True)
class Task:
    """What a task claims.

    Attributes:
        name: Of the task.
        claim: What activations are said to hide.
        source: Where the claim is made.
        answer: The exact answer in words.
        build: From a seed, one or more traps whose scores are averaged.
        control: Whether activation methods should win.
    """

    name: str
    claim: str
    source: str
    answer: str
    build: Callable[[int], Sequence[Trap]]
    control: bool = False


def deletions(
    model: nn.Module, parts: Sequence[dict[str, Tensor]], inputs: Callable[[int, torch.Generator], Tensor]
) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Inputs, and the effects of taking each mechanism's share out of the weights: `f(x) - f(x; W - share)`."""

    def sample(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        x = inputs(count, draw)
        with torch.no_grad():
            whole = model(x)
            found = []
            for part in parts:
                changed = {f"{path}.weight": model.get_parameter(f"{path}.weight") - w for path, w in part.items()}
                found.append(whole - torch.func.functional_call(model, changed, x))
        return x, torch.stack(found)

    return sample


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(7_919 * (seed + 1))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def _mlp(first: nn.Linear, second: nn.Linear) -> nn.Sequential:
    return nn.Sequential(first, nn.ReLU(), second).eval()


def _blocks(matrix: Tensor, owner: Tensor, n: int) -> list[Tensor]:
    """The rows of each owner, others at zero."""
    return [matrix * (owner == i)[:, None] for i in range(n)]


def blind_curve(seed: int) -> list[Trap]:
    """Eight coordinates of one closed curve; the model treats each on its own."""
    rng, n, knots = _generator(seed), 8, 8
    embed = _unit(torch.randn(n, 16, generator=rng))
    # Coordinates are made orthogonal to each other's readers, so that neuron j,k reads z_j alone.
    readers = torch.linalg.pinv(embed).T
    owner = torch.arange(n).repeat_interleave(knots)
    w = readers[owner]
    bias = -torch.linspace(-0.9, 0.9, knots).repeat(n)
    out = torch.randn(n * knots, generator=rng)[:, None] * _unit(torch.randn(n, 4, generator=rng))[owner]
    model = _mlp(linear(w, bias), linear(out.T.contiguous()))
    phases = 2 * math.pi * torch.rand(n, 3, generator=rng)
    sizes = _unit(torch.randn(n, 3, generator=rng))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        t = 2 * math.pi * torch.rand(count, 1, 1, generator=draw)
        z = (sizes * torch.sin(torch.arange(1, 4) * t + phases)).sum(-1)
        return z @ embed

    parts = [{"0": share} for share in _blocks(w, owner, n)]
    return [Trap(model, ["0"], deletions(model, parts, inputs), parts)]


def twins(seed: int) -> list[Trap]:
    """The same inputs under two models: one reads colour and shape, the other their four combinations."""
    rng = _generator(seed)
    c, s = torch.linalg.qr(torch.randn(16, 2, generator=rng)).Q.T
    noise = torch.linalg.qr(torch.randn(16, 16, generator=rng)).Q[:, :12].T
    noise = noise - noise @ torch.stack([c, s]).T @ torch.stack([c, s])

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        colour = 2 * torch.randint(0, 2, (count, 1), generator=draw) - 1
        same = torch.rand(count, 1, generator=draw) < 0.75
        shape = torch.where(same, colour, -colour)
        codes = torch.rand(count, 12, generator=draw) * (torch.rand(count, 12, generator=draw) < 0.1)
        return colour * c + shape * s + codes @ noise

    reads = {
        "product": (torch.stack([c, -c, s, -s]), torch.zeros(4)),
        "composed": (torch.stack([c + s, c - s, s - c, -c - s]), torch.full((4,), -1.0)),
    }
    traps = []
    mix = torch.linalg.qr(torch.randn(4, 4, generator=rng)).Q
    for w, bias in reads.values():
        model = _mlp(linear(w, bias), linear(mix))
        parts = [{"0": share} for share in _blocks(w, torch.arange(4), 4)]
        traps.append(Trap(model, ["0"], deletions(model, parts, inputs), parts))
    return traps


def _sine(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """ReLUs of one variable in [-1/2, 1/2] that join sin 2 pi x linearly at their knots: slopes, biases, weights."""
    knots = torch.linspace(-0.5, 0.5, n + 1)
    values = torch.sin(2 * math.pi * knots)
    slopes = values.diff() / knots.diff()
    weights = torch.cat([slopes[:1], slopes.diff()])
    return torch.ones(n), -knots[:-1], weights


def one_function(seed: int) -> list[Trap]:
    """Ten neurons compute sin 2 pi x together; nothing smaller means anything."""
    rng = _generator(seed)
    slope, bias, weight = _sine(10)
    read = _unit(torch.randn(3, generator=rng))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=rng)).Q
    out = turn[:, :1] * weight
    model = _mlp(linear(slope[:, None] * read, bias), linear(out))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        x = torch.rand(count, 1, generator=draw) - 0.5
        other = torch.randn(count, 3, generator=draw)
        return x * read + other - (other @ read)[:, None] * read

    return [Trap(model, ["2"], deletions(model, [{"2": out}], inputs), [{"2": out}], most=1)]


def superposed_functions(seed: int, circuits: int = 24, neurons: int = 12, copies: int = 2) -> list[Trap]:
    """More circuits than blocks of neurons, each the same function of its own variable, on shared neurons."""
    rng, knots = _generator(seed), 10
    slope, bias, weight = _sine(knots)
    pairs = torch.combinations(torch.arange(neurons), copies)
    code = torch.zeros(circuits, neurons)
    chosen = pairs[torch.randperm(len(pairs), generator=rng)[:circuits]]
    code.scatter_(1, chosen, 1.0)
    # Neuron (knot i, place n) reads every circuit that uses place n; off circuits are held below all knots by bias.
    w_in = torch.einsum("i,tn->int", slope, code).reshape(knots * neurons, circuits)
    # Variables live in [0, 1] when on, so that an off circuit adds nothing to a shared neuron.
    knob = (bias - 0.5).repeat_interleave(neurons)
    w_out = torch.einsum("i,tn->tin", weight, code).reshape(circuits, knots * neurons) / copies
    model = _mlp(linear(w_in, knob), linear(w_out))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        on = torch.rand(count, circuits, generator=draw) < 1.5 / circuits
        return torch.rand(count, circuits, generator=draw) * on

    parts = [{"2": share} for share in _blocks(w_out, torch.arange(circuits), circuits)]
    return [Trap(model, ["2"], deletions(model, parts, inputs), parts, most=1)]


def ping_pong(seed: int, blocks: int = 4, d: int = 3) -> list[Trap]:
    """Blocks squared circuits, one at a time, each a block of weights of its own on shared neurons."""
    rng, width, huge = _generator(seed), blocks * d, 20.0
    weights = torch.randn(blocks, blocks, d, d, generator=rng)  # of circuit (from i, to j)
    w = torch.zeros(width, width + 2 * blocks)
    parts = []
    for i in range(blocks):
        for j in range(blocks):
            share = torch.zeros_like(w)
            share[j * d : (j + 1) * d, i * d : (i + 1) * d] = weights[i, j]
            share[j * d : (j + 1) * d, width + i] = 1.0  # the circuit's bias, linear in the name of the source
            parts.append({"0": share})
            w += share
    # The name of the goal lifts its block; all others stay far below zero.
    for j in range(blocks):
        w[j * d : (j + 1) * d, width + blocks + j] = huge
    out = torch.linalg.qr(torch.randn(width, width, generator=rng)).Q
    model = _mlp(linear(w, torch.full((width,), -huge)), linear(out))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        i, j = torch.randint(blocks, (2, count), generator=draw)
        x = torch.zeros(count, width + 2 * blocks)
        rows = torch.arange(count)
        for k in range(d):
            x[rows, i * d + k] = torch.randn(count, generator=draw)
        x[rows, width + i] = 1.0
        x[rows, width + blocks + j] = 1.0
        return x

    return [Trap(model, ["0"], deletions(model, parts, inputs), parts)]


def redundant_copies(seed: int, features: int = 6) -> list[Trap]:
    """Two copies of every feature's detector on neurons of their own; the output takes half of each."""
    rng = _generator(seed)
    embed = torch.linalg.qr(torch.randn(12, 12, generator=rng)).Q[:features]
    w = embed.repeat(2, 1)
    out = _unit(torch.randn(features, 8, generator=rng)).repeat(2, 1) / 2
    model = _mlp(linear(w, torch.full((2 * features,), -0.1)), linear(out.T.contiguous()))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        on = torch.rand(count, features, generator=draw) < 0.25
        return (torch.rand(count, features, generator=draw) * on) @ embed

    parts = [{"0": share} for share in _blocks(w, torch.arange(2 * features), 2 * features)]
    return [Trap(model, ["0"], deletions(model, parts, inputs), parts)]


def absolute_values(seed: int, d: int = 8) -> list[Trap]:
    """|x_i| of rotated dimensions by two ReLUs each; a few inputs repeat, which tempts dictionaries to store them."""
    rng = _generator(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q
    w = torch.cat([turn, -turn])
    out = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q
    model = _mlp(linear(w, torch.zeros(2 * d)), linear(torch.cat([out, out], 1)))
    repeated = torch.randn(3, d, generator=rng)

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        fresh = torch.randn(count, d, generator=draw) * (torch.rand(count, d, generator=draw) < 0.3)
        again = repeated[torch.randint(3, (count,), generator=draw)]
        return torch.where(torch.rand(count, 1, generator=draw) < 0.3, again, fresh) @ turn

    parts = [{"0": share} for share in _blocks(w, torch.arange(d).repeat(2), d)]
    return [Trap(model, ["0"], deletions(model, parts, inputs), parts)]


def _planted(seed: int, atoms: int, probability: float) -> list[Trap]:
    """Activations that are sparse sums of planted directions, read by a dense map without structure."""
    rng, d = _generator(seed), 16
    truth = _unit(torch.randn(atoms, d, generator=rng))
    dense = torch.randn(d, d, generator=rng) / d**0.5
    model = nn.Sequential(linear(dense)).eval()

    def sample(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        on = torch.rand(count, atoms, generator=draw) < probability
        codes = (0.5 + torch.rand(count, atoms, generator=draw)) * on
        return codes @ truth, codes.T[:, :, None] * (truth @ dense.T)[:, None, :]

    return [Trap(model, ["0"], sample)]


TASKS = (
    Task(
        "blind curve",
        "eight coordinates of one curve look like one object, which the model never treats as one",
        "Chughtai and Bushnaq 2025, example 1, with eight coordinates instead of two",
        "8 mechanisms: the neurons of the first layer that read one coordinate",
        blind_curve,
    ),
    Task(
        "twins",
        "the same activations under a model that reads factors and one that reads their combinations",
        "Chughtai and Bushnaq 2025, example 3; as twins: ours",
        "4 mechanisms in either model, one a neuron of the first layer; the mean over both",
        twins,
    ),
    Task(
        "one function",
        "ten neurons compute sin 2 pi x, and no direction of theirs is sin 2 pi x",
        "Chughtai and Bushnaq 2025, example 4a, with a function that principal components do not show",
        "1 mechanism, to be found as one unit",
        one_function,
    ),
    Task(
        "functions in superposition",
        "24 such circuits on the neurons of 12",
        "Chughtai and Bushnaq 2025, example 4b; neurons are shared by pairs of places: ours",
        "24 mechanisms, each to be found as one unit: what is written for one output",
        superposed_functions,
    ),
    Task(
        "ping-pong",
        "16 circuits, one at a time, on 4 blocks of neurons, each in a block of weights of its own",
        "Rotations in Superposition 2025, the construction for one active circuit",
        "16 mechanisms, each a block of the weights with its bias",
        ping_pong,
    ),
    Task(
        "redundant copies",
        "every feature is computed twice, and one copy is easily missed",
        "the completeness toy of targeted parameter decomposition, arXiv 2607.13047; built in closed form: ours",
        "12 mechanisms, two a feature",
        redundant_copies,
    ),
    Task(
        "absolute values",
        "a few inputs that repeat tempt a dictionary to store them whole",
        "Olah 2025, A Toy Model of Mechanistic (Un)Faithfulness",
        "8 mechanisms, the two neurons of a dimension",
        absolute_values,
    ),
    Task(
        "control: planted dictionary",
        "activations are sparse sums of 24 directions; the weights have no structure",
        "SynthSAEBench, arXiv 2602.14687, in its simplest form",
        "24 features of the data",
        lambda seed: _planted(seed, 24, 0.06),
        control=True,
    ),
    Task(
        "control: overcomplete dictionary",
        "the same with 32 directions in 16 dimensions, more of them at a time",
        "the same",
        "32 features of the data",
        lambda seed: _planted(seed, 32, 0.08),
        control=True,
    ),
)
