"""The null of a run: the same weights in random order, decomposed the same way."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from weightdecomp._attack import Ablation
from weightdecomp._batches import Batch
from weightdecomp._config import Config
from weightdecomp._divergence import Divergence
from weightdecomp._fit import Gatekeeper, chosen_start
from weightdecomp._sample import taken
from weightdecomp._sites import Site, bound_site


def shuffled(model: nn.Module, sites: Sequence[Site], rng: torch.Generator) -> tuple[nn.Module, tuple[Site, ...]]:
    """A copy of the model whose sites hold their own entries in random order."""
    twin = copy.deepcopy(model)
    found = []
    for site in sites:
        module = twin.get_submodule(site.path)
        weight = site.weight.detach()
        order = torch.randperm(weight.numel(), generator=rng, device=weight.device)
        module.weight = nn.Parameter(weight.flatten()[order].reshape(weight.shape), requires_grad=False)
        bound = bound_site(twin, site.path, site.n_calls)
        assert bound is not None
        found.append(bound)
    return twin, tuple(found)


def null_bits(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    divergence: Divergence,
    tolerance: float,
    config: Config,
    seed: int,
) -> float:
    """Bits per input of the shuffled model at the same tolerance: what its architecture and data alone give.

    A network that learnt nothing costs as much as its own shuffle, since both are random; only what is cheaper than
    that is a mechanism. Source: ours.
    """
    device = sites[0].weight.device
    rng = torch.Generator(device=device).manual_seed(seed)
    twin, twins = shuffled(model, sites, rng)
    sample = taken(twin, batches, twins, divergence, config.sample, rng)
    pieces = {
        site.path: chosen_start(twin, sample, site, divergence, tolerance, config).pieces for site in twins
    }
    ablation = Ablation(twin, twins, pieces, divergence, {})
    return Gatekeeper(ablation, sample, tolerance, seed).gates().ledger.per_input
