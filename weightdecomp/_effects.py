"""Effects: what ablating each component does to the final output, and the gates that this implies."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, call
from weightdecomp._divergence import output_tensor
from weightdecomp._forward import Record, replaced
from weightdecomp._pieces import Pieces
from weightdecomp._processes import ALONE, Processes
from weightdecomp._sites import Site

_PROBES = 4  # random output directions
_POINTS = (5, 15, 45, 135)  # midpoints on the path from everything ablated to the target; more where few miss much
_MISSED = 0.25  # share of the change along the path that may be missed
_NONE = 1e-9  # share of the limit that stands in for no damage at all; its inverse for the worst there is
_LEAST = 1e-3  # least effect of a typical contribution, relative to a typical effect, so that none is free to close


def _probe(divergence: str, output: Tensor, rng: torch.Generator) -> Tensor:
    """Random r with E[(r.df)^2] the divergence of a small output change df, to second order."""
    if divergence == "kl":
        p = output.detach().float().softmax(-1)
        drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=rng).reshape(p.shape[:-1])
        score = torch.nn.functional.one_hot(drawn, p.shape[-1]) - p
        return score.to(output.dtype) / 2**0.5
    signs = torch.randint(0, 2, output.shape, generator=rng, device=output.device) * 2 - 1
    return signs.to(output.dtype) / output.shape[-1] ** 0.5


def drawn_probes(record: Record, divergence: str, rng: torch.Generator) -> list[Tensor]:
    """Random output directions of one site's sensitivities."""
    return [_probe(divergence, output_tensor(record.output), rng) for _ in range(_PROBES)]


def sensitivities(
    model: nn.Module, batch: Batch, site: Site, record: Record, divergence: str, rng: torch.Generator
) -> list[Float[Tensor, "probe *batch d_out"]]:
    """Gradients of random output projections at the site's output rows, averaged while the site is switched on.

    The average over the path from m = 0 to m = 1 of the gradient at the site output m W x makes the effect of
    removing one coordinate of it exact where what follows acts on coordinates one by one (a neuron's nonlinearity);
    elsewhere it is a secant estimate (integrated gradients, Sundararajan et al. 2017, on the mask).

    Returns:
        One tensor for each call of the site's module.
    """
    probes = drawn_probes(record, divergence, rng)
    with torch.no_grad():
        start, _ = _on_path(model, batch, site, 0.0)
        change = torch.stack([((output_tensor(record.output) - start) * probe).sum() for probe in probes])
    found = None
    for n in _POINTS:
        found, gained = _integrated(model, batch, site, probes, n)
        if float((gained - change).norm()) <= _MISSED * float(change.norm()):
            break
    assert found is not None
    return found


def _on_path(model: nn.Module, batch: Batch, site: Site, share: float) -> tuple[Tensor, list[Tensor]]:
    """The output with a share of the site's weight, and the site's output rows, one leaf for each call."""
    weight, leaves = site.matrix(), list[Tensor]()

    def forward(site: Site, index: int, operands: tuple) -> Any:
        rows = share * site.read(operands, weight)
        # Rows of a later call of the same module depend on those of an earlier one, and stay attached to them.
        rows = rows if leaves and rows.requires_grad else rows.detach().requires_grad_()
        leaves.append(rows)
        return site.write(rows, operands)

    with replaced([site], forward):
        return output_tensor(call(model, batch)), leaves


def _integrated(
    model: nn.Module, batch: Batch, site: Site, probes: Sequence[Tensor], n: int
) -> tuple[list[Float[Tensor, "probe *batch d_out"]], Float[Tensor, " probe"]]:
    """Mean gradients at n midpoints, and the change of each probe that they account for along the path."""
    sums, gained = list[Tensor](), torch.zeros(len(probes), dtype=probes[0].dtype, device=probes[0].device)
    for share in ((i + 0.5) / n for i in range(n)):
        with torch.enable_grad():
            output, leaves = _on_path(model, batch, site, share)
            projections = [(output * probe).sum() for probe in probes]
        for k, projection in enumerate(projections):
            for index, grad in enumerate(_gradients(projection, leaves, k + 1 < len(probes))):
                if len(sums) <= index:
                    sums.append(torch.zeros(len(probes), *grad.shape, dtype=grad.dtype, device=grad.device))
                sums[index][k] += grad / n
                gained[k] += (grad * leaves[index].detach()).sum() / (n * share)
    return sums, gained


def _gradients(projection: Tensor, leaves: Sequence[Tensor], more: bool) -> Sequence[Tensor]:
    """Gradients at the leaves; zeros where the output does not depend on them."""
    if not projection.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(projection, leaves, retain_graph=more, materialize_grads=True)


def effects(
    inner: Float[Tensor, "*batch piece"], pieces: Pieces, sensitivity: Float[Tensor, "probe *batch d_out"]
) -> Float[Tensor, "*batch component"]:
    """Estimated divergence per input when one component alone is ablated."""
    changes = (sensitivity @ pieces.u.T) * inner
    if not pieces.rank_one:
        by_component = torch.zeros(*changes.shape[:-1], pieces.n, dtype=inner.dtype, device=inner.device)
        changes = by_component.index_add_(-1, pieces.owner, changes)
    return changes.square().mean(0)


