"""The adversary: sources in [0, 1] that make the masked output as different from the target's as it can find."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weightdecomp._batches import Batch, select, size
from weightdecomp._divergence import Divergence
from weightdecomp._forward import Masks, masked
from weightdecomp._pieces import Pieces
from weightdecomp._sites import Site

_STEP = 0.2  # first sign step; later ones shrink as the root of the step number
_MOMENTUM = 0.75  # share of the old direction kept (Dong et al. 2018, arXiv 1710.06081)


class Ablation(NamedTuple):
    """Everything that fixes a masked forward pass except the sources.

    Attributes:
        model: The target.
        sites: Its decomposed sites.
        pieces: Components of each site.
        divergence: Between a masked output and the target's.
        remainders: Per site, what its components do not sum to; sites with none are left out.
    """

    model: nn.Module
    sites: Sequence[Site]
    pieces: Mapping[str, Pieces]
    divergence: Divergence
    remainders: Mapping[str, Float[Tensor, "d_out d_in"]]


Sources = dict[str, Float[Tensor, "group source"]]  # per site: a source per component, and one for the remainder


def drawn_sources(ablation: Ablation, groups: int, rng: torch.Generator) -> Sources:
    """Uniform sources, one row a group of inputs."""
    found = {}
    for site in ablation.sites:
        v = ablation.pieces[site.path].v
        shape = (groups, ablation.pieces[site.path].n + 1)
        found[site.path] = torch.rand(shape, generator=rng, device=v.device, dtype=v.dtype)
    return found


def _per_row(source: Float[Tensor, "group n"], group: Int[Tensor, " input"], like: Tensor) -> Tensor:
    """Each input's source, shaped to broadcast over the site's positions."""
    if like.ndim < 2 or len(like) != len(group):
        return source[0]  # a site whose rows do not belong to single inputs shares the first group's source
    return source[group].reshape(len(group), *[1] * (like.ndim - 2), source.shape[-1])


def masks_from(
    importances: Masks, sources: Sources, group: Int[Tensor, " input"]
) -> tuple[Masks, dict[str, Tensor]]:
    """Masks m = g + (1 - g) s of the components and m = s of the remainders."""
    masks, remainder = {}, {}
    for path, calls in importances.items():
        rows = [_per_row(sources[path], group, g) for g in calls]
        masks[path] = [g + (1 - g) * row[..., :-1] for g, row in zip(calls, rows, strict=True)]
        remainder[path] = rows[0][..., -1:]
    return masks, remainder


def ablated_divergence(
    ablation: Ablation, batch: Batch, target: object, masks: Masks, remainder: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Divergence per input of one masked pass; remainders are off unless masks for them are given."""
    remainder = remainder or {}
    remainders = {path: (m, remainder[path]) for path, m in ablation.remainders.items() if path in remainder}
    output = masked(ablation.model, batch, ablation.sites, ablation.pieces, masks, remainders)
    return ablation.divergence(output, target)


def repeated(batch: Batch, times: int, device: torch.device) -> tuple[Batch, Int[Tensor, " input"]]:
    """The batch several times over, and the index of the original of every row."""
    index = torch.arange(size(batch), device=device).repeat(times)
    return select(batch, index), index


def strongest(
    ablation: Ablation,
    batch: Batch,
    target: object,
    importances: Masks,
    budgets: Sequence[int],
    restarts: int,
    per_input: bool,
    rng: torch.Generator,
) -> Float[Tensor, "budget restart"]:
    """Mean divergence of the worst sources found within each number of ascent steps.

    Sign ascent with momentum from a uniform, an all-zero and further uniform starts, run side by side. The figure of
    a budget is the best of all steps up to it, so the ladder never falls. It is a lower bound of the worst case.

    Args:
        ablation: The masked model.
        batch: One batch; every input keeps its own importances.
        target: The target's output on it.
        importances: Per site and call, in [0, 1].
        budgets: Ascending numbers of steps.
        restarts: Starts run side by side.
        per_input: Let every input have sources of its own instead of sharing one set.
        rng: For the starts.
    """
    n, device = size(batch), next(iter(ablation.pieces.values())).v.device
    tiled, index = repeated(batch, restarts, device)
    restart = torch.arange(restarts, device=device).repeat_interleave(n)
    group = torch.arange(n * restarts, device=device) if per_input else restart
    tiled_target = _tiled_output(target, index, n)
    tiled_importances = {
        path: [g[index] if g.ndim > 1 and len(g) == n else g for g in calls] for path, calls in importances.items()
    }
    sources = drawn_sources(ablation, int(group[-1]) + 1, rng)
    if restarts > 1:
        second = group[restart == 1]
        for source in sources.values():
            source[second] = 0
    return _ascent(ablation, tiled, tiled_target, tiled_importances, sources, group, budgets, restarts, per_input)


def _ascent(
    ablation: Ablation,
    batch: Batch,
    target: object,
    importances: Masks,
    sources: Sources,
    group: Int[Tensor, " input"],
    budgets: Sequence[int],
    restarts: int,
    per_input: bool,
) -> Float[Tensor, "budget restart"]:
    paths = list(sources)
    drift = {path: torch.zeros_like(source) for path, source in sources.items()}
    best, ladder = None, []
    for step in range(budgets[-1] + 1):
        leaves = {path: source.requires_grad_() for path, source in sources.items()}
        with torch.enable_grad():
            masks, remainder = masks_from(importances, leaves, group)
            divergence = ablated_divergence(ablation, batch, target, masks, remainder)
            grads = torch.autograd.grad(divergence.sum(), list(leaves.values()), allow_unused=True)
        found = divergence.detach().reshape(restarts, -1)
        # With sources of their own every input keeps its own worst; shared sources are one choice for all.
        found = found if per_input else found.mean(1, keepdim=True)
        best = found if best is None else torch.maximum(best, found)
        if step in budgets:
            ladder.append(best.mean(1))
        rate = _STEP / (1 + step / 20) ** 0.5
        for path, grad in zip(paths, grads, strict=True):
            if grad is not None:
                size_of = grad.abs().mean(-1, keepdim=True).clamp_min(1e-30)
                drift[path] = _MOMENTUM * drift[path] + grad / size_of
            sources[path] = (sources[path].detach() + rate * drift[path].sign()).clamp(0, 1)
    return torch.stack(ladder)


def _tiled_output(output: object, index: Tensor, n: int) -> object:
    if isinstance(output, Tensor):
        return output[index] if output.ndim and len(output) == n else output
    if isinstance(output, dict):
        return type(output)(**{key: _tiled_output(value, index, n) for key, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_tiled_output(value, index, n) for value in output)
    return output
