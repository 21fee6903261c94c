"""The trainer that all sparse coders share: Adam with warm-up and decay over random rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from weightdecomp.baselines._data import Inapplicable, OnStep


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of gradient training, the same for every trained method.

    Attributes:
        steps: Gradient steps.
        batch: Rows (or inputs, where the whole model is run) in a step.
        rate: Step size of Adam.

    Source:
        Adam with betas (0.9, 0.999), linear decay over the last fifth as in Anthropic's April 2024 update; warm-up of
        5 %. The published rate of 3e-4 suits 1e5 steps; 3e-3 at 2,000 steps is what recovers planted dictionaries here.
    """

    steps: int = 2000
    batch: int = 512
    rate: float = 3e-3

    def __post_init__(self) -> None:
        """Refuse values that no training can use."""
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be positive and finite, got {self.rate}")


def trained(
    parameters: Sequence[Tensor],
    loss: Callable[[Int[Tensor, " row"], float], Tensor],
    rows: int,
    training: Training,
    rng: torch.Generator,
    after: Callable[[], None] | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Minimise a loss over random rows, in place.

    Args:
        parameters: Leaves that require gradients.
        loss: From row numbers and the share of the training done, in [0, 1), a number.
        rows: How many rows there are.
        training: Settings.
        rng: Of the rows drawn.
        after: Called after every step, to put parameters back where they must be.
        on_step: Called with the step and its loss.

    Raises:
        Inapplicable: If the loss is not finite.
    """
    optimiser = torch.optim.Adam(parameters, lr=training.rate)
    size = min(training.batch, rows)
    with torch.enable_grad():
        for step in range(training.steps):
            done = step / training.steps
            for group in optimiser.param_groups:
                group["lr"] = training.rate * min(1.0, (done + 1e-3) / 0.05, (1 - done) / 0.2)
            index = torch.randint(rows, (size,), generator=rng, device=rng.device)
            value = loss(index, done)
            if not bool(value.isfinite()):
                raise Inapplicable(f"the loss is {float(value.detach())} at step {step}; use a smaller rate")
            # Not backward(), which would leave gradients on the target's own parameters (T1).
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            torch.nn.utils.clip_grad_norm_(parameters, 10.0)
            optimiser.step()
            if after is not None:
                after()
            if on_step is not None:
                on_step(step, {"loss": float(value.detach())})
