"""Traps that are small programs: two hops of logic, gated functions, modular addition, an induction head."""

import math

import torch
from torch import Tensor, nn

from benchmarks.targets import linear
from benchmarks.trap_parts import Trap, generator, joined_linearly, mlp, rotation, rows_of, weight_trap
from bilinear import BilinearMLP


def two_hops(seed: int, nodes: int = 12) -> list[Trap]:
    """Every hop-1 neuron is the AND of two bits, every hop-2 neuron the AND of two neighbours on a ring of these."""
    rng = generator(seed)
    embed = rotation(2 * nodes + 4, rng)[: 2 * nodes]
    hop1 = torch.eye(nodes).repeat_interleave(2, 1) @ embed
    hop2 = torch.eye(nodes) + torch.eye(nodes).roll(1, 1)
    off_by_one = torch.full((nodes,), -1.0)
    model = mlp(linear(hop1, off_by_one), linear(hop2, off_by_one), linear(rotation(nodes, rng)))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        bits = torch.rand(count, nodes, 2, generator=draw) < 0.15
        fired = torch.randint(nodes, (count,), generator=draw)
        some = torch.rand(count, generator=draw) < 0.7
        for neighbour in (fired, (fired + 1) % nodes):
            bits[torch.arange(count)[some], neighbour[some]] = True
        return bits.flatten(1).float() @ embed

    owner = torch.arange(nodes)
    parts = [{path: share} for path, w in (("0", hop1), ("2", hop2)) for share in rows_of(w, owner, nodes)]
    return [weight_trap(model, parts, inputs)]


class ResidualMlp(nn.Module):
    """Two MLPs on a residual stream, of which one direction is read at the end."""

    def __init__(self, first: nn.Sequential, second: nn.Sequential, read: nn.Linear) -> None:
        super().__init__()
        self.first, self.second, self.read = first, second, read

    def forward(self, stream: Tensor) -> Tensor:
        """Add both MLPs, read."""
        stream = stream + self.first(stream)
        return self.read(stream + self.second(stream))


def gated_functions(seed: int, functions: int = 4, neurons: int = 10) -> list[Trap]:
    """Four functions of x behind control bits, each on ten neurons of its own, five in each of two layers.

    The stream holds x, the bits and the output, rotated.
    """
    rng, d = generator(seed), functions + 2
    turn = rotation(d, rng)
    knots = torch.linspace(0, 5, neurons)
    owner = torch.arange(functions).repeat_interleave(neurons)
    reads, biases, sizes = [], [], []
    for t in range(functions):
        values = _trigonometric(knots, rng)
        bias, weight = joined_linearly(values, knots)
        read = torch.zeros(neurons, d)
        read[1:, 0] = 1.0
        # A bit that is off holds its ramps below zero; the first neuron is the bit itself, for the value at zero.
        read[:, 1 + t] = torch.tensor([1.0] + [10.0] * (neurons - 1))
        reads.append(read)
        biases.append(torch.cat([torch.zeros(1), bias - 10.0]))
        sizes.append(torch.cat([values[:1], weight]))
    w, b, size = torch.cat(reads) @ turn, torch.cat(biases), torch.cat(sizes)
    half = torch.argsort(torch.rand(functions, neurons, generator=rng)) < neurons // 2
    layers, parts = [], [{} for _ in range(functions)]
    for number, here in enumerate((half.flatten(), ~half.flatten())):
        path = ("first.0", "second.0")[number]
        for part, share in zip(parts, rows_of(w[here], owner[here], functions), strict=True):
            part[path] = share
        layers.append(mlp(linear(w[here], b[here]), linear(torch.outer(turn[-1], size[here]))))
    model = ResidualMlp(*layers, linear(turn[-1:].contiguous())).eval()

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        x = 5 * torch.rand(count, 1, generator=draw)
        bits = (torch.rand(count, functions, generator=draw) < 0.1).float()
        return torch.cat([x, bits, torch.zeros(count, 1)], 1) @ turn

    return [weight_trap(model, parts, inputs)]


def _trigonometric(x: Tensor, rng: torch.Generator) -> Tensor:
    """`a cos(b x + c) + d sin(e x + f) + h` with the published ranges, scaled to a mean square of one."""
    a, d, h = 2 * torch.rand(3, generator=rng) - 1
    b, e = 0.1 + 0.9 * torch.rand(2, generator=rng)
    c, f = math.pi * (2 * torch.rand(2, generator=rng) - 1)
    values = a * torch.cos(b * x + c) + d * torch.sin(e * x + f) + h
    return values / values.square().mean().sqrt()


_MODULUS, _LOUDNESS = 23, torch.tensor([1.0, 0.85, 0.7])  # distinct, so that planes of frequencies are unique


