"""Independent directions: those along which a site's inputs vary sparsely and separately."""

import torch
from jaxtyping import Float
from torch import Tensor

_STEPS = 200
_SETTLED = 1e-14  # change of |cosine| below which the directions have settled
_ROWS = 20  # inputs a dimension that are needed to tell independent directions from chance
_ENOUGH = (8192, 100)  # inputs, in all and a dimension, of which more change nothing
_GAIN = 0.01  # of a coordinate's length, from which turning a pair is worth it
_SPARSE = 0.1  # size, in standard deviations, from which a coordinate counts by its length rather than its square


def independent(rows: Float[Tensor, "row d"]) -> Float[Tensor, "d d"] | None:
    """Directions whose sums the rows are, with sparse and independent coordinates; None where none can be told.

    Where several mechanisms are always on at once, no input shows one alone, and inputs do not lie on lines; but they
    still are sums along a few directions each. Those are the ones whose whitened coordinates have the least length
    in sum. There are none where they never settle, and none can be told from few rows.

    Args:
        rows: Inputs of a site, in a basis that they span.

    Source:
        Fixed points of FastICA (Hyvarinen 1999), all directions at once, with a smooth absolute value as contrast.
    """
    d = rows.shape[1]
    rows = rows[: max(_ENOUGH[0], _ENOUGH[1] * d)]
    n = len(rows)
    if n < _ROWS * d:
        return None
    centred = (rows - rows.mean(0)).double()
    sizes, basis = torch.linalg.eigh(centred.T @ centred / n)
    if sizes[0] <= 1e-9 * sizes[-1]:
        return None
    root = sizes.sqrt()
    white = centred @ basis / root
    # The coordinates themselves are as good a place to begin as any, and the same for every seed.
    turn = _orthogonal((basis / root).T * root.mean())
    for _ in range(_STEPS):
        along = white @ turn.T
        length = _length(along)
        # The Newton step of a fixed point: E[g'(y)] w - E[g(y) x] for g the slope of the smooth length.
        slope = (_SPARSE**2 / length**3).mean(0)
        before, turn = turn, _orthogonal(slope[:, None] * turn - (along / length).T @ white / n)
        if float((1 - (before * turn).sum(1).abs()).max()) < _SETTLED:
            # Two directions halfway between two true ones are a saddle, where steps are small as well.
            turned = _pairs_turned(white @ turn.T)
            if turned is None:
                return torch.nn.functional.normalize(((turn * root) @ basis.T).to(rows.dtype))
            turn = turned @ turn
    return None


def _length(along: Tensor) -> Tensor:
    """A smooth absolute value."""
    return (along.square() + _SPARSE**2).sqrt()


def _pairs_turned(along: Float[Tensor, "row d"]) -> Float[Tensor, "d d"] | None:
    """Turn by an eighth the pairs of coordinates whose sum and difference are shorter; None where no pair gains."""
    d = along.shape[1]
    length = _length(along).mean(0)
    gain = along.new_zeros(d, d)
    for i in range(d):
        both = _length((along[:, i : i + 1] + along) / 2**0.5) + _length((along[:, i : i + 1] - along) / 2**0.5)
        gain[i] = length[i] + length - both.mean(0)
    gain.fill_diagonal_(0)
    turn, (most, partner) = torch.eye(d, dtype=along.dtype, device=along.device), gain.max(1)
    for i in (most > _GAIN * length).nonzero().flatten().tolist():
        j = int(partner[i])
        if i < j and int(partner[j]) == i:
            turn[[i, i, j, j], [i, j, i, j]] = along.new_tensor([1, 1, 1, -1]) / 2**0.5
    return turn if (turn.diagonal() < 1).any() else None


def _orthogonal(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The nearest orthogonal matrix."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right
