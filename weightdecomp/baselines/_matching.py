"""Causal-effect matching: how well groups of a method's units reproduce what deleting each known mechanism does."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weightdecomp._batches import call, select
from weightdecomp._divergence import output_tensor
from weightdecomp._forward import Operands, replaced
from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Fitted
from weightdecomp.baselines.protocols import Trial, ablated_output, codes

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # of groups that are tried, in units
_SHARE = 0.05  # of itself that a unit must give to a mechanism to be its candidate
_EXACT = 1 - 1e-9  # no larger group can be better
_CLAIM = 0.01  # of the weakest mechanism's power above which a unit claims to be one

Effects = Float[Tensor, "mechanism input ..."]
Share = Mapping[str, Float[Tensor, "d_out d_in"]]
Unit = tuple[int, int]  # number of the bank, number in it


class Matched(NamedTuple):
    """What a method found of the mechanisms.

    Attributes:
        scores: Per mechanism `1 - E|D* - D_S|^2 / E|D*|^2` of the best group S of units, not below 0.
        sizes: Units in each of these groups; 0 where none is better than nothing.
        effects: What taking out each group does.
        claims: Units whose own effect is not negligible.
    """

    scores: list[float]
    sizes: list[int]
    effects: Effects
    claims: int

    @property
    def score(self) -> float:
        """Mean over mechanisms."""
        return sum(self.scores) / len(self.scores)

    @property
    def splitting(self) -> float | None:
        """Mean units per mechanism, over those that were found at all; None if none was."""
        found = [size for size in self.sizes if size]
        return sum(found) / len(found) if found else None


@torch.no_grad()
def deletions(trial: Trial, truth: Sequence[Share]) -> Effects:
    """What deleting each mechanism's share of the weights takes from the output: `f(x; W) - f(x; W - share)`.

    Args:
        trial: Model and inputs.
        truth: Per mechanism its share of the weights, a matrix of the site's shape by module path.

    Raises:
        ValueError: For no mechanisms, an unknown site, another shape, or a mechanism that does nothing here.
    """
    if not truth:
        raise ValueError("truth is empty; pass one {site: share of its weight} for each mechanism")
    sites, found = {site.path: site for site in trial.sites}, []
    for number, shares in enumerate(truth):
        for path, share in shares.items():
            _check_share(number, path, share, sites)

        def forward(site: Site, _: int, operands: Operands, shares: Share = shares) -> Any:
            rest = site.matrix() - shares[site.path].to(site.matrix()) if site.path in shares else site.matrix()
            return site.write(site.read(operands, rest), operands)

        with replaced(trial.sites, forward):
            found.append(output_tensor(trial.output) - output_tensor(call(trial.model, trial.batch)))
        if not float(found[-1].abs().max()) > 0:
            raise ValueError(f"truth[{number}] changes no output when it is deleted; pass inputs on which it matters")
    return torch.stack(found)


def _check_share(number: int, path: str, share: Tensor, sites: Mapping[str, Site]) -> None:
    if path not in sites:
        near = difflib.get_close_matches(path, sites, n=1, cutoff=0.0)
        raise ValueError(f"truth[{number}] names {path!r}, which is not decomposed; did you mean {near[0]!r}?")
    if tuple(share.shape) != tuple(sites[path].shape):
        wanted = tuple(sites[path].shape)
        raise ValueError(f"truth[{number}][{path!r}] must have the matrix's shape {wanted}, got {tuple(share.shape)}")


@torch.no_grad()
def effect_matching(
    trial: Trial,
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
    units = [(number, unit) for number, bank in enumerate(fitted.banks) for unit in range(bank.n)]
    taken = _Taken(trial, fitted)
    own, goals = torch.stack([taken([unit]).flatten() for unit in units]), truth.flatten(1)
    best, owner = _owners(own, goals, _allowed(fitted, units, sites, len(truth)).to(own.device))
    order = (best * own.norm(dim=1)).argsort(descending=True).tolist()
    found = []
    for mechanism, goal in enumerate(truth):
        mine = [units[i] for i in order if owner[i] == mechanism and best[i] > _SHARE]
        found.append(_best_group(taken, mine[: most or _SIZES[-1]], goal))
    scores, sizes, effects = zip(*found, strict=True)
    claims = int((own.square().sum(1) > _CLAIM * goals.square().sum(1).min()).sum())
    return Matched(list(scores), list(sizes), torch.stack(effects), claims)


class _Taken:
    """What taking groups of units out of the model changes."""

    def __init__(self, trial: Trial, fitted: Fitted) -> None:
        self.trial, self.fitted, self.output = trial, fitted, output_tensor(trial.output)
        self.active = _active(trial, fitted)

    def __call__(self, group: Sequence[Unit]) -> Float[Tensor, "input ..."]:
        """The output less the output without the group."""
        # Where no unit of the group is active, taking it out changes nothing: most inputs, for sparse coders.
        some = torch.stack([self.active[b][:, u] for b, u in group]).any(0).nonzero().flatten()
        change = torch.zeros_like(self.output)
        if len(some):
            by_bank = {number: [u for b, u in group if b == number] for number, _ in group}
            there = self.trial._replace(batch=select(self.trial.batch, some), output=self.output[some])
            change[some] = self.output[some] - output_tensor(ablated_output(there, self.fitted, by_bank))
        return change


def _active(trial: Trial, fitted: Fitted) -> list[Bool[Tensor, "input unit"]]:
    """Per bank, on which inputs a unit's inner activation is not zero at some position."""
    output = output_tensor(trial.output)
    found = [output.new_zeros(len(output), bank.n, dtype=torch.bool) for bank in fitted.banks]
    for (number, _), code in codes(trial, fitted).items():
        pieces = (code.inner != 0).reshape(len(output), -1, code.inner.shape[-1]).any(1)
        owner = fitted.banks[number].owner
        for piece in range(pieces.shape[1]):
            found[number][:, piece if owner is None else owner[piece]] |= pieces[:, piece]
    return found


def _allowed(
    fitted: Fitted, units: Sequence[Unit], sites: Sequence[set[str]] | None, mechanisms: int
) -> Bool[Tensor, "unit mechanism"]:
    """Which units write where which mechanism is held."""
    if sites is None:
        return torch.ones(len(units), mechanisms, dtype=torch.bool)
    writes = [set(fitted.banks[number].writes) for number, _ in units]
    return torch.tensor([[bool(here & there) for there in sites] for here in writes])


def _owners(
    own: Float[Tensor, "unit effect"], goals: Float[Tensor, "mechanism effect"], allowed: Bool[Tensor, "unit mechanism"]
) -> tuple[Float[Tensor, " unit"], Tensor]:
    """The largest share that each unit gives, and the mechanism it gives it to."""
    # Units that change nothing, such as latents that are dead on these inputs, belong to nobody.
    live = own.square().sum(1) > 0
    best, owner = own.new_zeros(len(own)), torch.zeros(len(own), dtype=torch.long, device=own.device)
    best[live], owner[live] = _shares(own[live], goals, allowed[live]).max(1)
    return best, owner


def _best_group(taken: _Taken, units: Sequence[Unit], goal: Tensor) -> tuple[float, int, Tensor]:
    """The best score of the first few units, how many they are, and what taking them out does."""
    found = (0.0, 0, torch.zeros_like(goal))
    for size in sorted({min(size, len(units)) for size in _SIZES} - {0}):
        change = taken(units[:size])
        score = 1 - float((goal - change).double().square().sum() / goal.double().square().sum())
        found = max(found, (score, size, change), key=lambda one: one[0])
        if score > _EXACT:
            break
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
