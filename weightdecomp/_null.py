"""The null of a run: weights of the same norms in random directions, priced the same way."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from weightdecomp._batches import select, size, tensors
from weightdecomp._config import Config
from weightdecomp._divergence import Divergence, output_tensor
from weightdecomp._fit import priced
from weightdecomp._ledger import behaviour_bits
from weightdecomp._processes import ALONE, Processes
from weightdecomp._sample import NoEffect, Sample, taken, without
from weightdecomp._sites import Site, bound_site, put_weight

_DRAWS = 2  # random models
_CLEAR = 1.5  # times cheaper or dearer than the first one, from which it is not asked twice
_ROWS = 4096  # rows (inputs or positions) that a random model is priced on, of all its inputs and at least of a few
_FEWEST = 16
_STREAM = 7919  # apart from every seed a user is likely to have made a model with


def redrawn(model: nn.Module, sites: Sequence[Site], rng: torch.Generator) -> tuple[nn.Module, tuple[Site, ...]]:
    """A copy of the model whose weight vectors keep their norms but point in random directions.

    The vectors are those of the matrix's longer side (features in a wide matrix, outputs in a tall one).
    """
    twin = copy.deepcopy(model)
    found = []
    for site in sites:
        matrix = site.matrix()
        axis = 0 if matrix.shape[1] >= matrix.shape[0] else 1
        random = torch.randn(matrix.shape, generator=rng, device=matrix.device, dtype=matrix.dtype)
        random *= matrix.norm(dim=axis, keepdim=True) / random.norm(dim=axis, keepdim=True)
        put_weight(twin, site, random)
        bound = bound_site(twin, site.path, site.n_calls)
        assert bound is not None
        found.append(bound)
    return twin, tuple(found)


def effort(model: nn.Module, sample: Sample, sites: Sequence[Site], bits: float, tolerance: float) -> float:
    """Bits that the components cost per bit of the behaviour that the weights make.

    Behaviour is what ablating all sites takes away from the output, priced at the same tolerance.
    """
    with torch.no_grad():
        change = output_tensor(sample.record.output) - output_tensor(without(model, sample.batch, sites))
    return bits / max(behaviour_bits(change.flatten(0, -2), tolerance), 1e-9)


def null_effort(
    model: nn.Module,
    known: Sample,
    sites: Sequence[Site],
    divergence: Divergence,
    tolerance: float,
    config: Config,
    seed: int,
    spent: float,
    processes: Processes = ALONE,
) -> float | None:
    """Mean effort of random models at the same tolerance: what architecture and data alone would cost.

    One model is enough where its effort is far from what the target `spent`. None where no random model does
    anything, so that none has a cost: thresholds that only trained weights reach.

    A network that learnt nothing costs as much per bit of its behaviour as another random one; only what is cheaper
    than that is a mechanism. Source: ours.
    """
    device = tensors(known.batches[0])[0].device
    rng = torch.Generator(device=device).manual_seed(seed + _STREAM)
    most = max(_FEWEST, _ROWS // known.rows_per_input)
    some = [select(batch, torch.arange(min(size(batch), most), device=device)) for batch in known.batches]
    found = []
    for _ in range(_DRAWS):
        twin, twins = redrawn(model, sites, rng)
        try:
            sample = taken(twin, some, twins, divergence, max(1, config.sample // 4), rng, processes)
        except NoEffect:
            continue
        own = processes.own(twins)
        share = tolerance / len(twins)
        cheapest = [priced(twin, sample, site, divergence, tolerance, config, share).bits for site in own]
        bits = torch.tensor(sum(cheapest), dtype=torch.float64)
        found.append(effort(twin, sample, twins, float(processes.sum(bits)), tolerance))
        if spent > _CLEAR * found[-1] or found[-1] > _CLEAR * spent:
            break
    return sum(found) / len(found) if found else None
