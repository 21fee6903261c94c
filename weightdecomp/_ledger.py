"""The ledger: what a decomposition costs in bits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor


@dataclass(frozen=True)
class Ledger:
    """Description length of a set of inputs through a decomposition, in bits, by part.

    Attributes:
        n_inputs: Number N of inputs (or positions) described.
        naming: Which components are active on each input: sum over components of N h(f), h the binary entropy.
        values: The activations of the active pieces, each to the relative precision that the tolerance asks for:
            N f rank (1/2) log2(1 / tolerance), the rate-distortion price of a Gaussian value. Without it one component
            that is always on would be free. Source: ours.
        dictionary: Stored numbers of the live components, (1/2) log2(1 + N f) bits each.
        residual: What the masked output leaves to be said: N divergence / ln 2.
    """

    n_inputs: int
    naming: float
    values: float
    dictionary: float
    residual: float

    @property
    def total(self) -> float:
        """All parts together, in bits."""
        return self.naming + self.values + self.dictionary + self.residual

    @property
    def per_input(self) -> float:
        """Bits per input without the dictionary, which is paid once."""
        return (self.total - self.dictionary) / self.n_inputs

    def __str__(self) -> str:
        """A line a part."""
        parts = [(name, getattr(self, name)) for name in ("naming", "values", "dictionary", "residual", "total")]
        return "\n".join(
            f"{name:<11}{bits:>14,.0f} bits {bits / self.n_inputs:>10.3f} per input" for name, bits in parts
        )


def entropy(frequency: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Binary entropy h(f) in bits."""
    return (torch.special.entr(frequency) + torch.special.entr(1 - frequency)) / math.log(2)


def value_bits(tolerance: float) -> float:
    """Bits of one active value at the relative distortion `tolerance`."""
    return 0.5 * math.log2(1 / tolerance)


def wires(vectors: Float[Tensor, "*n d"], share: float) -> Float[Tensor, "*n"]:
    """How many coordinates hold a share of each vector's square, the last of them in part; 0 for a zero vector."""
    power = vectors.square().sort(-1, descending=True).values
    wanted = share * power.sum(-1, keepdim=True) - (power.cumsum(-1) - power)
    return (wanted / power.where(power > 0, torch.inf)).clamp(0, 1).sum(-1)


def dictionary_bits(frequency: Float[Tensor, "*n"], numbers: Real[Tensor, "*n"], n_inputs: int) -> Float[Tensor, "*n"]:
    """Bits to store each component's numbers at the precision that its use deserves."""
    return numbers * 0.5 * torch.log2(1 + n_inputs * frequency)


def behaviour_bits(change: Float[Tensor, "row d_output"], tolerance: float) -> float:
    """Bits per row to describe output changes to a relative mean squared error of `tolerance`.

    The rate-distortion function of a Gaussian with the changes' second moment (reverse water-filling, Cover and
    Thomas, theorem 10.3.3): an upper bound for any source with that second moment.
    """
    power = torch.linalg.eigvalsh(change.double().T @ change.double() / len(change)).clamp_min(0)
    level, above = 0.0, float(power.max())
    for _ in range(60):
        middle = (level + above) / 2
        if float(power.clamp_max(middle).sum()) < tolerance * float(power.sum()):
            level = middle
        else:
            above = middle
    heard = power[power > above]
    return float(0.5 * torch.log2(heard / above).sum()) if len(heard) else 0.0


def price(
    n_inputs: int,
    tolerance: float,
    frequencies: Sequence[Float[Tensor, " _"]],
    ranks: Sequence[Int[Tensor, " _"]],
    shapes: Sequence[tuple[int, int]],
    divergence: float = 0.0,
) -> Ledger:
    """Price components of several sites, each named on its own.

    Args:
        n_inputs: Inputs (or positions) N.
        tolerance: The run's tolerance, which sets the precision of active values.
        frequencies: Per site, the share of inputs on which each component is on.
        ranks: Per site, the rank of each component.
        shapes: Per site, (d_out, d_in).
        divergence: Mean divergence per input in nats (or squared output units) under the stated masks.

    Raises:
        ValueError: If N is not positive or the tolerance is outside (0, 1).
    """
    f = [frequency.double() for frequency in frequencies]
    groups = [
        Coded(n_inputs, one, rank, rank * (d_out + d_in))
        for one, rank, (d_out, d_in) in zip(f, ranks, shapes, strict=True)
    ]
    return summed(groups, n_inputs, tolerance, divergence)


class Coded(NamedTuple):
    """Units of one place, as the ledger sees them.

    Attributes:
        rows: Rows that they are named on.
        frequency: Share of the rows on which each unit is active.
        values: Numbers that are sent with each active unit.
        numbers: Numbers stored for each unit.
        shared: Numbers stored once for all of them.
    """

    rows: int
    frequency: Float[Tensor, " unit"]
    values: Real[Tensor, " unit"]
    numbers: Real[Tensor, " unit"]
    shared: int = 0


def summed(groups: Sequence[Coded], n_inputs: int, tolerance: float, divergence: float) -> Ledger:
    """The four parts of units of several places; arguments and errors as in `price`."""
    if n_inputs < 1:
        raise ValueError(f"n_inputs must be at least 1, got {n_inputs}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
    naming = values = dictionary = 0.0
    for one in groups:
        naming += float(one.rows * entropy(one.frequency).sum())
        values += float(one.rows * (one.frequency * one.values).sum()) * value_bits(tolerance)
        dictionary += float(dictionary_bits(one.frequency, one.numbers, one.rows).sum())
        dictionary += one.shared * 0.5 * math.log2(1 + one.rows)
    return Ledger(n_inputs, naming, values, dictionary, n_inputs * divergence / math.log(2))
