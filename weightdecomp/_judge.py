"""The judge of a comparison: all figures of one fit, on the same inputs, labels and mechanisms for every method."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from weightdecomp._batches import tensors
from weightdecomp._comparison import Point
from weightdecomp._cost import Cost
from weightdecomp._divergence import output_tensor
from weightdecomp.baselines import protocols
from weightdecomp.baselines._bank import Fitted
from weightdecomp.baselines._matching import Effects, Matched, deletions, effect_matching
from weightdecomp.baselines._price import frequencies, priced

Share = Mapping[str, Tensor]
_UNLABELLED = -100  # as in torch's cross-entropy


class Labelled(NamedTuple):
    """Right classes, with the cross-entropy (nats) of the target and of the model with every site ablated."""

    labels: Tensor
    target: float
    nothing: float

    def recovered(self, output: Any) -> float:
        """Share of the cross-entropy lost by ablating everything that an output recovers."""
        return (self.nothing - cross_entropy(output, self.labels)) / (self.nothing - self.target)


class Known(NamedTuple):
    """Known mechanisms: what deleting each does to the output, and the sites that hold it."""

    effects: Effects
    sites: Sequence[set[str]]


class Judge(NamedTuple):
    """What every method is scored on.

    Attributes:
        trial: Model and inputs.
        tolerance: Relative precision that values are priced at.
        attack: Steps of the adversarial protocol.
        restarts: Of the attack.
        labelled: Right classes, where they are given.
        known: Mechanisms, where they are known.
    """

    trial: protocols.Trial
    tolerance: float
    attack: int
    restarts: int
    labelled: Labelled | None
    known: Known | None

    @torch.no_grad()
    def __call__(self, fitted: Fitted, seed: int, cost: Cost | None) -> Point:
        """All figures of one fit, and what it cost."""
        trial = self.trial
        found = protocols.codes(trial, fitted)
        damage = protocols.propagating(trial, fitted)
        n = trial.divergence(trial.output, trial.output).numel()
        used = frequencies(fitted, found)
        rng = torch.Generator(device=tensors(trial.batch)[0].device).manual_seed(seed)
        adversarial = protocols.adversarial(trial, fitted, self.attack, rng, restarts=self.restarts)
        effects = self._matched(fitted)
        return Point(
            method=fitted.name,
            setting=fitted.setting,
            seed=seed,
            ledger=priced(fitted, found, self.tolerance, damage, n),
            matched=protocols.matched(trial, fitted) / trial.nothing,
            clean=protocols.clean(trial, fitted) / trial.nothing,
            propagating=damage / trial.nothing,
            adversarial=adversarial / trial.nothing,
            active=sum(float(frequency.sum()) for frequency, _ in used),
            live=sum(int((frequency > 0).sum()) for frequency, _ in used),
            units=fitted.n,
            parameters=fitted.parameters,
            cpu_seconds=None if cost is None else cost.cpu_seconds,
            peak_bytes=None if cost is None else cost.peak_bytes,
            loss_recovered=self._recovered(fitted),
            effects_matched=None if effects is None else effects.score,
            splitting=None if effects is None else effects.splitting,
        )

    def _recovered(self, fitted: Fitted) -> float | None:
        if self.labelled is None:
            return None
        return self.labelled.recovered(protocols.replaced_output(self.trial, fitted))

    def _matched(self, fitted: Fitted) -> Matched | None:
        if self.known is None:
            return None
        return effect_matching(self.trial, fitted, self.known.effects, self.known.sites)


def cross_entropy(output: Any, labels: Tensor) -> float:
    """Mean cross-entropy in nats of the logits in the output's last dimension, where there is a label."""
    logits = output_tensor(output).double()
    return float(F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=_UNLABELLED))


@torch.no_grad()
def labelled(trial: protocols.Trial, labels: Tensor | None, index: Tensor, n: int) -> Labelled | None:
    """The right classes of the inputs that are scored.

    Args:
        trial: Model and inputs.
        labels: Of all inputs that these were taken from, or None.
        index: Their numbers among those.
        n: How many those were.

    Raises:
        ValueError: For labels of another shape, outside the classes, or that the model knows nothing of.
    """
    if labels is None:
        return None
    *shape, classes = output_tensor(trial.output).shape
    wanted = (n, *shape[1:])
    if labels.is_floating_point() or tuple(labels.shape) != wanted:
        raise ValueError(f"labels must be whole numbers of shape {wanted}, got {labels.dtype} of {tuple(labels.shape)}")
    own = labels.to(index.device)[index].long()
    given = own[own != _UNLABELLED]
    if not len(given) or int(given.min()) < 0 or int(given.max()) >= classes:
        came = f"{int(given.min())} to {int(given.max())}" if len(given) else "none"
        raise ValueError(
            f"labels must be classes from 0 to {classes - 1}, {_UNLABELLED} where there is none; got {came}"
        )
    target = cross_entropy(trial.output, own)
    nothing = cross_entropy(protocols.without_sites(trial.model, trial.batch, trial.sites), own)
    if nothing <= target:
        raise ValueError(
            f"labels have a cross-entropy of {target:.4g} nats under the model and {nothing:.4g} with every site "
            "ablated, so that there is none to recover; check their order and that the outputs are logits"
        )
    return Labelled(own, target, nothing)


def known(trial: protocols.Trial, truth: Sequence[Share] | None) -> Known | None:
    """The mechanisms by what deleting them does, or None."""
    return None if truth is None else Known(deletions(trial, truth), [set(shares) for shares in truth])
