"""Causal-effect matching: how well groups of a method's units reproduce what deleting each mechanism does."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.trap_parts import Effects
from weightdecomp._batches import select
from weightdecomp._divergence import output_tensor
from weightdecomp.baselines import Fitted, protocols

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # of groups that are tried, in units
_SHARE = 0.05  # of itself that a unit must give to a mechanism to be its candidate
_EXACT = 1 - 1e-9  # no larger group can be better
_CLAIM = 0.01  # of the weakest mechanism's power above which a unit claims to be one

Unit = tuple[int, int]  # number of the bank, number in it


class Matched(NamedTuple):
    """What a method found of the mechanisms.

    Attributes:
        scores: Per mechanism `1 - E|D* - D_S|^2 / E|D*|^2` of the best group S of units, not below 0.
        sizes: Units in each of these groups.
        effects: What taking out each group does.
        claims: Units whose own effect is not negligible.
    """

    scores: list[float]
    sizes: list[int]
    effects: Effects
    claims: int


@torch.no_grad()
def effect_matching(
    trial: protocols.Trial,
    fitted: Fitted,
    truth: Effects,
    sites: Sequence[set[str]] | None = None,
    most: int | None = None,
) -> Matched:
    """Match disjoint groups of units to mechanisms by what taking them out of the model does.

    A unit belongs to the mechanism that it gives most of itself to when the effects of all units, each taken out
    alone, are added up to a mechanism's effect with shares in [0, 1]; ties and small shares apart, that is a
    convex problem. A group is then the units that give most, taken out together, exactly; of several sizes the best
    counts. Effects do not add up exactly, so that a score is a lower bound; it is the same for every method.

    Args:
        trial: Model and inputs.
        fitted: A method's units.
        truth: The exact effects on these inputs.
        sites: Per mechanism, the sites that hold it, where its units must write; None: anywhere.
        most: Units of one group at most; None: 24.

    Source:
        Ours.
    """
    output = output_tensor(trial.output)
    units = [(number, unit) for number, bank in enumerate(fitted.banks) for unit in range(bank.n)]

    active = _active(trial, fitted)

    def effect(group: Sequence[Unit]) -> Tensor:
        # Where no unit of the group is active, taking it out changes nothing: most inputs, for sparse coders.
        some = torch.stack([active[b][:, u] for b, u in group]).any(0).nonzero().flatten()
        change = torch.zeros_like(output)
        if len(some):
            by_bank = {number: [u for b, u in group if b == number] for number, _ in group}
            there = trial._replace(batch=select(trial.batch, some), output=output[some])
            change[some] = output[some] - output_tensor(protocols.ablated_output(there, fitted, by_bank))
        return change

    own = torch.stack([effect([unit]).flatten() for unit in units])
    goals = truth.flatten(1)
    allowed = torch.ones(len(units), len(truth), dtype=torch.bool)
    if sites is not None:
        writes = [set(fitted.banks[number].writes) for number, _ in units]
        allowed = torch.tensor([[bool(here & there) for there in sites] for here in writes])
    # Units that change nothing, such as latents that are dead on these inputs, belong to nobody.
    live = own.square().sum(1) > 0
    best, owner = torch.zeros(len(units)), torch.zeros(len(units), dtype=torch.long)
    best[live], owner[live] = _shares(own[live], goals, allowed[live]).max(1)
    order = (best * own.norm(dim=1)).argsort(descending=True).tolist()
    scores, sizes, effects = [], [], []
    for mechanism, goal in enumerate(truth):
        mine = [i for i in order if owner[i] == mechanism and best[i] > _SHARE]
        limit = min(len(mine), most or _SIZES[-1])
        found = (0.0, 0, torch.zeros_like(goal))
        for size in sorted({min(size, limit) for size in _SIZES} - {0}):
            change = effect([units[i] for i in mine[:size]])
            score = 1 - float((goal - change).double().square().sum() / goal.double().square().sum())
            found = max(found, (score, size, change), key=lambda one: one[0])
            if score > _EXACT:
                break
        scores.append(found[0])
        sizes.append(found[1])
        effects.append(found[2])
    claims = int((own.square().sum(1) > _CLAIM * goals.square().sum(1).min()).sum())
    return Matched(scores, sizes, torch.stack(effects), claims)


def _active(trial: protocols.Trial, fitted: Fitted) -> list[Bool[Tensor, "input unit"]]:
    """Per bank, on which inputs a unit's inner activation is not zero at some position."""
    n = len(output_tensor(trial.output))
    found = [torch.zeros(n, bank.n, dtype=torch.bool) for bank in fitted.banks]
    for (number, _), code in protocols.codes(trial, fitted).items():
        pieces = (code.inner != 0).reshape(n, -1, code.inner.shape[-1]).any(1)
        owner = fitted.banks[number].owner
        for piece in range(pieces.shape[1]):
            found[number][:, piece if owner is None else owner[piece]] |= pieces[:, piece]
    return found


def _shares(
    own: Float[Tensor, "unit effect"], goals: Float[Tensor, "mechanism effect"], allowed: Tensor, steps: int = 300
) -> Float[Tensor, "unit mechanism"]:
    """Least squares with every share in [0, 1], by accelerated projected gradients."""
    gram, reach = own @ own.T, (own @ goals.T) * allowed
    # Units of very different power make one step size slow; each is measured by its own.
    scale = gram.diagonal().clamp_min(1e-12).rsqrt()
    gram = gram * scale[:, None] * scale
    reach, most = reach * scale[:, None], allowed / scale[:, None]
    rate = 1 / float(torch.linalg.matrix_norm(gram, 2).clamp_min(1e-12))
    shares = torch.zeros_like(reach)
    ahead, weight = shares, 1.0
    for _ in range(steps):
        moved = torch.minimum((ahead - rate * (gram @ ahead - reach)).clamp_min(0), most)
        after = (1 + (1 + 4 * weight * weight) ** 0.5) / 2
        ahead, shares, weight = moved + (weight - 1) / after * (moved - shares), moved, after
    return shares * scale[:, None]
