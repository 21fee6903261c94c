"""A bank: units that share an encoder, whatever method found them; the one form that every method is scored in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightdecomp._sites import Site

ZERO = 1e-8  # an activation below this size is rounding, not an active unit

Encoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Bank:
    """Units read from the input rows of some sites and written into the output rows of some sites.

    A site's output rows become `sum over banks of (inner * mask) @ writes + offsets`, the site's own bias on top. A
    dictionary d of a site's inputs writes d W^T, a transcoder's decoder writes itself, a component of the weights
    writes u. Units of several pieces (rank above one) share a mask.

    Attributes:
        reads: Sites whose input rows, side by side, the encoder takes.
        encode: Rows (..., sum of d_in) to inner activations (..., piece).
        writes: Per site, what each piece writes per unit of its inner activation, (piece, d_out).
        offsets: Per site, what is written always, (d_out,); zero where a site is missing.
        directions: Per site, the direction of each piece in activation space, (piece, width); what units are
            compared by.
        numbers: Stored numbers of each unit: what it reads and writes, its bias and threshold.
        values: Numbers to be sent with the name of an active unit; 0 for one-hot codes.
        shared: Stored numbers that belong to no unit: offsets, scales.
        owner: The unit of each piece, ascending; None where every piece is a unit.
        importance: Inner activations to importances in [0, 1], (..., unit); None: a unit is on where it is not zero.
    """

    reads: tuple[str, ...]
    encode: Encoder
    writes: Mapping[str, Float[Tensor, "piece _"]]
    offsets: Mapping[str, Float[Tensor, " _"]]
    directions: Mapping[str, Float[Tensor, "piece _"]]
    numbers: Float[Tensor, " unit"]
    values: Float[Tensor, " unit"]
    shared: int = 0
    owner: Int[Tensor, " piece"] | None = None
    importance: Callable[[Tensor], Tensor] | None = None

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.numbers)

    def importances(self, inner: Float[Tensor, "*batch piece"]) -> Float[Tensor, "*batch unit"]:
        """How far each unit is on, in [0, 1]."""
        if self.importance is not None:
            return self.importance(inner)
        return (inner.abs() > ZERO).to(inner.dtype)

    def per_piece(self, mask: Float[Tensor, "*batch unit"]) -> Float[Tensor, "*batch piece"]:
        """A mask over units as one over pieces."""
        return mask if self.owner is None else mask[..., self.owner]


def offset_of(bank: Bank, path: str) -> Tensor | float:
    """What a bank writes into a site always."""
    return bank.offsets.get(path, 0.0)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method after fitting: its units on one model.

    Attributes:
        name: The method.
        setting: Its settings in words.
        sites: All sites of the model that are compared on, in the model's order.
        banks: The units.
        skipped: Sites (or spans of sites) to which the method does not apply, with the reason.
        parameters: Numbers that were fitted or trained.
    """

    name: str
    setting: str
    sites: Sequence[Site]
    banks: Sequence[Bank]
    skipped: Mapping[str, str] = field(default_factory=dict)
    parameters: int = 0

    @property
    def n(self) -> int:
        """Number of units in all banks."""
        return sum(bank.n for bank in self.banks)

    @property
    def written(self) -> tuple[str, ...]:
        """Sites whose output rows are made from units, in the model's order."""
        return tuple(site.path for site in self.sites if any(site.path in bank.writes for bank in self.banks))

    @property
    def reads_ahead(self) -> bool:
        """Whether some bank reads a site that runs only after it has written; it then reads the target's own rows."""
        order = {site.path: i for i, site in enumerate(self.sites)}
        return any(max(order[p] for p in b.reads) > min(order[p] for p in b.writes) for b in self.banks)


def dictionary(
    site: Site,
    encode: Encoder,
    directions: Float[Tensor, "unit d_in"],
    offset: Float[Tensor, " d_in"],
    *,
    numbers: int,
    valued: bool = True,
    shared: int = 0,
) -> Bank:
    """Units that rebuild a site's input rows as `activations @ directions + offset`.

    Args:
        site: The site.
        encode: Input rows to activations.
        directions: What a unit adds to the input rows per unit of activation.
        offset: What is added always.
        numbers: Stored numbers of a unit.
        valued: Whether an active unit has a value to be sent.
        shared: Stored numbers that belong to no unit, the offset apart.
    """
    matrix = site.matrix()
    n = len(directions)
    return Bank(
        reads=(site.path,),
        encode=encode,
        writes={site.path: directions @ matrix.T},
        offsets={site.path: matrix @ offset},
        directions={site.path: directions},
        numbers=torch.full((n,), float(numbers)),
        values=torch.full((n,), float(valued)),
        shared=shared + len(offset),
    )
