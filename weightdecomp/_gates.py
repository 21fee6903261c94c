"""Gates: on which inputs a component must stay on, read from the component's own activation."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_LEAK = 0.01  # slope of the surrogate gradients beyond the ends of a ramp (VPD, S6)


class Gates(NamedTuple):
    """Two-armed ramps over the components' own activations; two numbers a component.

    The importance rises from 0 to 1 while `a / unit` goes through `at +- width / 2` on the positive arm, and the
    same for `-a` on the negative arm, where a is `Pieces.activations`.

    Attributes:
        at: Middles of the ramps of the two arms, in units of `unit`.
        unit: Typical size of each component's activation where it is active.
        width: Width of the ramps in the same units; 0 makes the gates binary.
    """

    at: Float[Tensor, "arm=2 component"]
    unit: Float[Tensor, " component"]
    width: float

    def signal(self, activations: Float[Tensor, "*batch component"]) -> Float[Tensor, "*batch component"]:
        """Height on the ramp: the importance before it is clamped to [0, 1]."""
        scaled = activations / self.unit
        distance = torch.maximum(scaled - self.at[0], -scaled - self.at[1])
        return distance / self.width + 0.5

    def importances(self, activations: Float[Tensor, "*batch component"]) -> Float[Tensor, "*batch component"]:
        """Importance of each component, in [0, 1]."""
        if self.width == 0:
            scaled = activations / self.unit
            return ((scaled > self.at[0]) | (-scaled > self.at[1])).to(activations.dtype)
        return self.signal(activations).clamp(0, 1)


class _MaskGate(torch.autograd.Function):
    """clamp(z, 0, 1) whose gradient leaks below 0 only where the loss wants the gate to rise (VPD, S6)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: D102
        (z,), grad = ctx.saved_tensors, grads[0]
        inside = (z > 0) & (z <= 1)
        leak = (z <= 0) & (grad < 0)
        return grad * (inside + _LEAK * leak)


def mask_gate(signal: Float[Tensor, "*batch component"]) -> Float[Tensor, "*batch component"]:
    """The importance as it enters masks: a reconstruction loss may raise a closed gate, never lower it."""
    return _MaskGate.apply(signal)  # pyright: ignore[reportReturnType]


def price_gate(signal: Float[Tensor, "*batch component"]) -> Float[Tensor, "*batch component"]:
    """The importance as it enters the sparsity price: a price may lower a fully open gate, never a closed one."""
    return signal.clamp_min(0) - (1 - _LEAK) * (signal - 1).clamp_min(0)
