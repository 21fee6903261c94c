"""Fine-tuning, full or low-rank: what an edit of components has to be compared with."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, call

Run = Callable[[Batch], Any]


def tuned(
    model: nn.Module,
    loss: Callable[[Run], Tensor],
    *,
    rank: int | None = None,
    steps: int = 200,
    rate: float = 1e-3,
    until: Callable[[Run], bool] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A copy of a model trained on a loss with Adam, in all parameters or by low-rank changes of its matrices.

    Args:
        model: The model, which stays as it is; it is run in the mode that it is in.
        loss: `loss(run)` gives what to lower, where `run(batch)` is the tuned model's output on a batch.
        rank: Of the change of every parameter with two axes or more (flattened to a matrix after the first), other
            parameters are kept; None trains all parameters in full.
        steps: Most steps.
        rate: Adam's step size.
        until: `until(run)` after every step ends the training where it is true.
        seed: Of the low-rank factors.

    Returns:
        The tuned copy.

    Raises:
        ValueError: For a rank or a number of steps below 1, a model without parameters to train, or a loss that is NaN
            or infinite.

    Source:
        LoRA (arXiv 2106.09685), section 4.1: the change is B A, A drawn at random and B zero at the start.
    """
    for name, value in (("rank", rank), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    twin = copy.deepcopy(model)
    adapters = [] if rank is None else _adapters(twin, rank, seed)
    trained = [x for one in adapters for x in (one.b, one.a)] if rank is not None else _floating(twin)
    if not trained:
        raise ValueError("the model has no parameters to train")
    for parameter in _floating(twin):
        parameter.requires_grad_(rank is None or parameter.ndim > 1)

    def run(batch: Batch) -> Any:
        return call(twin, batch)

    optimiser = torch.optim.Adam(trained, lr=rate)
    for step in range(steps):
        with torch.enable_grad():
            twin.zero_grad()
            reached = loss(run)
            if not torch.isfinite(reached):
                came = float(reached.detach())
                raise ValueError(f"the loss is {came} after {step} steps; lower rate ({rate:g}) or mend it")
            reached.backward()
        with torch.no_grad():
            for one in adapters:
                one.take_gradient()
            optimiser.step()
            for one in adapters:
                one.put_change()
            if until is not None and until(run):
                break
    twin.zero_grad()
    for parameter, before in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
    return twin


class _Adapter(NamedTuple):
    """A matrix `start + b a` of the copy; the chain rule is written out, so that any module may use the matrix."""

    matrix: nn.Parameter
    start: Tensor
    b: Float[Tensor, "d_out rank"]
    a: Float[Tensor, "rank d_in"]

    def take_gradient(self) -> None:
        """Gradients of the factors from the matrix's own."""
        if self.matrix.grad is None:
            self.b.grad = self.a.grad = None
            return
        whole = self.matrix.grad.flatten(1)
        self.b.grad, self.a.grad = whole @ self.a.T, self.b.T @ whole

    def put_change(self) -> None:
        """Write the product into the matrix."""
        self.matrix.copy_(self.start + (self.b @ self.a).reshape(self.start.shape))


def _floating(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.is_floating_point()]


def _adapters(model: nn.Module, rank: int, seed: int) -> list[_Adapter]:
    rng, found = torch.Generator().manual_seed(seed), []
    for matrix in _floating(model):
        if matrix.ndim > 1:
            d_out, d_in = matrix.flatten(1).shape
            a = (torch.randn(rank, d_in, generator=rng, dtype=torch.float64) / d_in**0.5).to(matrix)
            found.append(_Adapter(matrix, matrix.detach().clone(), matrix.detach().new_zeros(d_out, rank), a.detach()))
    return found