class Trade:
    """Every way to close gates by a threshold on each arm, with its damage and its savings.

    Built once from activations and effects; `thresholds(price)` then is the exact minimiser, per component and arm, of
    (effects where closed) + price x (inputs where open), by running sums over sorted activations. Of several
    processes each does so for the components that it was given, and has the thresholds of all.
    """

    def __init__(
        self,
        activations: Float[Tensor, "row component"],
        effects: Float[Tensor, "row component"],
        processes: Processes = ALONE,
    ) -> None:
        """Sort both arms.

        Where what follows is off along the whole path, the estimated effect is 0; a small share of the contribution's
        square stands in for it, so that at low prices every gate opens.
        """
        power = activations.square()
        effect, size = processes.sums([effects.sum(1).mean(), power.sum(1).mean()])
        self.typical = float(effect) + 1e-30
        self._processes = processes
        effects = effects + _LEAST * self.typical / float(size + 1e-30) * power
        self._arms = []
        for sign in (1, -1):
            a, order = (sign * activations).clamp_min(0).sort(0)
            e = effects.gather(0, order).where(a > 0, 0)
            closed = torch.cat([torch.zeros_like(e[:1]), e.cumsum(0)])
            opened = torch.cat([(a > 0).flip(0).cumsum(0).flip(0), torch.zeros_like(order[:1])])
            # Of equal costs argmin takes the first, which in this order is the highest threshold.
            self._arms.append((a, closed.flip(0), opened.flip(0).to(a.dtype)))

    def thresholds(self, price: float) -> Float[Tensor, "arm=2 component"]:
        """The cheapest thresholds when an open gate on one input is worth `price` of divergence."""
        arms = []
        for a, closed, opened in self._arms:
            first_open = len(a) - torch.add(closed, opened, alpha=price).argmin(0, keepdim=True)
            below = a.gather(0, (first_open - 1).clamp_min(0)).where(first_open > 0, 0)
            above = a.gather(0, first_open.clamp_max(len(a) - 1))
            # An arm that never opens on the sample stays shut a little beyond the largest activation seen.
            arms.append(torch.where(first_open < len(a), (below + above) / 2, 1.05 * above + 1e-12)[0])
        return self._processes.rows(torch.stack(arms, 1)).T.contiguous()


def opened(
    activations: Float[Tensor, "*batch component"], thresholds: Float[Tensor, "arm=2 component"]
) -> Float[Tensor, "*batch component"]:
    """Importance 1 where an activation is beyond its arm's threshold, else 0."""
    return ((activations > thresholds[0]) | (-activations > thresholds[1])).to(activations.dtype)


def highest_price(
    damage: Callable[[float], float], limit: float, low: float, high: float, rounds: int, near: float | None = None
) -> float:
    """The highest price at which the damage stays within the limit, as closely as so many bisections find it.

    Damage often rises about as a power of the price, so that a secant between logarithms saves half of the bisections;
    where it rises in steps, the search needs one or two more.

    Args:
        damage: At a price, rising with it.
        limit: Largest damage to accept.
        low: Least price, which is the answer where no damage is within the limit.
        high: Largest price.
        rounds: Bisections of the logarithm that set the accuracy.
        near: A first guess.

    Source:
        Oliveira and Takahashi 2020, "An enhancement of the bisection method average performance" (ITP).
    """
    low, high = math.log(low), math.log(high)
    fine = (high - low) / 2**rounds
    at = (low + high) / 2 if near is None else math.log(near)
    below: float | None = None
    above: float | None = None
    reach, left = 1.0, 0.0
    while high - low > fine:
        at = min(max(at, low + fine / 2), high - fine / 2)
        over = excess(damage(math.exp(at)), limit)
        if over <= 0:
            low, below = at, over
        else:
            high, above = at, over
        if below is None or above is None:
            at, reach = at - reach * over - math.copysign(fine, over), 2 * reach
            left = high - low  # twice the half width that the next step may leave
        else:
            at, left = _itp(low, high, below, above, left, fine), left / 2
    return math.exp(low)


def excess(damage: float, limit: float) -> float:
    """Logarithm of a damage over its limit; what is infinite or undefined counts as the worst there is."""
    share = damage / max(limit, sys.float_info.min)
    return math.log(max(share, _NONE) if share < 1 / _NONE else 1 / _NONE)


def _itp(low: float, high: float, below: float, above: float, left: float, fine: float) -> float:
    """The next point between two ends: the secant's, moved towards the middle so that bisection is never far better."""
    middle, secant = (low + high) / 2, low + (high - low) * below / (below - above)
    towards = math.copysign(1.0, middle - secant)
    point = secant + towards * min(0.45 * fine, abs(middle - secant))  # so that two points may enclose the answer
    most = max(left - (high - low) / 2, 0.0)
    return point if abs(point - middle) <= most else middle - towards * most
