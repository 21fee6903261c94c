"""Traps of superposition: more circuits than blocks of neurons, on shared neurons, with exact weights of their own."""

import torch
from torch import Tensor

from benchmarks.targets import linear
from benchmarks.trap_parts import (
    Trap,
    cyclic_code,
    generator,
    joined_linearly,
    mlp,
    rotation,
    rows_of,
    unit,
    weight_trap,
)


def superposed_functions(seed: int, circuits: int = 30, neurons: int = 15, copies: int = 3) -> list[Trap]:
    """Circuits of ten knots, each at three of fifteen shared places; a threshold takes away what leaks to the others.

    Without the threshold the leak is most of the output, and then it is the model's behaviour as much as the circuits.
    """
    rng = generator(seed)
    knots = torch.linspace(0, 1, 11)
    bias, weight = joined_linearly((1 - torch.cos(2 * torch.pi * knots)) / 2, knots)
    code = torch.cat([cyclic_code(neurons, (0, 1, 4)), cyclic_code(neurons, (0, 2, 7))])
    code = code[torch.randperm(circuits, generator=rng)]
    # Neuron (knot i, place n) reads every circuit that uses place n.
    w_in = code.T.repeat(len(bias), 1)
    w_out = torch.einsum("i,tn->tin", weight, code).reshape(circuits, -1) / copies
    # Two circuits share at most one place, so that no leak is above a third of the largest value, one.
    threshold = torch.full((circuits,), -0.4)
    read = rotation(circuits, rng)
    model = mlp(linear(w_in, bias.repeat_interleave(neurons)), linear(w_out, threshold), linear(read))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        x = torch.zeros(count, circuits)
        which = torch.randint(circuits, (count, 1), generator=draw)
        return x.scatter(1, which, torch.rand(count, 1, generator=draw))

    parts = [{"2": share} for share in rows_of(w_out, torch.arange(circuits), circuits)]
    return [weight_trap(model, parts, inputs, most=1)]


def ping_pong(seed: int, blocks: int = 4, d: int = 6) -> list[Trap]:
    """Blocks squared circuits, one at a time, each a rank-one block of the weights on shared neurons."""
    rng, width, huge = generator(seed), blocks * d, 20.0
    w = torch.zeros(width, width + 2 * blocks)
    parts = []
    for i in range(blocks):
        for j in range(blocks):
            read = torch.zeros(width + 2 * blocks)
            read[i * d : (i + 1) * d] = 2 * unit(torch.randn(d, generator=rng))
            read[width + i] = 1.0  # the circuit's bias, through the name of its source
            write = torch.zeros(width)
            write[j * d : (j + 1) * d] = 2 * unit(torch.randn(d, generator=rng))
            parts.append({"0": write[:, None] * read})
    w += torch.stack([part["0"] for part in parts]).sum(0)
    # The name of the goal lifts its block; all others stay far below zero. No circuit owns this.
    for j in range(blocks):
        w[j * d : (j + 1) * d, width + blocks + j] = huge
    model = mlp(linear(w, torch.full((width,), -huge)), linear(rotation(width, rng)))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        i, j = torch.randint(blocks, (2, count), generator=draw)
        x = torch.zeros(count, width + 2 * blocks)
        rows = torch.arange(count)
        for k in range(d):
            x[rows, i * d + k] = torch.randn(count, generator=draw)
        x[rows, width + i] = 1.0
        x[rows, width + blocks + j] = 1.0
        return x

    return [weight_trap(model, parts, inputs)]


# Base blocks of two codes with no difference in common, such that at most three circuits leak into one place.
_PLACES, _CODES = 53, ((0, 5, 27, 35, 52), (0, 3, 24, 37, 44))
_INHIBITION = 0.2  # per place that is on, of every place that is not linked to it
_SIGNAL = torch.tensor([[2.0, -2.0, 0.0, 0.0]]).repeat(4, 1)  # twice the on-signal, to all four kinds


