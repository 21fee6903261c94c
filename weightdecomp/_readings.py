"""Readings: linear functions of a site's inputs that are zero on most of them."""

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._independent import enough, inverse_length, stepped
from weightdecomp._pieces import Pieces
from weightdecomp._starts import Reach, completed

_SELDOM = (1 / 3) ** 0.5  # mean size, at unit power, of what is one number on a third of the inputs and zero elsewhere
_AT_ONCE = 64  # descents at once at least, half as many as dimensions where those are more
_KNOWN = 4  # descents begin at inputs without their none to three strongest known readings, in turn
_STEPS = 100  # of a descent at most
_SETTLED = 1e-3  # change of a unit vector in a step below which it has settled
_POLISH = 5  # Newton steps at the end, where they converge quadratically
_SAME = 0.95  # |cosine| from which two readings are one
_DEPENDENT = 1e-4  # relative singular value below which readings depend on one another
_WEIGHINGS = 100  # to where what components write is least
_NEARLY = 1e-4  # share of the longest below which a length counts as none there
_UNUSED = 0.02  # share of the longest u, below which a reading is none of the site's


def reading_start(
    reach: Reach, rows: Float[Tensor, "row d"], most: int
) -> tuple[Pieces, Float[Tensor, "direction d"]] | None:
    """One component a reading, and singular pairs of what these leave; None where inputs have no sparse readings.

    Where inputs are sums, of a token and a place, say, none of them lies on a line, but a linear function that tells
    one token is zero on all inputs with another one. Such functions are found as those of the least mean size at unit
    power. There may be more of them than dimensions, as tokens and places have as many inputs each; then many u sum to
    the weight, and those that write the least are taken, which leaves superfluous readings without any.

    Args:
        reach: Of the site.
        rows: Its inputs in the basis of the reach.
        most: Readings at most.

    Returns:
        The pieces, and the directions that they answer to.

    Source:
        That the sparsest functions are the mechanisms' own: Spielman, Wang and Wright 2012 (arXiv 1206.5882). Found by
        descent from inputs (Qu, Sun and Wright 2014, arXiv 1412.4659), with the step of FastICA (Hyvarinen 1999); what
        components write ours.
    """
    some = enough(rows)
    if some is None:
        return None
    d, root = rows.shape[1], reach.power.sqrt()
    white, weight = some / root, (reach.weight * root).double()
    found = _found(white, most)
    if len(found) < 2:
        return None
    written = _least_written(found, _sizes(white, found), weight).norm(dim=1)
    found = found[written > _UNUSED * written.max()]
    v, u = found / root, _least_written(found, _sizes(white, found), weight)
    if len(found) < d:
        return completed(reach, v, u.to(v)), torch.linalg.pinv(found).T * root
    # Weights of directions that inputs hardly use are large in the reach, and so is what rounding leaves of their sum.
    missing = reach.weight.double() - u.T @ v.double()
    u = u + torch.linalg.pinv(v.double().T) @ missing.T
    return reach.lifted(v, u.to(v)), torch.eye(d, dtype=rows.dtype, device=rows.device)


def _found(white: Float[Tensor, "row d"], most: int) -> Float[Tensor, "reading d"]:
    """Distinct sparse readings of whitened inputs, the sparsest first."""
    n, d = white.shape
    rng = torch.Generator().manual_seed(0)
    found, before = white[:0], -1
    while before < len(found) < most:
        before = len(found)
        begin = white[torch.randint(n, (max(_AT_ONCE, d // 2),), generator=rng).to(white.device)]
        found = _distinct(white, torch.cat([found, _descended(white, _without_known(begin, found))]))
    exact = found = found[:most]
    for _ in range(_POLISH):
        exact = _step(white, exact, 0.0)
    # Newton's steps lead astray where there is no sharp minimum near.
    return torch.where((exact * found).sum(1, keepdim=True) > _SAME, exact, found)


def _without_known(begin: Float[Tensor, "row d"], known: Float[Tensor, "reading d"]) -> Float[Tensor, "begin d"]:
    """Unit vectors along inputs, most without their strongest known readings, so that they lead to others."""
    left = begin.clone()
    for i in range(1, min(_KNOWN, len(known) + 1)):
        own = torch.arange(len(left), device=left.device) % _KNOWN >= i
        along = left[own] @ known.T
        strongest = along.abs().argmax(1, keepdim=True)
        left[own] -= along.gather(1, strongest) * known[strongest[:, 0]]
    length, whole = left.norm(dim=1, keepdim=True), begin.norm(dim=1, keepdim=True)
    return (left / length)[(length > _SETTLED * whole)[:, 0]]


def _descended(white: Float[Tensor, "row d"], begin: Float[Tensor, "begin d"]) -> Float[Tensor, "end d"]:
    """Where descents of the mean size end, of those that do."""
    ends = [begin[:0]]
    for _ in range(_STEPS):
        # A reading of unit power has a slope of at most 1, so that with a brake of 1 no step leads uphill.
        after = _step(white, begin, 1.0)
        moves = (after - begin).norm(dim=1) > _SETTLED
        ends.append(after[~moves])
        begin = after[moves]
        if not len(begin):
            break
    return torch.cat(ends)


def _step(white: Float[Tensor, "row d"], vectors: Float[Tensor, "vector d"], brake: float) -> Tensor:
    """A step of each unit vector towards a smaller mean size of what it reads; without a brake, Newton's."""
    along = white @ vectors.T
    return torch.nn.functional.normalize(stepped(white, vectors, along, inverse_length(along), brake))


def _sizes(white: Float[Tensor, "row d"], vectors: Float[Tensor, "vector d"]) -> Float[Tensor, " vector"]:
    """Mean size of what each vector reads."""
    return (white @ vectors.T).abs().mean(0)


def _distinct(white: Float[Tensor, "row d"], vectors: Float[Tensor, "vector d"]) -> Float[Tensor, "reading d"]:
    """The sparse ones, the sparsest first, each direction once."""
    size, order = _sizes(white, vectors).sort()
    vectors = vectors[order[size < _SELDOM]]
    same = ((vectors @ vectors.T).abs() > _SAME).tolist()
    kept = list[int]()
    for i, like in enumerate(same):
        if not any(like[j] for j in kept):
            kept.append(i)
    return vectors[kept]


def _least_written(
    readings: Float[Tensor, "reading d"], sizes: Float[Tensor, " reading"], weight: Float[Tensor, "d_out d"]
) -> Float[Tensor, "reading d_out"]:
    """Of all u with the same sum those whose lengths, each as often as it is written, sum to the least; in float64.

    Lengths are squares over what they last were, which are minimised in closed form, and so on.
    """
    readings, sizes = readings.double(), sizes.double()
    u = torch.linalg.pinv(readings).T @ weight.T
    left, singular, _ = torch.linalg.svd(readings)
    free = left[:, int((singular > _DEPENDENT * singular[0]).sum()) :]
    if not free.shape[1]:
        return u
    least = _NEARLY * u.norm(dim=1).max()
    for _ in range(_WEIGHINGS):
        weighed = free * (sizes / (u.norm(dim=1) + least))[:, None]
        u = u - free @ torch.linalg.solve(free.T @ weighed, weighed.T @ u)
    return u
