"""Traps of one layer: directions that activations suggest and the model does not use, and the two controls."""

import math

import torch
from torch import Tensor, nn

from benchmarks.targets import linear
from benchmarks.trap_parts import Trap, generator, joined_linearly, mlp, rotation, rows_of, unit, weight_trap


def blind_curve(seed: int) -> list[Trap]:
    """Eight coordinates of one closed curve; the model reacts to each on its own, and only where it is large."""
    rng, n, knots = generator(seed), 8, 8
    embed = unit(torch.randn(n, 16, generator=rng))
    # Readers answer to one coordinate each, though the directions that carry them overlap.
    readers = torch.linalg.pinv(embed).T
    owner = torch.arange(n).repeat_interleave(knots)
    w = readers[owner]
    bias = -torch.linspace(0.3, 1.3, knots).repeat(n)
    out = (0.5 + torch.rand(n * knots, generator=rng))[:, None] * unit(torch.randn(n, 4, generator=rng))[owner]
    model = mlp(linear(w, bias), linear(out.T.contiguous()))
    # Five harmonics span more dimensions than there are coordinates, so that none follows from the others linearly.
    harmonics = torch.arange(1, 6)
    phases = 2 * math.pi * torch.rand(n, len(harmonics), generator=rng)
    sizes = math.sqrt(2) * unit(torch.randn(n, len(harmonics), generator=rng))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        t = 2 * math.pi * torch.rand(count, 1, 1, generator=draw)
        return (sizes * torch.sin(harmonics * t + phases)).sum(-1) @ embed

    return [weight_trap(model, [{"0": share} for share in rows_of(w, owner, n)], inputs)]


