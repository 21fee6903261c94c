"""Rewriting: layers put back into a copy of their model, and gates annealed away by finetuning."""

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from bilinear._gated import GatedLayer
from bilinear._layer import Layer
from bilinear._modules import BilinearMLP, GatedMLP
from bilinear._squares import Squares

HINT = "the components of eigenpairs are .squares(), those of a truncation or a fit .squares"


def write_back(model: nn.Module, layers: Mapping[str, Layer | GatedLayer | Squares]) -> nn.Module:
    """A copy of the model with layers or components in place of modules, as real weights.

    Args:
        model: Any module; it is not changed.
        layers: By module path, what to put there. Its weights take on the dtype and device of the module's.

    Returns:
        The copy, in the model's mode.

    Raises:
        ValueError: If there is no module at a path.
        TypeError: For what is no layer and no components.
    """
    modules = dict(model.named_modules())
    for path in layers:
        if path not in modules:
            raise ValueError(f"no module at {path!r}; the model has {sorted(name for name in modules if name)}")
    changed = copy.deepcopy(model)
    for path, found in layers.items():
        layer = found.layer() if isinstance(found, Squares) else found
        if not isinstance(layer, Layer | GatedLayer):
            raise TypeError(f"{path!r}: expected a bilinear.Layer or Squares, got {type(found).__name__}; {HINT}")
        module: nn.Module = layer.module()
        like = next(modules[path].parameters(), None)
        module = module if like is None else module.to(like)
        changed = put(changed, path, module.train(modules[path].training))
    return changed


def put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put a module at a path, in place; returns the model, or the module itself at the empty path."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


def bilinear_finetuned(
    model: nn.Module,
    batches: Iterable[object],
    loss: Callable[[nn.Module, object], Tensor],
    *,
    rate: float = 1e-3,
    anneal: float = 0.3,
    on_step: Callable[[int, float, float], None] | None = None,
) -> nn.Module:
    """A copy of a gated model finetuned until every gate is linear, its gated MLPs then exactly bilinear ones.

    The sharpness of all gates falls linearly from 1 to 0 over the first share of the steps; the rest recovers.

    Args:
        model: With `GatedMLP` modules (`GatedLayer.module()` makes one of a foreign layer); it is not changed.
        batches: One a step; all are read first, since the schedule depends on their number.
        loss: `loss(model, batch)`, a scalar to minimise.
        rate: AdamW's step size.
        anneal: Share of the steps over which gates are annealed.
        on_step: Called with the step, the loss and the sharpness.

    Returns:
        The copy, in eval mode, with `BilinearMLP` in place of every `GatedMLP`.

    Raises:
        ValueError: If there is no gated module, no batch, or the share is not in (0, 1].

    Source:
        Annealing beta over the first 30 % of the tokens: Pearce et al. (arXiv 2410.08417), appendix J.
    """
    steps = list(batches)
    paths = [name for name, module in model.named_modules() if isinstance(module, GatedMLP)]
    if not paths:
        raise ValueError("the model has no bilinear.GatedMLP; put one in with bilinear.read(module).module()")
    if not steps:
        raise ValueError("batches are empty; finetuning takes one batch a step")
    if not 0 < anneal <= 1:
        raise ValueError(f"anneal must be in (0, 1], got {anneal}")
    tuned = copy.deepcopy(model).train()
    gated = [one for one in tuned.modules() if isinstance(one, GatedMLP)]
    optimiser = torch.optim.AdamW(tuned.parameters(), lr=rate)
    for step, batch in enumerate(steps):
        sharpness = max(0.0, 1 - (step + 1) / (anneal * len(steps)))
        for one in gated:
            one.sharpness = sharpness
        optimiser.zero_grad()
        value = loss(tuned, batch)
        value.backward()
        optimiser.step()
        if on_step is not None:
            on_step(step, float(value.detach()), sharpness)
    for path in paths:
        tuned = put(tuned, path, _linear_gate(tuned.get_submodule(path)))
    return tuned.eval()


def _linear_gate(module: nn.Module) -> BilinearMLP:
    """The bilinear module that a gated one at sharpness 0 computes: half of d."""
    assert isinstance(module, GatedMLP)
    found = BilinearMLP.empty(module.w.in_features, module.w.out_features, module.d.out_features)
    for name in ("w", "v", "d"):
        setattr(found, name, getattr(module, name))
    with torch.no_grad():
        found.d.weight /= 2
    return found
