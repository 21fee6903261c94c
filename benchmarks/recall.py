"""Recall: a small transformer, trained in seconds on a task that takes two attention layers.

A sequence holds distinct random tokens, then one of them once more; what followed it before comes next. No position and
no token alone tells the answer: a head must find the token, and another what came after it. Labels are smoothed, as
probabilities of 1 would leave no gradient in the softmax, and nothing in the logits to explain.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.speed import Block

TOKENS, LENGTH = 10, 6  # of the vocabulary, and of a sequence
_SMOOTHING = 0.1


class Recall(nn.Module):
    """Two blocks over token and position embeddings; the logits of the next token alone."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, d), nn.Embedding(LENGTH, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.unembedding = nn.Linear(d, TOKENS, bias=False)

    def forward(self, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, "batch token"]:
        """Logits of what follows."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.unembedding(x[:, -1])


def drawn(n: int, rng: torch.Generator) -> tuple[Int[Tensor, "batch position"], Int[Tensor, " batch"]]:
    """Sequences and what follows them."""
    before = torch.rand(n, TOKENS, generator=rng).argsort(1)[:, : LENGTH - 1]
    at = torch.randint(LENGTH - 2, (n, 1), generator=rng)
    return torch.cat([before, before.gather(1, at)], 1), before.gather(1, at + 1)[:, 0]


def trained(seed: int, *, d: int = 8, steps: int = 1000) -> tuple[Recall, float]:
    """A trained model and its accuracy on 4,096 new sequences; the same for the same seed.

    Args:
        seed: Of the initial weights and the sequences.
        d: Width of the residual stream.
        steps: Of Adam, 256 sequences each.
    """
    with torch.random.fork_rng(), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        model = Recall(d)
        rng = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
        for _ in range(steps):
            tokens, following = drawn(256, rng)
            loss = F.cross_entropy(model(tokens), following, label_smoothing=_SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval().requires_grad_(False)
    tokens, following = drawn(4096, rng)
    with torch.no_grad():
        return model, float((model(tokens).argmax(-1) == following).double().mean())
