"""Modules of other people: their weights as plain tensors, and what they compute, which leaves them as they were."""

from typing import Any

import torch
from torch import Tensor, nn

_HALVES = (torch.float16, torch.bfloat16)
_RTOL = {torch.float16: 0.05, torch.bfloat16: 0.05, torch.float32: 1e-4, torch.float64: 1e-9}


def plain(parameter: Tensor | None) -> Tensor | None:
    """A copy without gradients; half precision becomes float32."""
    if parameter is None:
        return None
    return parameter.detach().float() if parameter.dtype in _HALVES else parameter.detach().clone()


def rounding(module: nn.Module) -> float:
    """Relative error up to which what was read from a module is what it computes, by the module's dtype."""
    return _RTOL[_like(module).dtype]


@torch.no_grad()
def output_of(module: nn.Module, x: Tensor) -> Any:
    """What a module computes in eval mode on inputs, which take on its dtype and device; its mode stays as it is."""
    modes = {one: one.training for one in module.modules()}
    try:
        return module.eval()(x.to(_like(module)))
    finally:
        for one, training in modes.items():
            one.training = training


def _like(module: nn.Module) -> Tensor:
    return next(module.parameters(), torch.empty(()))
