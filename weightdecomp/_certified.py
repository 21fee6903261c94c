"""The certified damage of a small model: its own forward pass on boxes, over all masks at once."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._attack import Part, ablated_divergence
from weightdecomp._batches import call, unpadded, without_padding
from weightdecomp._bound import kl_upper, masked_site_output, mse_upper
from weightdecomp._divergence import kl, mse, output_tensor
from weightdecomp._forward import Operands, masked, replaced
from weightdecomp._interval import Interval
from weightdecomp._pretrained import Pretrained
from weightdecomp._regimes import Figure, Trial, all_at
from weightdecomp._sites import Site

_MOST_PRODUCTS = 2e10  # multiplications in the sites' boxes: some tens of seconds

_Upper = Callable[[Tensor, Interval], Tensor]
_UPPER: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], _Upper]] = {
    "mse": (mse, mse_upper),
    "kl": (kl, kl_upper),
}


class NoBound(ValueError):
    """A certified bound that cannot be had, with the reason."""


def certified(trial: Trial) -> tuple[Figure | None, str]:
    """An upper bound of the mean divergence over every mask, sources free for every input, position and call.

    Interval arithmetic through the model's own code. The box of a site is exact for known inputs; what boxes
    lose is that entries move together, so the bound grows with depth.

    Returns:
        The bound, or None with the reason: too large, no rule for an operation or the divergence, an infinite
        box.
    """
    try:
        divergence = _bounded(trial)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        # The model's own code meets intervals where it expects tensors, and may refuse them in its own words.
        return None, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if not divergence < torch.inf:
        return None, "the box of outputs is unbounded"
    note = "the worst case is at most this, sources free everywhere"
    return trial.figure(divergence, "bound", "interval arithmetic", note), ""


def products(trial: Trial) -> float:
    """Multiplications that the sites' boxes take."""
    total = 0.0
    for site in trial.ablation.sites:
        rows = sum(g[..., 0].numel() for part in trial.parts for g in part.importances[site.path])
        total += rows * len(trial.ablation.pieces[site.path].owner) * site.shape[0] * site.shape[1]
    return total


@torch.no_grad()
def _bounded(trial: Trial) -> float:
    cost = products(trial)
    if cost > _MOST_PRODUCTS:
        raise NoBound(f"too large: {cost:.1e} products, limit {_MOST_PRODUCTS:.0e}; pass fewer inputs")
    upper = _upper(trial)
    total, entries = 0.0, 0
    for part in trial.parts:
        found = upper(output_tensor(part.target), _box(trial, part))
        total, entries = total + float(found.sum()), entries + found.numel()
    return total / entries


def _upper(trial: Trial) -> _Upper:
    """The bound of the run's divergence, known by its name and confirmed by its value."""
    name, part, ablation = trial.ablation.divergence.name, trial.parts[0], trial.ablation
    if name not in _UPPER:
        raise NoBound(f"the divergence {name!r} has no rule for boxes")
    function, upper = _UPPER[name]
    masks, _ = all_at(0.0)(part)
    output = masked(ablation.model, part.batch, ablation.sites, ablation.pieces, masks)
    own = ablated_divergence(ablation, part.batch, part.target, masks)
    if not torch.allclose(own, function(output_tensor(output), output_tensor(part.target)).to(own.dtype)):
        raise NoBound(f"the divergence {name!r} is the caller's own and has no rule for boxes")
    return upper


def _box(trial: Trial, part: Part) -> Interval:
    """The box of outputs of one part."""
    ablation = trial.ablation
    layouts = {site.path: _layout(site) for site in ablation.sites}

    def forward(site: Site, index: int, operands: Operands) -> Interval:
        layout, own = layouts[site.path], ablation.pieces[site.path]
        importance, remainder = part.importances[site.path][index], ablation.remainders.get(site.path)
        bias = getattr(site.module, "bias", None)
        box = masked_site_output(_rows(layout, operands), own, importance, remainder, bias)
        like = tuple(x.lo if isinstance(x, Interval) else x for x in operands)
        return Interval(layout.write(box.lo, like), layout.write(box.hi, like))

    with replaced(ablation.sites, forward):
        output = call(_unwrapped(ablation.model), part.batch)
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    output = output[0] if isinstance(output, tuple | list) else output
    box, held = Interval.of(output), unpadded(part.batch)
    return Interval(*(without_padding(end, held) for end in (box.lo, box.hi)))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model whose own code boxes go through; what `Pretrained` makes of its output expects tensors."""
    if not isinstance(model, Pretrained):
        return model
    if model.pooling is not None:
        raise NoBound("an embedding that is pooled over positions has no rule for boxes")
    return model.inner


def _layout(site: Site) -> Site:
    """The site in double precision without its bias: only how its rows lie in its input and output.

    Rows are a selection of input entries, so both ends of a box go through exactly.
    """
    module = copy.deepcopy(site.module).double()
    module.bias = None
    return replace(site, module=module)


def _rows(layout: Site, operands: Operands) -> Interval | Float[Tensor, "*batch d_in"]:
    """A site's input rows, as a box where its input is one."""
    if isinstance(layout.module, nn.Bilinear):
        left, right = operands[:2]
        return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
    if isinstance(operands[0], Interval):
        return Interval(layout.vectors((operands[0].lo,)), layout.vectors((operands[0].hi,)))
    return layout.vectors(operands)
