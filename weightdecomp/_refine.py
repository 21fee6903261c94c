"""Refinement: gradient steps on the components under random and adversarial sources, exact at every moment."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightdecomp._attack import Ablation, Sources, ablated_divergence, drawn_sources, masks_from
from weightdecomp._batches import Batch, size
from weightdecomp._config import Config
from weightdecomp._effects import opened
from weightdecomp._forward import Masks, Record, recorded
from weightdecomp._pieces import Pieces
from weightdecomp._sites import Site

_POOL = 8  # source vectors that the adversary keeps, each shared by a part of the batch
_ASCENT = 0.1  # sign step of the adversary, from the same gradient as the refinement
_FRESH = 4  # every so many steps one source vector is drawn anew, so that the adversary keeps looking elsewhere


def exact(pieces: Pieces, weight: Float[Tensor, "d_out d_in"], move_v: bool) -> Pieces:
    """The nearest pieces that sum to the weight, moving only what they read (v) or only what they write (u).

    A least-squares correction: where the u span the weight's columns (or the v its rows) the sum is exact to rounding.
    """
    missing = weight - pieces.total()
    if move_v:
        return pieces._replace(v=pieces.v + _least_squares(pieces.u, missing))
    return pieces._replace(u=pieces.u + _least_squares(pieces.v, missing.T))


def _least_squares(factor: Float[Tensor, "piece d"], missing: Float[Tensor, "d other"]) -> Tensor:
    """The smallest change x with factor^T x = missing."""
    gram = factor.T @ factor
    ridge = 1e-7 * gram.diagonal().mean()
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return factor @ torch.cholesky_solve(missing, torch.linalg.cholesky(gram))


def conditioning(factor: Float[Tensor, "piece d"]) -> float:
    """Smallest over largest singular value of the span; 0 where the pieces cannot span the space."""
    if factor.shape[0] < factor.shape[1]:
        return 0.0
    sizes = torch.linalg.svdvals(factor)
    return float(sizes[-1] / sizes[0])


class Frame(NamedTuple):
    """Where one site's components may move: the span of its inputs and the side that keeps the sum exact.

    Attributes:
        basis: Orthonormal columns that span the site's inputs.
        weight: W in that basis.
        move_v: Whether exactness is restored by the v (else by the u).
        columns: Orthonormal rows that span W's columns if the u must stay in them, else None.
    """

    basis: Float[Tensor, "d_in reach"]
    weight: Float[Tensor, "d_out reach"]
    move_v: bool
    columns: Float[Tensor, "rank d_out"] | None

    def reduced(self, pieces: Pieces) -> Pieces:
        """The pieces with v in the basis."""
        return pieces._replace(v=pieces.v @ self.basis)

    def lifted(self, pieces: Pieces) -> Pieces:
        """The pieces with v in the site's own coordinates."""
        return pieces._replace(v=pieces.v @ self.basis.T)

    def exact(self, pieces: Pieces) -> Pieces:
        """Restore the exact sum after a step."""
        if self.columns is not None:
            pieces = pieces._replace(u=pieces.u @ self.columns.T @ self.columns)
            inner = pieces._replace(u=pieces.u @ self.columns.T)
            return pieces._replace(v=exact(inner, self.columns @ self.weight, True).v)
        return exact(pieces, self.weight, self.move_v)


def frame(basis: Float[Tensor, "d_in reach"], matrix: Float[Tensor, "d_out d_in"], pieces: Pieces) -> Frame:
    """Choose the side on which exactness is best conditioned."""
    weight = matrix @ basis
    by_v, by_u = conditioning(pieces.u), conditioning(pieces.v @ basis)
    columns = None
    if max(by_v, by_u) < 1e-4:
        left, sizes, _ = torch.linalg.svd(weight, full_matrices=False)
        columns = left[:, sizes > 1e-6 * sizes[0]].T
    return Frame(basis, weight, by_v >= by_u or columns is not None, columns)


class Terms(NamedTuple):
    """What one step measured; damages are shares of the divergence with everything ablated."""

    stochastic: float
    adversarial: float
    active: float
    price: float

    def as_dict(self) -> dict[str, float]:
        """Names and values, for `on_step`."""
        return self._asdict()


def closed_importances(
    record: Record, sites: Sequence[Site], pieces: Mapping[str, Pieces], thresholds: Mapping[str, Tensor]
) -> Masks:
    """Binary importances of all sites on the target's own activations."""
    found = {}
    for site in sites:
        own = pieces[site.path]
        found[site.path] = [
            opened(own.activations(site.read(operands, own.v)), thresholds[site.path])
            for operands in record.operands[site.path]
        ]
    return found


