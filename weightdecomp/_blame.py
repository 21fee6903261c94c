"""Blame: how much of an attack's divergence every gate answers for."""

import math

import torch
from torch import Tensor

from weightdecomp._attack import Ablation, Part, Sources, ablated_divergence, masks_from
from weightdecomp._batches import size


def blamed(ablation: Ablation, part: Part, sources: Sources) -> dict[str, list[Tensor]]:
    """Divide the divergence that shared sources make among the gates that they exploit.

    A gate's share is what opening it on that input would take away, to first order: the slope of the divergence along
    its mask, times the way from its source to 1. Such shares overlap, as any one of many gates may stop an attack, and
    are scaled down so that those of closed gates sum to the divergence. They sum to less only where something that
    switched off hides what did it; what little slope is left elsewhere is not to blame for that. Gates that are open
    have the share that they would have if they closed.

    Args:
        ablation: The masked model.
        part: Inputs with the importances that were attacked.
        sources: The attack, one row for all inputs.

    Returns:
        Shares in units of divergence, per site and call in the shape of the importances; none is negative.

    Source:
        Ours: effects by which thresholds are chosen say what a gate does alone; blame what it does in the company that
        the adversary chooses.
    """
    group = torch.zeros(size(part.batch), dtype=torch.long, device=next(iter(sources.values())).device)
    masks, remainder = masks_from(part.importances, sources, group)
    masks = {path: [mask.detach().requires_grad_() for mask in calls] for path, calls in masks.items()}
    with torch.enable_grad():
        divergence = ablated_divergence(ablation, part.batch, part.target, masks, remainder).sum()
        leaves = [mask for calls in masks.values() for mask in calls]
        slopes = iter(torch.autograd.grad(divergence, leaves, materialize_grads=True))
    found, closed = dict[str, list[Tensor]](), torch.zeros_like(divergence)
    for path, calls in part.importances.items():
        way = 1 - sources[path][0, :-1]
        found[path] = [(-next(slopes)).clamp_min(0).nan_to_num() * way for _ in calls]
        closed = closed + sum((x * (1 - g)).sum() for x, g in zip(found[path], calls, strict=True))
    made, claimed = (float(x) for x in ablation.processes.sums([divergence.detach(), closed.detach()]))
    # None is to blame where no slope is left, or where the output is not finite.
    scale = min(made / claimed, 1.0) if claimed > 0 and math.isfinite(made / claimed) else 0.0
    return {path: [x * scale for x in calls] for path, calls in found.items()}
