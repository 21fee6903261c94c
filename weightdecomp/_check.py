"""Checks of what the user passes, before any work is done."""

from typing import Any

import torch
from torch import nn

from weightdecomp._batches import Batch, call
from weightdecomp._divergence import output_tensor

_STOCHASTIC = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RReLU,
)


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance outside (0, 1)."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise ValueError(
            f"tolerance must be between 0 and 1 (a share of the damage of ablating everything), got {tolerance!r}"
        )


def check_model(model: nn.Module, batch: Batch) -> Any:
    """Refuse a model that cannot be decomposed, and return its output on one batch.

    Raises:
        ValueError: For training mode with dropout or batch statistics, NaN or infinity in weights or outputs, inputs
            of a type the model cannot take, or outputs that change between identical calls.
        TypeError: For something that is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        active = module.training and isinstance(module, _STOCHASTIC) and getattr(module, "p", 1) > 0
        if active or (module.training and getattr(module, "dropout", 0) and isinstance(module, nn.MultiheadAttention)):
            raise ValueError(
                f"model is in training mode: {path or 'it'!r} ({type(module).__name__}) is random or uses batch "
                "statistics; call model.eval() first"
            )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"parameter {name!r} contains NaN or infinity; decompose a checkpoint with finite weights")
    with torch.no_grad():
        output = _called(model, batch)
        again = _called(model, batch)
    first, second = _tensor(output), _tensor(again)
    if first is not None and second is not None:
        if not torch.isfinite(first).all():
            raise ValueError("the model's output on the first batch contains NaN or infinity; check the inputs' scale")
        if not torch.equal(first, second):
            raise ValueError(
                "the model's output changes between identical calls, so no ablation can be measured; "
                "call model.eval() and remove sampling or state from forward"
            )
    return output


def _tensor(output: Any) -> torch.Tensor | None:
    """The output tensor, or None where only the user's own divergence can read the output."""
    try:
        return output_tensor(output)
    except TypeError:
        return None


def _called(model: nn.Module, batch: Batch) -> Any:
    try:
        return call(model, batch)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"the model fails on the first batch: {error}; pass batches as the model takes them "
            "(a tensor, a tuple of positional arguments, or a dict of keyword arguments, with its dtypes)"
        ) from error
