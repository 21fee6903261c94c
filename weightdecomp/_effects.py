"""Effects: what ablating each component does to the final output."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, call
from weightdecomp._divergence import output_tensor
from weightdecomp._forward import Record, replaced
from weightdecomp._pieces import Pieces
from weightdecomp._sites import Site
from weightdecomp._upstream import Upstream

_PROBES = 4  # random output directions
_FEWEST = 5  # midpoints on the path from everything ablated to the target
_MOST = 135  # three times as many at a time where few miss much
_MISSED = 0.25  # share of the change along the path that may be missed


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
    upstream = Upstream(model, batch, site)
    with torch.no_grad():
        start, _ = _on_path(upstream, 0.0)
        change = torch.stack([((output_tensor(record.output) - start) * probe).sum() for probe in probes])
    sums, n = _Sums([], torch.zeros_like(change)), _FEWEST
    _add(sums, upstream, probes, [(i + 0.5) / n for i in range(n)])
    while n < _MOST and float((sums.gained / n - change).norm()) > _MISSED * float(change.norm()):
        n *= 3
        # Every third midpoint is one of a path in a third as many parts.
        _add(sums, upstream, probes, [(i + 0.5) / n for i in range(n) if i % 3 != 1])
    return [one / n for one in sums.gradients]


def _on_path(upstream: Upstream, share: float) -> tuple[Tensor, list[Tensor]]:
    """The output with a share of the site's weight, and the site's output rows, one leaf for each call."""
    weight, leaves = upstream.site.matrix(), list[Tensor]()

    def forward(site: Site, index: int, operands: tuple) -> Any:
        rows = share * site.read(operands, weight)
        # Rows of a later call of the same module depend on those of an earlier one, and stay attached to them.
        rows = rows if leaves and rows.requires_grad else rows.detach().requires_grad_()
        leaves.append(rows)
        return site.write(rows, operands)

    with upstream.kept(), replaced([upstream.site], forward):
        return output_tensor(call(upstream.model, upstream.batch)), leaves


class _Sums(NamedTuple):
    """Gradients of every call summed over points of the path, and the change of each probe that they account for."""

    gradients: list[Float[Tensor, "probe *batch d_out"]]
    gained: Float[Tensor, " probe"]


def _add(sums: _Sums, upstream: Upstream, probes: Sequence[Tensor], shares: Sequence[float]) -> None:
    """Add what is found at some points of the path, each where a share of the weight is on."""
    for share in shares:
        with torch.enable_grad():
            output, leaves = _on_path(upstream, share)
            projections = [(output * probe).sum() for probe in probes]
        for k, projection in enumerate(projections):
            for index, grad in enumerate(_gradients(projection, leaves, k + 1 < len(probes))):
                if len(sums.gradients) <= index:
                    sums.gradients.append(grad.new_zeros(len(probes), *grad.shape))
                sums.gradients[index][k] += grad
                sums.gained[k] += (grad * leaves[index].detach()).sum() / share


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


def alone(
    pieces: Pieces, inner: Sequence[Tensor], sensitivity: Sequence[Tensor]
) -> list[Float[Tensor, "*batch component"]]:
    """Effects of every call of a site: what each component does when it alone is ablated."""
    return [effects(h, pieces, s) for h, s in zip(inner, sensitivity, strict=True)]
