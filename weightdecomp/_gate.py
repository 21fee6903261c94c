"""Soft gates and the masks that they and the sources make, fused: one pass forward and one backward by hand.

A refinement step spends most of what it spends outside matrix products here, so that every pass over the
activations counts.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_RAMP = 0.5  # width of a gate's ramp, as a share of its threshold
_LEAK = 0.01  # slope of the surrogate gradient below a ramp (VPD, S6)
_LEAST = 1e-12  # threshold below which a ramp gets no narrower


def gated(
    activations: Float[Tensor, "*batch component"],
    thresholds: Float[Tensor, "arm=2 component"],
    sources: Float[Tensor, "*batch component"],
    pool: Float[Tensor, "group source"],
    group: Int[Tensor, " attacked"],
) -> tuple[Float[Tensor, "*batch component"], Float[Tensor, ""]]:
    """Masks m = g + (1 - g) s of soft gates g, and how many gates are open.

    A gate's height is 0.5 at its threshold; g is the height clamped to [0, 1].

    Args:
        activations: Sizes of the contributions.
        thresholds: Where each arm opens.
        sources: Of every component, all in one tensor that is kept for the backward pass.
        pool: The adversary's sources, to hand their gradient to.
        group: Row of the pool that each of the first inputs took its sources from.

    Returns:
        The masks; their gradient leaks below a ramp only where the loss wants the gate to rise. And the mean
        number of open gates per row, whose slope ends where a ramp does: beyond it a price would only shrink what is
        open for certain, by more the lower its threshold.

    Source:
        The gradients inside a ramp and below it after VPD (Goodfire 2026, S6); the rest is ours.
    """
    return _Gated.apply(activations, thresholds, sources, pool, group)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, thresholds: Tensor, sources: Tensor, pool: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor]:
        steep = 1 / (_RAMP * thresholds.clamp_min(_LEAST))
        shift = 0.5 - thresholds * steep
        up, down = torch.addcmul(shift[0], a, steep[0]), torch.addcmul(shift[1], a, steep[1], value=-1)
        height = torch.maximum(up, down)
        # Which arm a height is from: 1, -1, or 0 where both agree, which then share the gradient.
        arm = up.sub_(down).sign_()
        g = height.clamp(0, 1)
        n_rows = max(a[..., 0].numel(), 1)
        ctx.save_for_backward(arm, height, g, sources, steep, group)
        ctx.n_rows, ctx.pool = n_rows, pool.shape
        return torch.lerp(sources, torch.ones_like(sources[..., :1]), g), g.sum() / n_rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        arm, height, g, sources, steep, group = ctx.saved_tensors
        mask, n_open = grads[0], grads[1] / ctx.n_rows
        pool = None
        if ctx.needs_input_grad[3]:
            some = mask[: len(group)]
            change = torch.addcmul(some, some, g[: len(group)], value=-1)
            change = change.flatten(1, -2).sum(1) if change.ndim > 2 else change
            pool = change.new_zeros(ctx.pool)
            pool[:, :-1].index_add_(0, group, change)
        by_g = torch.addcmul(mask, mask, sources, value=-1)
        leaked = by_g.clamp_max(0).mul_(_LEAK).mul_(height <= 0)
        by_height = torch.where(g == height, by_g.add_(n_open), leaked)
        slope = torch.addcmul((steep[0] - steep[1]) / 2, arm, (steep[0] + steep[1]) / 2)
        return by_height.mul_(slope), None, None, pool, None
