"""Causal-effect matching: how well groups of a method's units reproduce what deleting each mechanism does."""

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._divergence import output_tensor
from weightdecomp.baselines import Fitted, protocols

_LARGEST = 24  # units tried for one mechanism at most


@torch.no_grad()
def effect_matching(
    trial: protocols.Trial, fitted: Fitted, truth: Float[Tensor, "mechanism input d_output"], most: int | None
) -> list[float]:
    """Per mechanism `1 - E|D* - D_S|^2 / E|D*|^2` of the best group S of units found, groups being disjoint.

    Every unit is a candidate for the one mechanism whose effect its own is most parallel to. Candidates are taken in
    the order of their cosine, as long as any longer group is better; groups are ablated together, exactly. The
    search is greedy, so that a score is a lower bound; it is the same for every method.

    Args:
        trial: Model and inputs.
        fitted: A method's units.
        truth: The exact effects on these inputs.
        most: Units of one group at most; None: 24.

    Source:
        Ours.
    """
    output = output_tensor(trial.output)
    units = [(number, unit) for number, bank in enumerate(fitted.banks) for unit in range(bank.n)]

    def effect(group: list[tuple[int, int]]) -> Tensor:
        by_bank = {number: [u for b, u in group if b == number] for number, _ in group}
        return output - output_tensor(protocols.ablated_output(trial, fitted, by_bank))

    own = torch.stack([effect([unit]).flatten() for unit in units]).double()
    goals = truth.flatten(1).double()
    cosine = (own @ goals.T) / (own.norm(dim=1)[:, None] * goals.norm(dim=1) + 1e-12)
    best, owner = cosine.max(1)
    scores = []
    for mechanism in range(len(truth)):
        mine = [i for i in best.argsort(descending=True).tolist() if owner[i] == mechanism and best[i] > 0.1]
        power = float(goals[mechanism].square().sum())
        score = 0.0
        for size in range(1, min(len(mine), most or _LARGEST) + 1):
            found = effect([units[i] for i in mine[:size]]).flatten().double()
            score = max(score, 1 - float((goals[mechanism] - found).square().sum()) / power)
        scores.append(score)
    return scores