class Refiner:
    """The state of the refinement: factors, their Adam moments, and the adversary's pool of sources."""

    def __init__(
        self,
        ablation: Ablation,
        frames: Mapping[str, Frame],
        nothing: float,
        config: Config,
        rng: torch.Generator,
    ) -> None:
        """Start from the ablation's pieces."""
        self.ablation, self.frames, self.config, self.rng = ablation, frames, config, rng
        self.nothing = nothing
        self.reduced = {path: frames[path].reduced(own) for path, own in ablation.pieces.items()}
        self.factors = [x for own in self.reduced.values() for x in (own.v, own.u)]
        groups = [{"params": [x.requires_grad_()], "lr": config.rate * _size(x)} for x in self.factors]
        self.rates = [group["lr"] for group in groups]
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12, foreach=True)
        self.sources = drawn_sources(ablation, _POOL, rng)

    def pieces(self) -> dict[str, Pieces]:
        """The components as they are now, in the sites' own coordinates."""
        return {path: self.frames[path].lifted(own) for path, own in self.reduced.items()}

    def detached(self) -> dict[str, Pieces]:
        """The components as they are now, as plain tensors."""
        return {path: Pieces(own.v.detach(), own.u.detach(), own.owner) for path, own in self.pieces().items()}

    def step(self, batch: Batch, thresholds: Mapping[str, Tensor], step: int, price: float) -> Terms:
        """One gradient step on one batch, one ascent step of the adversary, and back to the exact sum."""
        ablation = self.ablation
        record = recorded(ablation.model, batch, ablation.sites)
        if step % _FRESH == 0:
            self._redraw(step // _FRESH % _POOL)
        adversarial, group = self._assignment(size(batch))
        for source in self.sources.values():
            source.requires_grad_()
        with torch.enable_grad():
            pieces = self.pieces()
            with torch.no_grad():
                importances = closed_importances(record, ablation.sites, pieces, thresholds)
            masks = self._masks(importances, adversarial, group)
            trial = ablation._replace(pieces=pieces)
            divergence = ablated_divergence(trial, batch, record.output, masks)
            per_input = divergence.reshape(len(divergence), -1).mean(1) / self.nothing
            leaves = list(self.sources.values())
            grads = torch.autograd.grad(per_input.mean(), self.factors + leaves, allow_unused=True)
        self._descend(grads[: len(self.factors)], step)
        self._ascend(grads[len(self.factors) :])
        hit = per_input.detach()
        active = sum(float(g.mean(tuple(range(g.ndim - 1))).sum()) for calls in importances.values() for g in calls)
        return Terms(_mean(hit[~adversarial]), _mean(hit[adversarial]), active, price)

    def _assignment(self, n: int) -> tuple[Tensor, Int[Tensor, " input"]]:
        device = self.factors[0].device
        adversarial = torch.rand(n, generator=self.rng, device=device) < self.config.adversarial
        return adversarial, torch.randint(_POOL, (n,), generator=self.rng, device=device)

    def _masks(self, importances: Masks, adversarial: Tensor, group: Tensor) -> Masks:
        """Adversarial inputs take a pooled source; the others random ones at a random subset of the sites."""
        attacked, _ = masks_from(importances, self.sources, group)
        n, n_sites = len(group), len(importances)
        subset = torch.rand(n, n_sites, generator=self.rng, device=group.device)
        wanted = torch.randint(1, n_sites + 1, (n, 1), generator=self.rng, device=group.device)
        ablated = subset.argsort(1).argsort(1) < wanted
        masks = {}
        for column, (path, calls) in enumerate(importances.items()):
            masks[path] = []
            for g, m in zip(calls, attacked[path], strict=True):
                r = torch.rand(g.shape, generator=self.rng, device=g.device, dtype=g.dtype)
                if len(g) != n:
                    masks[path].append(g + (1 - g) * r)
                    continue
                shape = (n, *[1] * (g.ndim - 1))
                r = torch.where(ablated[:, column].reshape(shape), r, 1)
                masks[path].append(torch.where(adversarial.reshape(shape), m, g + (1 - g) * r))
        return masks

    def _descend(self, grads: Sequence[Tensor | None], step: int) -> None:
        decay = 0.5 + 0.5 * math.cos(math.pi * step / max(self.config.steps, 1))
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * (0.05 + 0.95 * decay)
        for factor, grad in zip(self.factors, grads, strict=True):
            factor.grad = grad
        self.optimiser.step()
        with torch.no_grad():
            for path, own in self.reduced.items():
                fixed = self.frames[path].exact(own)
                own.v.copy_(fixed.v)
                own.u.copy_(fixed.u)

    def _ascend(self, grads: Sequence[Tensor | None]) -> None:
        for (path, source), grad in zip(list(self.sources.items()), grads, strict=True):
            source = source.detach()
            self.sources[path] = source if grad is None else (source + _ASCENT * grad.sign()).clamp(0, 1)

    def _redraw(self, index: int) -> None:
        fresh: Sources = drawn_sources(self.ablation, 1, self.rng)
        for path, source in self.sources.items():
            source[index] = fresh[path][0]

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        found = {f"factor.{i}": x.detach() for i, x in enumerate(self.factors)}
        found |= {f"source.{path}": x.detach() for path, x in self.sources.items()}
        for i, x in enumerate(self.factors):
            found |= {f"moment.{i}.{key}": value for key, value in self.optimiser.state.get(x, {}).items()}
        return found | {"rng": self.rng.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
        with torch.no_grad():
            for i, x in enumerate(self.factors):
                x.copy_(state[f"factor.{i}"])
                keys = [key for key in state if key.startswith(f"moment.{i}.")]
                if keys:
                    self.optimiser.state[x] = {key.split(".", 2)[2]: state[key].clone() for key in keys}
        self.sources = {path: state[f"source.{path}"].clone() for path in self.sources}
        self.rng.set_state(state["rng"])


def _size(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def _mean(x: Tensor) -> float:
    return float(x.mean()) if len(x) else 0.0
