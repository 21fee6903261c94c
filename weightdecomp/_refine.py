"""Refinement: gradient steps on the components under random and adversarial sources, exact at every moment."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightdecomp._attack import Ablation, Sources, ablated_divergence, drawn_sources, masks_from
from weightdecomp._batches import Batch, size
from weightdecomp._config import Config
from weightdecomp._forward import Masks, Record, inner_activations, recorded
from weightdecomp._pieces import Pieces

_POOL = 8  # source vectors that the adversary keeps, each shared by a part of the batch
_ASCENT = 0.1  # sign step of the adversary, from the same gradient as the refinement
_FLOOR = 1e-4  # least relative power of an input direction, so that hardly used ones do not run away
_RAMP = 0.5  # width of the gates' ramps during refinement, as a share of their thresholds
_LEAK = 0.01  # slope of the surrogate gradients beyond the ends of a ramp (VPD, S6)
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
    ridge = torch.finfo(gram.dtype).eps * gram.diagonal().mean()
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return factor @ torch.cholesky_solve(missing, torch.linalg.cholesky(gram))


def conditioning(factor: Float[Tensor, "piece d"]) -> float:
    """Smallest over largest singular value of the span; 0 where the pieces cannot span the space."""
    if factor.shape[0] < factor.shape[1]:
        return 0.0
    sizes = torch.linalg.svdvals(factor.detach())
    return float(sizes[-1] / sizes[0].clamp_min(1e-30))


class Frame(NamedTuple):
    """Where one site's components may move: the span of its inputs and the side that keeps the sum exact.

    Attributes:
        basis: Columns that span the site's inputs, each as long as the inputs' root mean square along it, so that a
            step of one size in any coordinate of a v changes activations by one size.
        dual: The matching columns with basis^T dual = 1.
        weight: W in that basis.
        move_v: Whether exactness is restored by the v (else by the u).
        columns: Orthonormal rows that span W's columns if the u must stay in them, else None.
    """

    basis: Float[Tensor, "d_in reach"]
    dual: Float[Tensor, "d_in reach"]
    weight: Float[Tensor, "d_out reach"]
    move_v: bool
    columns: Float[Tensor, "rank d_out"] | None

    def reduced(self, pieces: Pieces) -> Pieces:
        """The pieces with v in the basis."""
        return pieces._replace(v=pieces.v @ self.basis)

    def lifted(self, pieces: Pieces) -> Pieces:
        """The pieces with v in the site's own coordinates."""
        return pieces._replace(v=pieces.v @ self.dual.T)

    def exact(self, pieces: Pieces) -> Pieces:
        """Restore the exact sum after a step."""
        if self.columns is not None:
            pieces = pieces._replace(u=pieces.u @ self.columns.T @ self.columns)
            inner = pieces._replace(u=pieces.u @ self.columns.T)
            return pieces._replace(v=exact(inner, self.columns @ self.weight, True).v)
        return exact(pieces, self.weight, self.move_v)


def frame(
    basis: Float[Tensor, "d_in reach"],
    power: Float[Tensor, " reach"],
    matrix: Float[Tensor, "d_out d_in"],
    pieces: Pieces,
) -> Frame:
    """Scale the basis to the inputs and choose the side on which exactness is best conditioned."""
    root = power.clamp_min(_FLOOR * power.max()).sqrt()
    basis, dual = basis * root, basis / root
    weight = matrix @ basis
    by_v, by_u = conditioning(pieces.u), conditioning(pieces.v @ basis)
    columns = None
    if max(by_v, by_u) < 1e-4:
        left, sizes, _ = torch.linalg.svd(weight, full_matrices=False)
        columns = left[:, sizes > 1e-6 * sizes[0]].T
    return Frame(basis, dual, weight, by_v >= by_u or columns is not None, columns)


class Terms(NamedTuple):
    """What one step measured; damages are shares of the divergence with everything ablated."""

    stochastic: float
    adversarial: float
    active: float
    price: float

    def as_dict(self) -> dict[str, float]:
        """Names and values, for `on_step`."""
        return self._asdict()


