"""Rules: how a sparse coder turns pre-activations into few latents, and what it pays for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "*batch unit"]


@runtime_checkable
class Rule(Protocol):
    """What sparse coders differ in."""

    @property
    def name(self) -> str:
        """As in `methods=[...]`."""
        ...

    @property
    def setting(self) -> str:
        """In a few words."""
        ...

    @property
    def auxiliary(self) -> bool:
        """Whether dead latents are revived by predicting the residual (AuxK)."""
        ...

    @property
    def unit_norm(self) -> bool:
        """Whether an autoencoder's decoder rows are kept at norm one."""
        ...

    def grid(self) -> Sequence["Rule"]:
        """The levels of sparsity that comparisons try."""
        ...

    def start(self, n: int, like: Tensor) -> Float[Tensor, " _"]:
        """What the rule trains or tracks besides the coder: one number a unit, or one in all."""
        ...

    def latents(self, pre: Latents, state: Tensor, training: bool) -> Latents:
        """Latents from pre-activations."""
        ...

    def penalty(self, latents: Latents, pre: Latents, state: Tensor, norms: Float[Tensor, " unit"]) -> Tensor:
        """What sparsity costs, a number."""
        ...


@dataclass(frozen=True, kw_only=True)
class L1:
    """ReLU latents, paid by size times decoder norm.

    Attributes:
        coefficient: On rows scaled to a mean square of one per dimension.

    Source:
        Bricken et al. 2023 and Anthropic's April 2024 update: `|x - x'|^2 + coefficient sum a_i |d_i|` over rows
        whose mean squared norm is their width; the update's coefficient is 5, sae-lens's default 1.
    """

    coefficient: float = 1.0
    name = "sae l1"
    auxiliary = False
    unit_norm = False

    @property
    def setting(self) -> str:
        """The coefficient."""
        return f"l1 {self.coefficient:g}"

    def grid(self) -> Sequence["L1"]:
        """Coefficients."""
        return [L1(coefficient=c) for c in (0.1, 0.3, 1.0, 3.0)]

    def start(self, n: int, like: Tensor) -> Tensor:
        """Nothing."""
        return like.new_zeros(0)

    def latents(self, pre: Latents, state: Tensor, training: bool) -> Latents:
        """Positive parts."""
        return pre.relu()

    def penalty(self, latents: Latents, pre: Latents, state: Tensor, norms: Tensor) -> Tensor:
        """Mean over rows of the sum of sizes."""
        return self.coefficient * (latents * norms).sum(-1).mean()


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest latents of every row.

    Attributes:
        k: How many.

    Source:
        Gao et al. 2024, arXiv 2406.04093, section 2.3 (k = 32 on language models, AuxK with weight 1/32).
    """

    k: int = 8
    name = "sae topk"
    auxiliary = True
    unit_norm = True

    @property
    def setting(self) -> str:
        """The number."""
        return f"k {self.k}"

    def grid(self) -> Sequence["TopK"]:
        """Numbers of latents."""
        return [TopK(k=k) for k in (2, 4, 8, 16)]

    def start(self, n: int, like: Tensor) -> Tensor:
        """Nothing."""
        return like.new_zeros(0)

    def latents(self, pre: Latents, state: Tensor, training: bool) -> Latents:
        """All but the largest at zero."""
        k = min(self.k, pre.shape[-1])
        values, index = pre.relu().topk(k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, index, values)

    def penalty(self, latents: Latents, pre: Latents, state: Tensor, norms: Tensor) -> Tensor:
        """None."""
        return latents.new_zeros(())


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """As many latents as k a row on average, the largest of the whole batch; one threshold afterwards.

    Attributes:
        k: How many a row.

    Source:
        Bussmann et al. 2024, arXiv 2412.06410; the threshold is a running mean (rate 0.01, sae-lens) of the smallest
        latent kept.
    """

    k: int = 8
    name = "sae batchtopk"
    auxiliary = True
    unit_norm = True

    @property
    def setting(self) -> str:
        """The number."""
        return f"k {self.k}"

    def grid(self) -> Sequence["BatchTopK"]:
        """Numbers of latents."""
        return [BatchTopK(k=k) for k in (2, 4, 8, 16)]

    def start(self, n: int, like: Tensor) -> Tensor:
        """The threshold, tracked without gradients."""
        return like.new_zeros(1)

    def latents(self, pre: Latents, state: Tensor, training: bool) -> Latents:
        """The batch's largest while training, those above the tracked threshold afterwards."""
        positive = pre.relu()
        if not training:
            return positive * (positive > state[0])
        # By number, not by level: rows that come twice in a batch would all fail to be above their own.
        most = positive.numel() // positive.shape[-1] * min(self.k, positive.shape[-1])
        values, index = positive.flatten().topk(most)
        kept = values.detach()[values > 0]
        if len(kept):
            with torch.no_grad():
                state.lerp_(kept[-1], 0.01) if float(state) else state.fill_(kept[-1])
        return torch.zeros_like(positive).flatten().scatter(0, index, values).view_as(positive)

    def penalty(self, latents: Latents, pre: Latents, state: Tensor, norms: Tensor) -> Tensor:
        """None."""
        return latents.new_zeros(())


@dataclass(frozen=True, kw_only=True)
class JumpReLU:
    """Latents above a trained threshold of their own, paid by number.

    Attributes:
        coefficient: Of the mean number of active latents.

    Source:
        Rajamanoharan et al. 2024, arXiv 2407.14435, equations 7 to 12, with the rectangle kernel; threshold at the
        start 0.01 and bandwidth 0.05 as sae-lens has them.
    """

    coefficient: float = 0.3
    name = "sae jumprelu"
    auxiliary = False
    unit_norm = True

    @property
    def setting(self) -> str:
        """The coefficient."""
        return f"l0 {self.coefficient:g}"

    def grid(self) -> Sequence["JumpReLU"]:
        """Coefficients."""
        return [JumpReLU(coefficient=c) for c in (0.03, 0.1, 0.3, 1.0)]

    def start(self, n: int, like: Tensor) -> Tensor:
        """Logarithms of the thresholds, trained."""
        return like.new_full((n,), 0.01).log().requires_grad_()

    def latents(self, pre: Latents, state: Tensor, training: bool) -> Latents:
        """Those above their threshold."""
        return _Jump.apply(pre, state.exp()) if training else pre * (pre > state.exp())

    def penalty(self, latents: Latents, pre: Latents, state: Tensor, norms: Tensor) -> Tensor:
        """Mean number active."""
        return self.coefficient * _Step.apply(pre, state.exp()).sum(-1).mean()


_BANDWIDTH = 0.05


class _Jump(torch.autograd.Function):
    """`pre * (pre > threshold)` whose gradient to the threshold is estimated in a band around it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < _BANDWIDTH / 2).to(pre.dtype) / _BANDWIDTH
        back = (-threshold * near * grads[0]).flatten(0, -2).sum(0)
        return grads[0] * (pre > threshold), back


class _Step(torch.autograd.Function):
    """`pre > threshold` as numbers, whose gradient to the threshold is estimated in a band around it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < _BANDWIDTH / 2).to(pre.dtype) / _BANDWIDTH
        return None, (-near * grads[0]).flatten(0, -2).sum(0)
