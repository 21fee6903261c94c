"""Spans: subspaces of few dimensions, in one of which each input lies while the model uses one mechanism."""

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._pieces import Pieces
from weightdecomp._starts import Reach

_SAMPLE = 4096  # rows that spans are sought among
_AGREEMENT = 0.9  # |cosine| of rows from which the dimension of their span is read
_DIMENSIONS = 4  # of a span at most
_FLAT = 0.01  # share of a row, or of a cone's largest singular value, that counts as none
_STRAY = 0.05  # share of the rows, or of a cone, that may lie in no span, else spans are no description of them


def span_start(reach: Reach, rows: Float[Tensor, "row d"]) -> tuple[Pieces, Float[Tensor, "dimension d"]] | None:
    """One component a span, of as many dimensions as it has, that answers to no other; None where rows do not lie so.

    A mechanism whose input is more than one number (a point of a plane, say) is no direction, and splitting it up
    gives parts that are never used alone. Only rows that are exactly of few dimensions say so: dense data has no spans.

    Args:
        reach: Of the site.
        rows: Its inputs in the basis of the reach.

    Returns:
        The pieces, and the directions that they answer to, one each.

    Source:
        Subspaces that are clustered by their densest cones, greedily; ours.
    """
    found = _spans(torch.nn.functional.normalize(rows[rows.norm(dim=1) > 0][:_SAMPLE]))
    directions = torch.cat([rows[:0], *found])
    if len(found) < 2 or len(found) == len(directions) or len(directions) > directions.shape[1]:
        return None
    if int(torch.linalg.matrix_rank(directions, rtol=_FLAT)) < len(directions):
        return None
    owner = torch.repeat_interleave(torch.tensor([len(span) for span in found], device=rows.device))
    v, u = torch.linalg.pinv(directions.T), directions @ reach.weight.T
    missing = reach.weight - u.T @ v
    if missing.norm() > _FLAT * reach.weight.norm():
        return None
    pieces = Pieces((v + torch.linalg.pinv(u.T, rtol=1e-4) @ missing) @ reach.basis.T, u, owner)
    return pieces.balanced(), directions


def _spans(unit: Float[Tensor, "row d"]) -> list[Float[Tensor, "dimension d"]]:
    """Orthonormal bases of the spans that nearly all rows lie in, or none."""
    near = (unit @ unit.T).abs() > _AGREEMENT
    left = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    density, found = near.sum(1), list[Tensor]()
    while left.any():
        inside = near[int(density.where(left, 0).argmax())] & left
        cone = unit[inside]
        _, sizes, right = torch.linalg.svd(cone, full_matrices=False)
        dimension = int((sizes > _FLAT * sizes[0]).sum())
        span = right[:dimension]
        outside = (unit - unit @ span.T @ span).norm(dim=1) > _FLAT
        # Rows that are nearly parallel have one large singular value, and yet lie in no line.
        stray = float(outside[inside].float().mean())
        if dimension > _DIMENSIONS or len(cone) < 2 * dimension or stray > _STRAY:
            return found if int(left.sum()) < _STRAY * len(unit) else []
        found.append(span)
        left &= outside
    return found
