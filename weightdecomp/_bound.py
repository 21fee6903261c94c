"""Certified upper bounds of damage over the whole mask box: a masked site, and divergences, on intervals.

The bound of a model is made by replacing every site's forward by `masked_site_output` and running the model's
own code on the intervals that come out. See `Interval` for what rounding is and is not covered.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from weightdecomp._interval import SLACK, Interval, widened
from weightdecomp._pieces import Pieces

_ENTRIES_AT_ONCE = 1 << 22  # of doubles in one temporary: 32 MiB
_BISECTIONS = 40  # the bound is flat at its smallest, so that 2^-40 of the range is more than enough
_N_CLASSES_TRIED = 2


def masked_site_output(
    x: Interval | Tensor,
    pieces: Pieces,
    importance: Float[Tensor, "*batch component"],
    remainder: Float[Tensor, "d_out d_in"] | None = None,
    bias: Float[Tensor, " d_out"] | None = None,
) -> Interval:
    r"""The box of a site's output rows over all masks, with every source free in [0, 1] at every row.

    A row is :math:`y = \sum_c m_c W_c x + m' R x + b`, with :math:`m_c` in [g_c, 1] and :math:`m'` in [0, 1].
    Sources shared across rows are part of this box, so the bound holds for them too. With
    :math:`z_c = (W_c x)_j`, :math:`\bar m = (1 + g) / 2` and :math:`\rho = (1 - g) / 2`, the largest
    :math:`y_j` at a given x is :math:`\sum_c \bar m_c z_c + \rho_c |z_c|`. Over a box of x, :math:`|z_c|` is
    at most its chord :math:`s_c z_c + t_c` on the range of :math:`z_c`, which leaves one linear function of x
    whose largest value is exact. So components cancel in the bound as they do in the weights: it is never
    above the sum of the components' own bounds, nor above the bound of W x plus that of all that masks take.

    Args:
        x: The site's input rows, (*batch, d_in).
        pieces: The site's components. Only their weights matter, not their factors (G1).
        importance: Importances in [0, 1].
        remainder: What the components do not sum to, with a mask of its own; None when zero or kept off.
        bias: Added to every row.

    Returns:
        The box of output rows, (*batch, d_out), float64. For a tensor x no smaller box holds all outputs.

    Raises:
        ValueError: If the importances do not fit the rows and the components.

    Source:
        Ours; the chord of a convex function on an interval as in CROWN (Zhang et al., arXiv:1811.00866).
    """
    box = Interval.of(x)
    expected = (*box.shape[:-1], pieces.n)
    if (*importance.shape,) != expected:
        raise ValueError(f"importance has the shape {(*importance.shape,)}, expected {expected}")
    site = Pieces(pieces.v.detach().double(), pieces.u.detach().double(), pieces.owner)
    rest = None if remainder is None else remainder.detach().double()
    low = importance.detach().double().reshape(-1, pieces.n)
    if rest is not None:
        low = F.pad(low, (0, 1))
    (n_pieces, d_in), d_out = site.v.shape, site.u.shape[1]
    n_rows = max(1, _ENTRIES_AT_ONCE // (d_out * max(d_in, n_pieces + 1)))
    chunks = zip(box.reshape(-1, d_in).split(n_rows), low.split(n_rows), strict=True)
    parts = [_masked_rows(rows, site, rest, own) for rows, own in chunks]
    lo, hi = (torch.cat([getattr(part, end) for part in parts]) for end in ("lo", "hi"))
    output = Interval(lo, hi).reshape(*box.shape[:-1], d_out)
    return output if bias is None else output + bias


def _masked_rows(x: Interval, site: Pieces, rest: Tensor | None, low: Float[Tensor, "row component"]) -> Interval:
    center, radius = x.center, x.radius
    z, reach = _contributions(center, site, rest), _reaches(radius, site, rest)
    mean, half = ((1 + low) / 2)[..., None], ((1 - low) / 2)[..., None]
    lo, hi = z - reach, z + reach

    def largest(sign: int) -> Float[Tensor, "row d_out"]:
        """The upper end of sign * output."""
        # Any slope in [-1, 1] with this intercept bounds |z|, so that rounding the slope is harmless.
        slope = ((hi.abs() - lo.abs()) / (hi - lo)).nan_to_num(nan=0.0).clamp(-1, 1)
        slope = torch.where(reach > 0, slope, z.sign())
        intercept = torch.maximum(hi.abs() - slope * hi, lo.abs() - slope * lo)
        weight = sign * mean + half * slope
        fixed = (half * intercept).sum(1)
        if not reach.any():
            return (weight * z).sum(1) + fixed
        matrix = torch.einsum("rpo,pi->roi", weight[:, site.owner] * site.u, site.v)
        if rest is not None:
            matrix = matrix + weight[:, -1, :, None] * rest
        middle = torch.einsum("roi,ri->ro", matrix, center)
        return middle + torch.einsum("roi,ri->ro", matrix.abs(), radius) + fixed

    magnitude = (center.abs() + radius) @ site.v.abs().T @ site.u.abs()
    if rest is not None:
        magnitude = magnitude + (center.abs() + radius) @ rest.abs().T
    return widened(-largest(-1), largest(1), magnitude)


def _contributions(x: Tensor, site: Pieces, rest: Tensor | None) -> Float[Tensor, "row component d_out"]:
    """What each component, and the remainder last, adds to the output rows when it is on."""
    z = x.new_zeros(len(x), site.n, site.u.shape[1])
    z.index_add_(1, site.owner, (x @ site.v.T)[..., None] * site.u)
    return z if rest is None else torch.cat([z, (x @ rest.T)[:, None]], 1)


def _reaches(radius: Tensor, site: Pieces, rest: Tensor | None) -> Float[Tensor, "row component d_out"]:
    """Half widths of the contributions; each weight is formed, since its factors cancel inside it."""
    weights = [site.weight(c) for c in range(site.n)] if radius.any() else []
    if not weights:
        return radius.new_zeros(len(radius), site.n + (rest is not None), site.u.shape[1])
    weights += [] if rest is None else [rest]
    return torch.stack([radius @ weight.abs().T for weight in weights], 1)


def mse_upper(target: Float[Tensor, "*batch d_output"], output: Interval) -> Float[Tensor, "*batch"]:
    """The largest mean squared error over the last dimension between the target and any output in the box.

    Exact for a box, to rounding.
    """
    exact = target.detach().double()
    farthest = torch.maximum((output.hi - exact).abs(), (output.lo - exact).abs())
    return farthest.square().mean(-1) * (1 + SLACK)


def kl_upper(target_logits: Float[Tensor, "*batch token"], output: Interval) -> Float[Tensor, "*batch"]:
    r"""An upper bound of KL(target || output) over all logits z in the box, in nats.

    The divergence is :math:`\log \sum_i e^{z_i} - p \cdot z - H(p)`, convex in z and so largest at a vertex.
    The two most probable classes are tried at both their ends; for the others the smaller of two bounds is
    taken.

    *Centred.* The first two terms are :math:`\log \sum_i e^{z_i - p \cdot z}`, and in the exponent every
    logit occurs once: :math:`z_i - p \cdot z \le (1 - p_i) \bar z_i - \sum_{j \ne i} p_j \underline z_j`.

    *Dual.* :math:`\log S \le \lambda S - \log \lambda - 1` for every :math:`\lambda > 0`, after which the
    logits separate and each is largest at an end :math:`e_i` of its own: :math:`\sum_i \max_{e_i} (\lambda
    e^{e_i} - p_i e_i) - \log \lambda - 1`. It is convex in :math:`\log \lambda`, bisection finds the
    smallest, and any :math:`\lambda` is sound. The value is the exact maximum but for at most one logit that
    stays between its ends.

    Returns:
        Non-negative numbers; infinite where the box is unbounded. Exact for a target of one certain class.

    Source:
        Ours.
    """
    log_p = F.log_softmax(target_logits.detach().double(), -1)
    p = log_p.exp()
    tried = p.topk(min(_N_CLASSES_TRIED, p.shape[-1])).indices.split(1, -1)
    largest = _largest_free_energy(output.lo, output.hi, p, tried)
    size = torch.maximum(output.lo.abs(), output.hi.abs()).nan_to_num(posinf=0).amax(-1)
    size = size + log_p.abs().nan_to_num(posinf=0).amax(-1)
    return (largest - torch.special.entr(p).sum(-1) + SLACK * (1 + size)).clamp_min(0)


def _largest_free_energy(lo: Tensor, hi: Tensor, p: Tensor, tried: tuple[Tensor, ...]) -> Float[Tensor, "*batch"]:
    """An upper bound of logsumexp(z) - p z over the box, the classes `tried` at each of their ends."""
    if tried:
        own, rest = tried[0], tried[1:]
        known = (end.gather(-1, own) for end in (lo, hi))
        branches = [(lo.scatter(-1, own, end), hi.scatter(-1, own, end)) for end in known]
        return torch.maximum(*(_largest_free_energy(*branch, p, rest) for branch in branches))
    # A class without probability and with logit -inf adds nothing, where 0 * inf would be undefined.
    p_lo, p_hi = (torch.where(p > 0, p * end, 0.0) for end in (lo, hi))
    centred = (hi - p_lo.sum(-1, keepdim=True) - (p_hi - p_lo)).logsumexp(-1)
    bounds = torch.stack([centred, _dual(lo, hi, p_lo, p_hi)])
    return bounds.nan_to_num(nan=torch.inf, posinf=torch.inf).amin(0)


def _dual(lo: Tensor, hi: Tensor, p_lo: Tensor, p_hi: Tensor) -> Float[Tensor, "*batch"]:
    """The dual bound of logsumexp(z) - p z over the box; the search is over log lambda = -log S."""
    below, above = -hi.logsumexp(-1, keepdim=True), -lo.logsumexp(-1, keepdim=True)

    def terms(log_scale: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (log_scale + lo).exp(), (log_scale + hi).exp()
        rises = high - p_hi > low - p_lo
        return torch.where(rises, high, low), torch.where(rises, p_hi, p_lo)

    for _ in range(_BISECTIONS):
        middle = (below + above) / 2
        too_large = terms(middle)[0].sum(-1, keepdim=True) > 1  # the derivative of the bound in log lambda
        below, above = torch.where(too_large, below, middle), torch.where(too_large, middle, above)
    exponentials, linear = terms(below)
    return (exponentials - linear).sum(-1) - below.squeeze(-1) - 1
