"""Independent directions: those along which a site's inputs vary separately, and least like noise."""

import torch
from jaxtyping import Float
from torch import Tensor

_STEPS = 200
_SETTLED = 1e-6  # change of the mean length, in standard deviations, below which the directions have settled
_ROWS = 20  # inputs a dimension that are needed to tell independent directions from chance
_ENOUGH = 8192  # inputs, of which more change nothing but the cost, unless the dimension needs them
_GAIN = 1.0  # standard errors of a mean, from which turning a pair is worth it
_SPARSE = 0.1  # size, in standard deviations, from which a coordinate counts by its length rather than its square
_NORMAL = 0.81208  # mean smooth length of a normal coordinate; sparse ones are shorter, ones on a circle longer


def independent(rows: Float[Tensor, "row d"]) -> Float[Tensor, "d d"] | None:
    """Directions whose sums the rows are, with independent coordinates; None where none can be told.

    Where several mechanisms are always on at once, no input shows one alone, and inputs do not lie on lines; but they
    still are sums along a few directions each, and sums are more like noise than what they are made of. So those are
    sought whose whitened coordinates' mean lengths are farthest from a normal one's. There are none where they never
    settle, and none can be told from few rows.

    Args:
        rows: Inputs of a site, in a basis that they span.

    Source:
        Fixed points of FastICA (Hyvarinen 1999), all directions at once, with a smooth absolute value as contrast.
    """
    some = enough(rows)
    if some is None:
        return None
    n = len(some)
    centred = (some - some.mean(0)).double()
    sizes, basis = torch.linalg.eigh(centred.T @ centred / n)
    if sizes[0] <= 1e-9 * sizes[-1]:
        return None
    root = sizes.sqrt()
    white = centred @ basis / root
    # The coordinates themselves are as good a place to begin as any, and the same for every seed.
    turn, before = _orthogonal(basis * root), torch.inf
    best, farthest = None, 0.0
    for _ in range(_STEPS):
        along = white @ turn.T
        inverse = inverse_length(along)
        mean = float(inverse.reciprocal().mean())
        # By length, not by angle: in a plane in which inputs go round, all directions are as good.
        if abs(mean - before) < _SETTLED:
            far = float(_far(along).sum())
            if far <= farthest:
                break
            # Two directions halfway between two true ones are a saddle, where steps are small as well.
            best, farthest, turned = turn, far, _pairs_turned(along)
            if turned is None:
                break
            turn, before = turned @ turn, torch.inf
            continue
        before, turn = mean, _orthogonal(stepped(white, turn, along, inverse))
    return None if best is None else torch.nn.functional.normalize(((best * root) @ basis.T).to(rows.dtype))


def enough(rows: Float[Tensor, "row d"]) -> Float[Tensor, "some d"] | None:
    """As many rows as tell what their coordinates are from chance; None where there are too few."""
    d = rows.shape[1]
    return rows[: max(_ENOUGH, _ROWS * d)] if len(rows) >= _ROWS * d else None


def inverse_length(along: Float[Tensor, "row vector"]) -> Float[Tensor, "row vector"]:
    """One over a smooth absolute value."""
    return along.square().add_(_SPARSE**2).rsqrt_()


def stepped(
    white: Float[Tensor, "row d"],
    vectors: Float[Tensor, "vector d"],
    along: Float[Tensor, "row vector"],
    inverse: Float[Tensor, "row vector"],
    brake: float = 0.0,
) -> Float[Tensor, "vector d"]:
    """Newton's step to a fixed point, E[g'(y)] w - E[g(y) x] for g the slope of the smooth length; a brake shortens it.

    Args:
        white: Whitened inputs x.
        vectors: The w.
        along: y = w . x, which is overwritten.
        inverse: Of their smooth lengths.
        brake: Added to E[g'(y)].
    """
    curvature = _SPARSE**2 * inverse.pow(3).mean(0) + brake
    return curvature[:, None] * vectors - along.mul_(inverse).T @ white / len(white)


def _length(along: Tensor) -> Tensor:
    """A smooth absolute value."""
    return (along.square() + _SPARSE**2).sqrt()


def _far(along: Float[Tensor, "row d"]) -> Float[Tensor, " d"]:
    """How far a coordinate's mean length is from a normal one's."""
    return (_length(along).mean(0) - _NORMAL).abs()


def _pairs_turned(along: Float[Tensor, "row d"]) -> Float[Tensor, "d d"] | None:
    """Turn by an eighth the pairs whose sum and difference are less like noise; None where no pair gains."""
    d = along.shape[1]
    far = _far(along)
    gain = along.new_zeros(d, d)
    for i in range(d):
        one = along[:, i : i + 1]
        gain[i] = _far((one + along) / 2**0.5) + _far((one - along) / 2**0.5) - far[i] - far
    gain.fill_diagonal_(0)
    turn, (most, partner) = torch.eye(d, dtype=along.dtype, device=along.device), gain.max(1)
    for i in (most > _GAIN / len(along) ** 0.5).nonzero().flatten().tolist():
        j = int(partner[i])
        if i < j and int(partner[j]) == i:
            turn[[i, i, j, j], [i, j, i, j]] = along.new_tensor([1, 1, 1, -1]) / 2**0.5
    return turn if (turn.diagonal() < 1).any() else None


def _orthogonal(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The nearest orthogonal matrix."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right
