"""Decompositions made in closed form, for the tests of graphs: every piece, gate and group is known."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Calls, drawn, ids, seeded
from weightdecomp import Config, Decomposition, Ledger
from weightdecomp._decomposition import Outcome, Parts
from weightdecomp._divergence import choose
from weightdecomp._forward import recorded
from weightdecomp._pieces import Pieces, rank_one_pieces
from weightdecomp._sites import find_sites


def decomposed_exactly(
    model: nn.Module,
    batch: Any,
    *,
    closed: float = 0.0,
    rank: int = 1,
    kept: float = 1.0,
    sites: Sequence[str] | None = None,
    divergence: str = "auto",
) -> Decomposition:
    """The singular pieces of every site as components.

    Args:
        model: The target.
        batch: Inputs on which gates and frequencies are set.
        closed: Share of the rows on which every gate is closed.
        rank: Pieces of a component.
        kept: Share of the singular pieces that are components; the others are remainder.
        sites: Patterns of sites.
        divergence: As `decompose` takes it.
    """
    found, skipped = find_sites(model, batch, sites)
    record = recorded(model, batch, found)
    parts = {}
    for site in found:
        u, s, v = torch.linalg.svd(site.matrix(), full_matrices=False)
        n = max(1, int(kept * len(s)))
        own = rank_one_pieces(v[:n] * s[:n, None].sqrt(), (u[:, :n] * s[:n].sqrt()).T.contiguous())
        own = Pieces(own.v, own.u, torch.arange(n) // rank)
        a = torch.cat([own.activations(site.read(x, own.v)).flatten(0, -2) for x in record.operands[site.path]]).abs()
        # Halfway between two rows, so that rounding opens no gate.
        k = max(1, int(closed * len(a)))
        level = (a.sort(0).values[k - 1] + a.sort(0).values[k]) / 2 if closed else torch.full((own.n,), -1.0).to(a)
        parts[site.path] = Parts(own, level.repeat(2, 1), (a > level).double().mean(0), "svd")
    members = [(path, c) for path, one in parts.items() for c in range(one.pieces.n)]
    groups = [members[i : i + 3] for i in range(0, len(members), 3)]
    ledger = Ledger(24, 1.0, 1.0, 1.0, 1.0)
    outcome = Outcome(True, "in closed form", 0.0, True, "compresses", 1.0, 2.0, ledger, 2.0, 0)
    integers = isinstance(batch, Tensor) and not batch.is_floating_point()
    metric = choose(divergence, record.output, integers)
    frequencies = [0.5] * len(groups)
    return Decomposition(model, found, skipped, parts, metric, 0.02, Config(), outcome, groups, frequencies)


def linear_chain(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Three linear layers with biases and nothing between them."""
    return seeded(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3))).to(dtype)


def relu_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A ReLU network with biases."""
    return seeded(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))).to(dtype)


def bilinear_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A bilinear layer d((w x) * (v x)), all of it in linear layers without biases."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.d(m.w(x) * m.v(x))

    layers = {"w": nn.Linear(4, 5, bias=False), "v": nn.Linear(4, 5, bias=False), "d": nn.Linear(5, 3, bias=False)}
    return seeded(Calls(forward, **layers)).to(dtype)


def meeting(dtype: torch.dtype = torch.float64) -> nn.Module:
    """nn.Bilinear of two linear layers, then a linear one."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.read(m.meet(m.a(x), m.b(x)))

    return seeded(
        Calls(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 2), meet=nn.Bilinear(3, 2, 4), read=nn.Linear(4, 2))
    ).to(dtype)


def recurrent(dtype: torch.dtype = torch.float64) -> nn.Module:
    """One module used three times, with a residual stream."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.start(x)
        for _ in range(3):
            h = h + F.relu(m.mix(h))
        return m.read(h)

    return seeded(Calls(forward, start=nn.Linear(4, 4), mix=nn.Linear(4, 4), read=nn.Linear(4, 2))).to(dtype)


class Attention(nn.Module):
    """A transformer of one block over token ids, small enough to check by hand."""

    def __init__(self, vocabulary: int = 7, d: int = 6) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(vocabulary, d), nn.Embedding(5, d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 8), nn.Linear(8, d)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        mixed = F.scaled_dot_product_attention(self.q(x)[:, None], self.k(x)[:, None], self.v(x)[:, None])
        x = x + self.o(mixed[:, 0])
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x)


def attention(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The one-block transformer with seeded weights."""
    return seeded(Attention()).to(dtype)


def convolution(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two convolutions and a linear layer."""
    return seeded(
        nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    ).to(dtype)


NETS = {
    "linear chain": (linear_chain, lambda: drawn(12, 5)),
    "relu": (relu_net, lambda: drawn(12, 5)),
    "bilinear": (bilinear_net, lambda: drawn(12, 4)),
    "nn.Bilinear": (meeting, lambda: drawn(12, 4)),
    "recurrent": (recurrent, lambda: drawn(12, 4)),
    "attention": (attention, lambda: ids(7, 12, 5)),
    "convolution": (convolution, lambda: drawn(12, 2, 6)),
}
"""Models with a batch of 12 inputs each."""


def relu_batches() -> list[Tensor]:
    """Two batches for the command line, in the network's own dtype."""
    return list(drawn(12, 5).split(8))