def rotations(seed: int) -> list[Trap]:
    """Conditional rotations, one circuit at a time, on 212 neurons of four kinds that five circuits share each.

    A circuit holds (1.5, 0.5, x + 1, y + 1) where it is on and zeros where it is off; a layer keeps its first two
    numbers and turns (x, y) by the circuit's own angle. Two circuits never share a place in both of two consecutive
    layers, and one uniform inhibition keeps all that leaks below zero, so that one active circuit is computed exactly.
    """
    rng, n = generator(seed), _PLACES
    order = torch.randperm(n, generator=rng)
    codes = [cyclic_code(n, base)[order] for base in _CODES]
    size = len(_CODES[0])
    angles = 2 * torch.pi * torch.rand(2, n, generator=rng)
    layers, parts = [], []
    for layer, path in enumerate("02"):
        before, after = codes[layer], codes[1 - layer]
        shares = []
        for t in range(n):
            link = torch.outer(after[t], before[t])
            shares.append(torch.kron(_turn(angles[layer, t]) / size + _INHIBITION * _SIGNAL, link))
        whole = torch.stack(shares).sum(0) - _INHIBITION * torch.kron(_SIGNAL, torch.ones(n, n))
        layers.append(linear(whole, torch.tensor([-0.5, -1.5, -1.0, -1.0]).repeat_interleave(n)))
        parts += [{path: share} for share in shares]
    # Both coordinates of whichever circuit is on: all neurons of a kind added up, less the shift.
    read = torch.tensor([[-1.0, 1.0, 1.0, 0.0], [-1.0, 1.0, 0.0, 1.0]]) / size
    model = mlp(*layers, linear(read.repeat_interleave(n, 1)))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        which = torch.randint(n, (count,), generator=draw)
        radius, angle = torch.rand(2, count, generator=draw)
        x = 0.8 * radius.sqrt() * torch.stack([(2 * torch.pi * angle).cos(), (2 * torch.pi * angle).sin()])
        state = torch.stack([torch.full((count,), 1.5), torch.full((count,), 0.5), x[0] + 1, x[1] + 1], 1)
        return (state[:, :, None] * codes[0][which][:, None, :]).flatten(1)

    return [weight_trap(model, parts, inputs)]


def _turn(angle: Tensor) -> Tensor:
    """One circuit's map of its four numbers before the biases; the bias of -1 leaves the coordinates shifted by 1."""
    c, s = float(angle.cos()), float(angle.sin())
    return torch.tensor([[2, -2, 0, 0], [2, -2, 0, 0], [2 - (c - s), c - s - 2, c, -s], [2 - (s + c), s + c - 2, s, c]])


def compressed_computation(seed: int) -> list[Trap]:
    """A hundred features on fifty neurons: with a code of four neurons a feature, and as the naive solution has it.

    The code is what a loss of fourth powers rewards; under squared error the naive solution computes half of the
    features and leaves small weights on the rest, of which nothing may be claimed.
    """
    rng, features, neurons = generator(seed), 100, 50
    turn = rotation(features, rng)
    code = torch.cat([cyclic_code(neurons, (0, 1, 4, 10)), cyclic_code(neurons, (0, 2, 13, 20))])
    code = code[torch.randperm(features, generator=rng)]
    overlap = (code @ code.T).fill_diagonal_(0).mean()
    coded = mlp(linear(code.T @ turn), linear((code - overlap / 4) / 4))
    naive = torch.cat([torch.eye(neurons), 0.02 * torch.randn(neurons, neurons, generator=rng)], 1)
    few = mlp(linear(naive @ turn), linear(torch.eye(features)[:, :neurons].contiguous()))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        values = 2 * torch.rand(count, features, generator=draw) - 1
        return (values * (torch.rand(count, features, generator=draw) < 0.04)) @ turn

    features_read = [{"0": torch.outer(code[i], turn[i])} for i in range(features)]
    neurons_read = [{"0": share} for share in rows_of(naive @ turn, torch.arange(neurons), neurons)]
    return [
        weight_trap(coded, features_read, inputs),
        weight_trap(few, neurons_read, inputs, exclusive=True),
    ]