def dictionary_mismatch(seed: int, neurons: int = 100) -> list[Trap]:
    """A closed curve in ten dimensions of sixteen, on which a hundred neurons each answer to one stretch."""
    rng, harmonics = generator(seed), torch.arange(1, 6)
    embed = rotation(16, rng)[:10]

    def curve(t: Tensor) -> Tensor:
        angles = 2 * math.pi * t[:, None] * harmonics
        return torch.cat([angles.cos(), angles.sin()], 1) @ embed / math.sqrt(len(harmonics))

    # Half of the neurons share a tenth of the curve: a dictionary of the curve itself spreads evenly.
    crowded = torch.rand(neurons // 2, generator=rng) * 0.1
    at = torch.cat([crowded, 0.1 + 0.9 * torch.rand(neurons - neurons // 2, generator=rng)])
    w = curve(at)
    model = mlp(linear(w, torch.full((neurons,), -0.97)), linear(torch.randn(32, neurons, generator=rng)))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        return curve(torch.rand(count, generator=draw))

    return [weight_trap(model, [{"0": share} for share in rows_of(w, torch.arange(neurons), neurons)], inputs)]


def twins(seed: int, pairs: int = 3) -> list[Trap]:
    """The same inputs under two models: one reads colours and shapes, the other whether both are there, and how.

    A colour or a shape is mostly alone, so that the pair is the shorter description for the model that reads each, and
    the combinations are for the model that is silent on either alone. Their directions overlap.
    """
    rng = generator(seed)
    basis = rotation(16, rng)
    colours, shapes = basis[:pairs], 0.5 * basis[:pairs] + 0.7 * basis[pairs : 2 * pairs]
    noise = basis[2 * pairs :]

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        kind = torch.rand(count, pairs, generator=draw)
        colour, other = 2.0 * torch.randint(0, 2, (2, count, pairs), generator=draw) - 1
        same = torch.rand(count, pairs, generator=draw) < 0.75
        shape = torch.where(kind < 0.2, torch.where(same, colour, -colour), other)
        codes = torch.rand(count, len(noise), generator=draw) * (torch.rand(count, len(noise), generator=draw) < 0.1)
        return (colour * (kind < 0.5)) @ colours + (shape * ((kind < 0.2) | (kind > 0.7))) @ shapes + codes @ noise

    c, s = torch.linalg.pinv(torch.cat([colours, shapes])).T.split(pairs)
    mix = rotation(4 * pairs, rng)
    traps = []
    for reads, bias in (((c, s), 0.0), ((c + s, c - s), -1.0)):
        w = torch.cat([sign * read for read in reads for sign in (1, -1)])
        model = mlp(linear(w, torch.full((4 * pairs,), bias)), linear(mix))
        owner = torch.arange(4 * pairs) % pairs + pairs * (torch.arange(4 * pairs) // (2 * pairs))
        traps.append(weight_trap(model, [{"0": share} for share in rows_of(w, owner, 2 * pairs)], inputs))
    return traps


def one_function(seed: int) -> list[Trap]:
    """Ten neurons compute sin 2 pi x together; nothing smaller means anything."""
    rng = generator(seed)
    knots = torch.linspace(-0.5, 0.5, 11)
    bias, weight = joined_linearly(torch.sin(2 * math.pi * knots), knots)
    read = unit(torch.randn(3, generator=rng))
    out = rotation(4, rng)[:, :1] * weight
    model = mlp(linear(read.expand(10, 3), bias), linear(out))

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        x = torch.rand(count, 1, generator=draw) - 0.5
        other = torch.randn(count, 3, generator=draw)
        return x * read + other - (other @ read)[:, None] * read

    return [weight_trap(model, [{"2": out}], inputs, most=1)]


class Copies(nn.Module):
    """Two layers side by side whose sum saturates: where a feature is strong, either copy suffices."""

    def __init__(self, a: nn.Linear, b: nn.Linear, out: nn.Linear) -> None:
        super().__init__()
        self.a, self.b, self.out = a, b, out

    def forward(self, x: Tensor) -> Tensor:
        """Add both copies, saturate, mix."""
        return self.out((self.a(x).relu() + self.b(x).relu()).clamp_max(0.6))


def redundant_copies(seed: int, features: int = 6) -> list[Trap]:
    """Every feature's detector exists in both of two layers side by side."""
    rng = generator(seed)
    embed = rotation(12, rng)[:features]
    bias = torch.full((features,), -0.1)
    out = unit(torch.randn(8, features, generator=rng).T).T.contiguous()
    model = Copies(linear(embed, bias), linear(embed, bias), linear(out)).eval()

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        on = torch.rand(count, features, generator=draw) < 0.25
        return (torch.rand(count, features, generator=draw) * on) @ embed

    parts = [{path: share} for path in "ab" for share in rows_of(embed, torch.arange(features), features)]
    return [weight_trap(model, parts, inputs)]


def absolute_values(seed: int, d: int = 8) -> list[Trap]:
    """|x_i| of rotated dimensions by two ReLUs each; a few inputs repeat, which tempts dictionaries to store them."""
    rng = generator(seed)
    turn, out = rotation(d, rng), rotation(d, rng)
    w = torch.cat([turn, -turn])
    model = mlp(linear(w, torch.zeros(2 * d)), linear(torch.cat([out, out], 1)))
    repeated = torch.randn(3, d, generator=rng)

    def inputs(count: int, draw: torch.Generator) -> Tensor:
        fresh = torch.randn(count, d, generator=draw) * (torch.rand(count, d, generator=draw) < 0.3)
        again = repeated[torch.randint(3, (count,), generator=draw)]
        return torch.where(torch.rand(count, 1, generator=draw) < 0.3, again, fresh) @ turn

    return [weight_trap(model, [{"0": share} for share in rows_of(w, torch.arange(d).repeat(2), d)], inputs)]


def planted(seed: int, atoms: int, probability: float) -> list[Trap]:
    """Activations that are sparse sums of planted directions, read by a dense map without structure."""
    rng, d = generator(seed), 16
    truth = unit(torch.randn(atoms, d, generator=rng))
    dense = torch.randn(d, d, generator=rng) / d**0.5
    model = nn.Sequential(linear(dense)).eval()

    def sample(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        on = torch.rand(count, atoms, generator=draw) < probability
        codes = (0.5 + torch.rand(count, atoms, generator=draw)) * on
        return codes @ truth, codes.T[:, :, None] * (truth @ dense.T)[:, None, :]

    return [Trap(model, ["0"], sample)]
