"""The portfolio of one site: the exact decompositions that the ledger chooses from."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._independent import independent
from weightdecomp._pieces import Pieces, rank_one_pieces
from weightdecomp._readings import reading_start
from weightdecomp._spans import span_start
from weightdecomp._starts import Reach, coordinate_starts, exemplar_start, exemplars, singular_starts

READINGS = "readings"
_OFTEN = 1 / 3  # share of inputs from which a component counts as open often


class Member(NamedTuple):
    """One exact decomposition.

    Attributes:
        pieces: Its components.
        held: Directions in the basis of the reach to which the components' answers are given; what these do not span
            is left to refinement.
        fall: Of exemplars, the factor by which the density of inputs falls after the last; None for others.
    """

    pieces: Pieces
    held: Float[Tensor, "held reach"]
    fall: float | None = None


def portfolio(
    matrix: Float[Tensor, "d_out d_in"],
    reach: Reach,
    rows: Float[Tensor, "row d_in"],
    hits: Float[Tensor, " row"],
    sensitivity: Float[Tensor, "probed d_out"],
    most: int,
) -> dict[str, Member]:
    """All members, by name.

    Args:
        matrix: The site's weight.
        reach: The span of its inputs.
        rows: Its inputs.
        hits: Divergence of the final output when the whole site is ablated on that input.
        sensitivity: Gradients of the final output at the site's output.
        most: Components of a member at most.
    """
    whole = torch.eye(len(reach.power), dtype=reach.power.dtype, device=reach.power.device)
    # Singular pairs mean nothing one by one and are all refined; coordinates are the model's own.
    found = {name: Member(pieces, whole[:0]) for name, pieces in singular_starts(reach, sensitivity).items()}
    found |= {name: Member(pieces, whole) for name, pieces in coordinate_starts(matrix, reach, most).items()}
    inner = rows @ reach.basis
    for family in exemplars(inner, reach.power, hits, most):
        for n, fall in family.cuts.items():
            some = family.directions[:n]
            # More exemplars than dimensions cannot each have a component that answers to it alone.
            held = some if n <= len(whole) else whole[:0]
            found[f"exemplars {n} at {family.agreement}"] = Member(exemplar_start(reach, some), held, fall)
    directions = independent(inner)
    if directions is not None and len(directions) <= most:
        found["independent"] = Member(exemplar_start(reach, directions), directions)
    read = reading_start(reach, inner, most)
    if read is not None:
        found[READINGS] = Member(*read)
    spans = span_start(reach, inner)
    if spans is not None:
        found["spans"] = Member(*spans)
    return found


def turned(
    pairs: Pieces, rows: Float[Tensor, "row d_in"], frequency: Float[Tensor, " pair"], held: Float[Tensor, "0 reach"]
) -> dict[str, Member]:
    """Singular pairs of which those that are often open are turned, together, to independent directions.

    What is open most of the time gates cannot tell apart, and singular pairs mix what is equally strong.
    """
    often = frequency > _OFTEN
    n = int(often.sum())
    directions = independent(rows @ pairs.v[often].T) if n > 1 else None
    if directions is None:
        return {}
    v = torch.cat([torch.linalg.pinv(directions.T) @ pairs.v[often], pairs.v[~often]])
    u = torch.cat([directions @ pairs.u[often], pairs.u[~often]])
    return {f"svd, {n} turned": Member(rank_one_pieces(v, u).balanced(), held)}
