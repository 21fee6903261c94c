"""The price of units in bits: the engine's ledger for any method, and the code length of quantised latents."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._ledger import Coded, Ledger, entropy, summed
from weightdecomp._regimes import ON
from weightdecomp.baselines._bank import Fitted
from weightdecomp.baselines.protocols import Inner


def frequencies(fitted: Fitted, found: Mapping[tuple[int, int], Inner]) -> list[tuple[Float[Tensor, " unit"], int]]:
    """Per bank, the share of rows on which each unit is active, and the number of rows."""
    by_bank = []
    for number in range(len(fitted.banks)):
        calls = [one.importance.flatten(0, -2) for (bank, _), one in sorted(found.items()) if bank == number]
        active = torch.cat([importance > ON for importance in calls])
        by_bank.append((active.double().mean(0), len(active)))
    return by_bank


def priced(
    fitted: Fitted,
    found: Mapping[tuple[int, int], Inner],
    tolerance: float,
    divergence: float,
    n_inputs: int,
) -> Ledger:
    """What a method costs: the same four parts, by the same functions, as a decomposition of the weights.

    Stored numbers count all that the method must keep (what units read and write, biases, thresholds, offsets), and
    for no method the target's own weights.

    Args:
        fitted: The units.
        found: Their codes on the inputs.
        tolerance: Relative distortion of active values.
        divergence: Mean divergence in nats (kl) or squared output units (mse).
        n_inputs: Inputs (or positions) at which outputs are compared.

    Raises:
        ValueError: If N is not positive or the tolerance is outside (0, 1).
    """
    groups = [
        Coded(rows, frequency, bank.values, bank.numbers, bank.shared)
        for bank, (frequency, rows) in zip(fitted.banks, frequencies(fitted, found), strict=True)
    ]
    return summed(groups, n_inputs, tolerance, divergence)


def code_length(latents: Float[Tensor, "row unit"], bin_width: float) -> float:
    """Bits per row of independently coded latents: `sum_i h(p_i) + p_i H(round(a_i / width) | a_i != 0)`.

    Args:
        latents: Activations.
        bin_width: Of the bins that active values fall in.

    Source:
        Ayonrinde et al. 2024, arXiv 2410.11179, section 3; empirical entropies, bins centred on multiples of the
        width.
    """
    on = latents != 0
    frequency = on.double().mean(0)
    total = float(entropy(frequency).sum())
    for unit in range(latents.shape[1]):
        active = latents[on[:, unit], unit]
        if len(active):
            counts = torch.unique((active / bin_width).round(), return_counts=True)[1].double()
            share = counts / counts.sum()
            total += float(frequency[unit] * -(share * share.log2()).sum())
    return total


def quantised_length(
    latents: Float[Tensor, "row unit"],
    error: Callable[[Float[Tensor, "row unit"]], float],
    most: float,
) -> tuple[float, float]:
    """Bits per row at the coarsest of halving bin widths whose rounded latents stay within an error.

    Args:
        latents: Activations.
        error: Of rounded latents, the distortion they cause.
        most: Largest distortion to accept.

    Returns:
        The bits and the width; infinite bits and a width of 0 where even unrounded latents exceed the distortion.
    """
    if error(latents) > most:
        return math.inf, 0.0
    width = 2 * float(latents.abs().max()) or 1.0
    while True:
        rounded = (latents / width).round() * width
        if error(rounded) <= most:
            return code_length(latents, width), width
        width /= 2
