"""Bilinear attention: two query-key products in place of a softmax, as forms in queries and keys."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bilinear._checks import check_inputs, check_tensor
from bilinear._layer import Layer

_BASE = 10_000.0  # of the rotary frequencies


@dataclass(frozen=True, eq=False)
class Attention:
    r"""Bilinear attention: every head's pattern is a product of two score matrices.

    .. math:: y_i = \sum_h \sum_{j} (q^1_h x_i \cdot k^1_h x_j)(q^2_h x_i \cdot k^2_h x_j)\, o_h v_h x_j \cdot scale

    With rotary positions, queries and keys are rotated by their position before the products. Scores are not
    normalised, so the output is a polynomial of degree 5 in the sequence.

    Attributes:
        q1: Float[Tensor, "head d_head d_model"], and likewise k1, q2, k2, v.
        k1: Keys of the first product.
        q2: Queries of the second product.
        k2: Keys of the second product.
        v: Values.
        o: Float[Tensor, "head d_model d_head"].
        scale: Factor on the product of both scores.
        causal: Whether position i attends to j <= i alone.
        rotary: Whether queries and keys are rotated (pairs of adjacent entries, base 10,000).

    Source:
        Bilinear attention as in Riggs' tensor transformers (LessWrong, 2025); exact reductions ours.
    """

    q1: Tensor
    k1: Tensor
    q2: Tensor
    k2: Tensor
    v: Tensor
    o: Tensor
    scale: float = 1.0
    causal: bool = True
    rotary: bool = False

    def __post_init__(self) -> None:
        """Refuse weights that do not fit together."""
        check_tensor("q1", self.q1, (None, None, None))
        n, d_head, d_model = self.q1.shape
        for name in ("k1", "q2", "k2"):
            check_tensor(name, getattr(self, name), (n, d_head, d_model), self.q1)
        check_tensor("v", self.v, (n, None, d_model), self.q1)
        check_tensor("o", self.o, (n, d_model, self.v.shape[1]), self.q1)
        if self.rotary and d_head % 2:
            raise ValueError(f"rotary positions turn pairs of entries, so heads must have even width, got {d_head}")

    @property
    def n_heads(self) -> int:
        """Number of heads."""
        return len(self.q1)

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return self.q1.shape[2]

    def pattern(self, x: Tensor) -> Float[Tensor, "*batch head query key"]:
        """Products of both scores for inputs (..., position, d_model); 0 where the mask forbids."""
        check_inputs("x", x, self.d_model, self.q1)
        length = x.shape[-2]
        scores = self._scores(x, self.q1, self.k1) * self._scores(x, self.q2, self.k2) * self.scale
        return scores * torch.ones(length, length, dtype=x.dtype, device=x.device).tril() if self.causal else scores

    def __call__(self, x: Tensor) -> Float[Tensor, "*batch position d_model"]:
        """The layer's output for inputs (..., position, d_model)."""
        values = torch.einsum("hed,...jd->...hje", self.v, x)
        return torch.einsum("...hij,...hje,hde->...id", self.pattern(x), values, self.o)

    def _scores(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        queries, keys = (torch.einsum("hed,...id->...hie", one, x) for one in (q, k))
        if self.rotary:
            positions = torch.arange(x.shape[-2], device=x.device)
            queries, keys = rotated(queries, positions), rotated(keys, positions)
        return queries @ keys.mT

    def score_form(self, head: int, product: int, offset: int = 0) -> Float[Tensor, "d_model d_model"]:
        """The matrix M of one score, x_i^T M x_j, for a key `offset` positions before its query.

        Args:
            head: Number of the head.
            product: 1 or 2, which of the two scores.
            offset: i - j; matters with rotary positions only.

        Raises:
            ValueError: For a head or product that does not exist.
        """
        if not 0 <= head < self.n_heads:
            raise ValueError(f"head {head}: the layer has heads 0 to {self.n_heads - 1}")
        if product not in (1, 2):
            raise ValueError(f"product must be 1 or 2, got {product}")
        q, k = (self.q1, self.k1) if product == 1 else (self.q2, self.k2)
        queries = q[head]
        if self.rotary:
            # R_i^T R_j is a rotation by j - i, put on the query's side.
            queries = rotated(queries.T, torch.full((self.d_model,), offset, device=q.device)).T
        return queries.T @ k[head]

    def at(self, context: Tensor) -> Layer:
        """The layer as a function of the last position alone, for a given context: exactly a bilinear layer.

        A query reads each key through two linear maps, and writes that key's value: heads x positions products.
        What the query attends to at its own position is of higher degree and not included.

        Args:
            context: (position, d_model), the positions before the query.

        Returns:
            Query to output, `d_model` to `d_model`.
        """
        check_tensor("context", context, (None, self.d_model), self.q1)
        length = len(context)
        w, v = [], []
        for head in range(self.n_heads):
            for offset, key in zip(range(length, 0, -1), context, strict=True):
                w.append(self.score_form(head, 1, offset) @ key)
                v.append(self.score_form(head, 2, offset) @ key)
        writes = torch.einsum("hde,hef,jf->dhj", self.o, self.v, context).flatten(1)
        return Layer(torch.stack(w), torch.stack(v), writes * self.scale)

    def path_weights(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        reads: Tensor | None = None,
        writes: Tensor | None = None,
        offset: int = 0,
    ) -> "PathWeights":
        """How strongly given directions attend to each other and move each other, per head; exact.

        Args:
            queries: (d_model, n) directions at the query, as columns.
            keys: (d_model, m) directions at the key.
            reads: (d_model, p) directions that a value is read from; `keys` by default.
            writes: (d_model, r) directions that an output is measured along; `queries` by default.
            offset: Positions between query and key.

        Returns:
            Both scores and the value path.
        """
        reads, writes = keys if reads is None else reads, queries if writes is None else writes
        for name, one in (("queries", queries), ("keys", keys), ("reads", reads), ("writes", writes)):
            check_tensor(name, one, (self.d_model, None), self.q1)
        scores = [
            torch.stack([queries.T @ self.score_form(head, product, offset) @ keys for head in range(self.n_heads)])
            for product in (1, 2)
        ]
        values = torch.einsum("dr,hde,hef,fp->hrp", writes, self.o, self.v, reads)
        return PathWeights(scores[0], scores[1], values * self.scale)

    def to(self, *args: Any) -> "Attention":
        """The layer in another dtype or on another device."""
        values: Any = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: Any = {name: x.to(*args) if isinstance(x, Tensor) else x for name, x in values.items()}
        return Attention(**moved)


@dataclass(frozen=True, eq=False)
class PathWeights:
    """Exact edge weights of attention between directions.

    Attributes:
        first: First score of a query direction with a key direction.
        second: Second score.
        value: What a read direction adds along a write direction, per unit of the scores' product; scale included.
    """

    first: Float[Tensor, "head n m"]
    second: Float[Tensor, "head n m"]
    value: Float[Tensor, "head r p"]


def rotated(x: Float[Tensor, "*batch position d"], positions: Tensor) -> Float[Tensor, "*batch position d"]:
    """Rotary positions: adjacent pairs turned by position times a frequency that falls with their place."""
    d = x.shape[-1]
    frequencies = _BASE ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
    angles = positions.double()[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class BilinearAttention(nn.Module):
    """Bilinear attention as a module; see `Attention`.

    Attributes:
        q1: Linear, d_model to heads x d_head; likewise k1, q2, k2, v.
        o: Linear, heads x d_head to d_model.
    """

    def __init__(self, d_model: int, n_heads: int, *, causal: bool = True, rotary: bool = False) -> None:
        """Weights as torch draws them for linear layers.

        Raises:
            ValueError: If the heads do not share out the width.
        """
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is no multiple of n_heads {n_heads}")
        self.n_heads, self.causal, self.rotary = n_heads, causal, rotary
        self.q1, self.k1, self.q2, self.k2, self.v, self.o = (nn.Linear(d_model, d_model, bias=False) for _ in range(6))

    def attention(self) -> Attention:
        """The layer with the module's present weights."""
        maps = (self.q1, self.k1, self.q2, self.k2, self.v)
        q1, k1, q2, k2, v = (one.weight.unflatten(0, (self.n_heads, -1)) for one in maps)
        o = self.o.weight.unflatten(1, (self.n_heads, -1)).movedim(1, 0)
        return Attention(q1, k1, q2, k2, v, o, 1 / q1.shape[1], self.causal, self.rotary)

    def forward(self, x: Float[Tensor, "*batch position d_model"]) -> Float[Tensor, "*batch position d_model"]:
        """The layer's output."""
        return self.attention()(x)