def modular_addition(seed: int) -> list[Trap]:
    """(a + b) mod 23 by three frequencies, each a plane at every site; once with ReLUs and once bilinear.

    Numbers come embedded in the planes, rotated: of one-hot inputs a look-up table is the shorter description.
    """
    rng = generator(seed)
    frequencies = 1 + torch.randperm(_MODULUS // 2, generator=rng)[: len(_LOUDNESS)]
    angles = 2 * math.pi * torch.outer(frequencies, torch.arange(_MODULUS)) / _MODULUS
    embedding = torch.stack([angles.cos(), angles.sin()], 1).flatten(0, 1).T
    turn = rotation(2 * embedding.shape[1], rng)

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        a, b = torch.randint(_MODULUS, (2, count), generator=draw)
        return torch.cat([embedding[a], embedding[b]], 1) @ turn

    return [
        weight_trap(*build(angles, turn), inputs, most=2)  # a plane has two dimensions
        for build in (_relu_addition, _bilinear_addition)
    ]


def _planes(coordinates: Tensor) -> Tensor:
    """Readers of one frequency's (cos, sin), (frequency, reader, 2), as rows over the planes of all frequencies."""
    n = len(_LOUDNESS)
    return torch.einsum("kg,krc->krgc", torch.diag(_LOUDNESS), coordinates).reshape(-1, 2 * n)


def _relu_addition(angles: Tensor, turn: Tensor) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Seven phases a frequency: the second harmonic of ReLU(cos(A + phase) + cos(B + phase)) is cos(A + B)."""
    phases = 2 * math.pi * torch.arange(7) / 7
    owner = torch.arange(len(angles)).repeat_interleave(len(phases))
    one = _planes(torch.stack([phases.cos(), -phases.sin()], 1).expand(len(angles), -1, -1))
    out = (_LOUDNESS[:, None, None] * torch.cos(angles[:, None] + 2 * phases[:, None])).flatten(0, 1)
    w = torch.cat([one, one], 1) @ turn
    parts = [{"0": share} for share in rows_of(w, owner, len(angles))]
    parts += [{"2": share.T} for share in rows_of(out, owner, len(angles))]
    return mlp(linear(w), linear(out.T.contiguous())), parts


def _bilinear_addition(angles: Tensor, turn: Tensor) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Four products a frequency, of cos A or sin A with cos B or sin B: the addition theorem."""
    cos, sin = torch.eye(2)
    factors = (cos, sin, cos, sin), (cos, sin, sin, cos)
    a, b = (_planes(torch.stack(rows).expand(len(angles), -1, -1)) for rows in factors)
    w = torch.cat([a, torch.zeros_like(a)], 1) @ turn
    v = torch.cat([torch.zeros_like(b), b], 1) @ turn
    writes = torch.stack([angles.cos(), -angles.cos(), angles.sin(), angles.sin()], 1)
    d = (_LOUDNESS[:, None, None] * writes).flatten(0, 1)
    owner = torch.arange(len(angles)).repeat_interleave(4)
    model = BilinearMLP(w.shape[1], len(w), _MODULUS)
    model.w, model.v, model.d = linear(w), linear(v), linear(d.T.contiguous())
    parts = [{path: share} for path, x in (("w", w), ("v", v)) for share in rows_of(x, owner, len(angles))]
    return model.eval(), parts + [{"d": share.T} for share in rows_of(d, owner, len(angles))]


class Induction(nn.Module):
    """Two attention heads in a row: what stood before each token, then what followed the last token's earlier self.

    Every matrix is a module of its own. The stream has a slot for the token, its place, the token before it and the
    answer, all rotated.
    """

    def __init__(self, tokens: int, places: int, turn: Tensor) -> None:
        super().__init__()
        token, place, before, answer = (turn[n : n + k] for n, k in _slots(tokens, places))
        self.tokens, self.answer = token, answer
        self.places = nn.Parameter(place, requires_grad=False)
        # The first place has no token before it and asks for none.
        back = torch.eye(places).roll(1, 1) * (torch.arange(places) > 0)
        self.q0, self.k0 = linear(back @ place), linear(place)
        self.v0 = linear(before.T @ token)
        self.q1, self.k1 = linear(token), linear(before)
        self.v1 = linear(answer.T @ token)

    def forward(self, x: Tensor) -> Tensor:
        """What is in the answer's slot at the last place."""
        x = x + self.places
        x = x + _attended(self.q0(x), self.k0(x), self.v0(x))
        return (_attended(self.q1(x[:, -1:]), self.k1(x), self.v1(x)) @ self.answer.T)[:, 0]


def _slots(tokens: int, places: int) -> list[tuple[int, int]]:
    sizes = [tokens, places, tokens, tokens]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _attended(q: Tensor, k: Tensor, v: Tensor, sharpness: float = 12.0) -> Tensor:
    return torch.softmax(sharpness * q @ k.mT, -1) @ v


def induction(seed: int, tokens: int = 10, places: int = 8) -> list[Trap]:
    """S M ... S -> M for ten tokens; four matrices move tokens between slots, one rank-one piece a token."""
    rng = generator(seed)
    turn = rotation(3 * tokens + places, rng)
    model = Induction(tokens, places, turn).eval()

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        # Tokens are distinct but for the last, which stood before.
        ids = torch.rand(count, tokens, generator=draw).argsort(1)[:, :places]
        ids[:, -1] = ids.gather(1, torch.randint(places - 2, (count, 1), generator=draw))[:, 0]
        return model.tokens[ids]

    token, _, before, answer = (turn[n : n + k] for n, k in _slots(tokens, places))
    parts = []
    for path, write, read in (("v0", before, token), ("v1", answer, token)):
        parts += [{path: torch.outer(write[t], read[t])} for t in range(tokens)]
    for path, read in (("q1", token), ("k1", before)):
        parts += [{path: torch.outer(torch.eye(tokens)[t], read[t])} for t in range(tokens)]
    return [weight_trap(model, parts, inputs)]