class _MaskGate(torch.autograd.Function):
    """clamp(z, 0, 1) whose gradient leaks below 0 only where the loss wants the gate to rise (VPD, S6)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,), grad = ctx.saved_tensors, grads[0]
        inside = (z > 0) & (z <= 1)
        return grad * (inside + _LEAK * ((z <= 0) & (grad < 0)))


def ramp(
    activations: Float[Tensor, "*batch component"], thresholds: Float[Tensor, "arm=2 component"]
) -> Float[Tensor, "*batch component"]:
    """Height on the ramps around the thresholds: 0 where a gate begins to open, 1 where it is open."""
    width = _RAMP * thresholds.clamp_min(1e-12)
    heights = ((activations - thresholds[0]) / width[0], (-activations - thresholds[1]) / width[1])
    return torch.maximum(*heights) + 0.5


def openings(height: Float[Tensor, "*batch component"]) -> Float[Tensor, ""]:
    """Mean number of open gates per row, with a slope wherever a gate is not shut."""
    lifted = height.clamp_min(0) - (1 - _LEAK) * (height - 1).clamp_min(0)
    return lifted.sum(-1).mean()


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
        self.reduced = {path: _leaves(frames[path].reduced(own)) for path, own in ablation.pieces.items()}
        self.factors = [x for own in self.reduced.values() for x in (own.v, own.u)]
        groups = [{"params": [x], "lr": config.rate * _size(x)} for x in self.factors]
        self.rates = [group["lr"] for group in groups]
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12, foreach=True)
        self.sources = drawn_sources(ablation, _POOL, rng)

    def pieces(self) -> dict[str, Pieces]:
        """The components as they are now, exact by construction, in the sites' own coordinates.

        The correction is part of what is differentiated, so that a step never spends itself on breaking the sum.
        """
        return {path: self.frames[path].lifted(self.frames[path].exact(own)) for path, own in self.reduced.items()}

    def detached(self) -> dict[str, Pieces]:
        """The components as they are now, as plain tensors that later steps leave alone."""
        found = self.pieces()
        return {path: Pieces(own.v.detach().clone(), own.u.detach().clone(), own.owner) for path, own in found.items()}

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
            heights = self._heights(record, pieces, thresholds)
            importances = {path: [_MaskGate.apply(z) for z in calls] for path, calls in heights.items()}
            masks = self._masks(importances, adversarial, group)
            trial = ablation._replace(pieces=pieces)
            divergence = ablated_divergence(trial, batch, record.output, masks)
            per_input = divergence.reshape(len(divergence), -1).mean(1) / self.nothing
            open_gates = torch.stack([openings(z) for calls in heights.values() for z in calls]).sum()
            leaves = list(self.sources.values())
            loss = per_input.mean() + price * open_gates
            grads = torch.autograd.grad(loss, self.factors + leaves, allow_unused=True)
        self._descend(grads[: len(self.factors)], step)
        self._ascend(grads[len(self.factors) :])
        hit = per_input.detach()
        return Terms(_mean(hit[~adversarial]), _mean(hit[adversarial]), float(open_gates.detach()), price)

    def _heights(
        self, record: Record, pieces: Mapping[str, Pieces], thresholds: Mapping[str, Tensor]
    ) -> dict[str, list[Tensor]]:
        """Heights of all gates on their ramps, on the target's own activations."""
        return {
            path: [ramp(own.activations(h), thresholds[path]) for h in inner_activations(record, site, own)]
            for site in self.ablation.sites
            for path, own in ((site.path, pieces[site.path]),)
        }

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


def _leaves(pieces: Pieces) -> Pieces:
    """Copies that gradients can be taken of, apart from the pieces that a rejected round falls back to."""
    return Pieces(*(x.detach().clone().requires_grad_() for x in pieces[:2]), pieces.owner)


def _size(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def _mean(x: Tensor) -> float:
    return float(x.mean()) if len(x) else 0.0
