"""Refinement: gradient steps on the components under random and adversarial sources, exact at every moment."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim.adam import adam

from weightdecomp._attack import Ablation, Sources, ablated_divergence, drawn_sources
from weightdecomp._batches import Batch, share, size
from weightdecomp._config import Config
from weightdecomp._forward import Masks, Record, inner_activations, recorded
from weightdecomp._frame import Frame
from weightdecomp._gate import gated
from weightdecomp._pieces import Pieces
from weightdecomp._processes import Processes, exchange, local
from weightdecomp._sharded import OnDemand, applied, stored
from weightdecomp._sites import Site

_POOL = 2  # source vectors that the adversary keeps, each shared by a part of the batch
_ASCENT = 0.5  # sign step of the adversary, from the same gradient as the refinement
_MEMORY = 0.7  # share of its past slope that it keeps: one step shows it few inputs
_FRESH = 32  # every so many steps one source vector is drawn anew, so that the adversary keeps looking elsewhere


class Terms(NamedTuple):
    """What one step measured; damages are shares of the divergence with everything ablated."""

    stochastic: float
    adversarial: float
    active: float
    price: float

    def as_dict(self) -> dict[str, float]:
        """Names and values, for `on_step`."""
        return self._asdict()


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
        moving = [path for path in ablation.pieces if frames[path].moves]
        self.reduced, self.rates = dict[str, Pieces](), list[float]()
        for path in moving:
            reduced = frames[path].reduced(ablation.pieces[path])
            self.rates += [config.rate * _size(x) for x in reduced[:2]]
            self.reduced[path] = _leaves(reduced, ablation.processes)
        self.factors = [x for own in self.reduced.values() for x in own[:2]]
        self.moments = [(torch.zeros_like(x), torch.zeros_like(x), torch.zeros(())) for x in self.factors]
        self.sources = drawn_sources(ablation, _POOL, rng)
        self.slopes = {path: torch.zeros_like(source) for path, source in self.sources.items()}

    def pieces(self) -> Mapping[str, Pieces]:
        """The components as they are now, exact by construction, in the sites' own coordinates.

        The correction is part of what is differentiated, so that a step never spends itself on breaking the sum.
        """
        made = OnDemand(self.ablation.pieces, self._whole)
        return made if self.ablation.processes.shards else dict(made)

    def _whole(self, path: str) -> Pieces:
        """All components of one site."""
        if path not in self.reduced:
            return self.ablation.pieces[path]
        whole, own = self.ablation.processes.whole, self.reduced[path]
        return self.frames[path].lifted(self.frames[path].exact(Pieces(whole(own.v), whole(own.u), own.owner)))

    @torch.no_grad()
    def detached(self) -> Mapping[str, Pieces]:
        """The components as they are now, as plain tensors that later steps leave alone."""
        plain = ((path, Pieces(_plain(own.v), _plain(own.u), own.owner)) for path, own in self.pieces().items())
        return stored(plain, self.ablation.processes)

    def step(self, batch: Batch, thresholds: Mapping[str, Tensor], step: int, price: float) -> Terms:
        """One gradient step on one batch, one ascent step of the adversary, and back to the exact sum.

        Of several processes each takes its share of the batch; all make the same step.
        """
        ablation, processes, n = self.ablation, self.ablation.processes, size(batch)
        batch = share(batch, processes)
        record = recorded(ablation.model, batch, ablation.sites)
        if step % _FRESH == 0:
            self._redraw(step // _FRESH % _POOL)
        attacked = self._attacked(n)
        group = processes.own(attacked)
        for source in self.sources.values():
            source.requires_grad_()
        with torch.enable_grad():
            pieces = self.pieces()
            masks, open_gates = self._masks(record, pieces, thresholds, group, (len(attacked), n))
            trial = ablation._replace(pieces=pieces)
            divergence = ablated_divergence(trial, batch, record.output, masks)
            per_input = divergence.reshape(len(divergence), -1).mean(1) / self.nothing
            leaves = list(self.sources.values())
            part = size(batch) / n  # so that losses of several processes sum to the loss of the whole batch
            loss = part * (per_input.mean() + price * open_gates)
            zeros = not processes.alone  # a sum over processes has no gaps
            with nullcontext() if processes.alone else exchange():
                grads = torch.autograd.grad(loss, self.factors + leaves, allow_unused=True, materialize_grads=zeros)
        # Gradients of what is sharded are sums over all processes already.
        n_summed = len(self.factors) if processes.shards else 0
        grads = [*grads[:n_summed], *processes.sums(grads[n_summed:])]
        self._descend(grads[: len(self.factors)], step)
        self._ascend(grads[len(self.factors) :])
        hit = per_input.detach()
        split = len(group)
        active = processes.sum(part * open_gates.detach())
        return Terms(_mean(hit[split:], processes), _mean(hit[:split], processes), float(active), price)

    def _attacked(self, n: int) -> Int[Tensor, " attacked"]:
        """Rows of the pool for the inputs that are attacked: the first ones, as inputs come in random order."""
        device = self.factors[0].device
        count = int((torch.rand(n, generator=self.rng, device=device) < self.config.adversarial).sum())
        return torch.randint(_POOL, (count,), generator=self.rng, device=device)

    def _masks(
        self,
        record: Record,
        pieces: Mapping[str, Pieces],
        thresholds: Mapping[str, Tensor],
        group: Int[Tensor, " attacked"],
        whole_batch: tuple[int, int],
    ) -> tuple[Masks, Float[Tensor, ""]]:
        """Masks on the target's own activations, and the mean number of open gates, summed over sites.

        Attacked inputs take a pooled source; the others random ones at a random subset of the sites. How many are
        attacked of how many inputs is that of all processes together, for which all is drawn.
        """
        sites, processes, (attacked, n) = self.ablation.sites, self.ablation.processes, whole_batch
        subset = torch.rand(n, len(sites), generator=self.rng, device=group.device)
        wanted = torch.randint(1, len(sites) + 1, (n, 1), generator=self.rng, device=group.device)
        spared = processes.own(subset.argsort(1).argsort(1) >= wanted)
        spared[: len(group)] = False
        masks, counts = {}, []
        for column, site in enumerate(sites):
            path = site.path
            whole, pool = spared[:, column].nonzero()[:, 0], self.sources[path]
            masks[path] = []
            for a in applied(pieces, path, lambda own, site=site: _activations(record, site, own)):
                # Rows of a table do not belong to single inputs: their sources are random.
                own_rows = len(a) == len(spared)
                some = group if own_rows else group[:0]
                sources = self._drawn(a, pool.detach(), some, (attacked, n) if own_rows else (0, len(a)))
                if own_rows:
                    sources.index_fill_(0, whole, 1)
                mask, count = gated(a, thresholds[path], sources, pool, some)
                masks[path].append(mask)
                counts.append(count)
        return masks, torch.stack(counts).sum()

    def _drawn(
        self, like: Tensor, pool: Float[Tensor, "group source"], group: Tensor, others: tuple[int, int]
    ) -> Tensor:
        """Sources in the shape of the activations: the pool's for the first inputs, random ones for the rest."""
        found = torch.empty_like(like)
        rows = pool[group, :-1]
        found[: len(group)] = rows.reshape(len(group), *[1] * (like.ndim - 2), rows.shape[-1])
        self.ablation.processes.uniform_(found[len(group) :], *others, self.rng)
        return found

    def _descend(self, grads: Sequence[Tensor | None], step: int) -> None:
        decay = 0.5 + 0.5 * math.cos(math.pi * step / max(self.config.steps, 1))
        for factor, grad, rate, (mean, square, count) in zip(
            self.factors, grads, self.rates, self.moments, strict=True
        ):
            if grad is not None:
                # The functional form: the class imports torch's compiler, which takes longer than a small run.
                with torch.no_grad():
                    adam(
                        [local(factor)], [local(grad)], [local(mean)], [local(square)], [], [count],
                        amsgrad=False, beta1=0.9, beta2=0.99, lr=rate * (0.05 + 0.95 * decay),
                        weight_decay=0.0, eps=1e-12, maximize=False,
                    )  # fmt: skip

    def _ascend(self, grads: Sequence[Tensor | None]) -> None:
        for (path, source), grad in zip(list(self.sources.items()), grads, strict=True):
            if grad is not None:
                self.slopes[path].lerp_(grad, 1 - _MEMORY)
            self.sources[path] = (source.detach() + _ASCENT * self.slopes[path].sign()).clamp(0, 1)

    def _redraw(self, index: int) -> None:
        fresh: Sources = drawn_sources(self.ablation, 1, self.rng)
        for path, source in self.sources.items():
            source[index], self.slopes[path][index] = fresh[path][0], 0

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        whole = self.ablation.processes.whole
        found = {f"factor.{i}": whole(x.detach()) for i, x in enumerate(self.factors)}
        found |= {f"source.{path}": x.detach() for path, x in self.sources.items()}
        found |= {f"slope.{path}": x for path, x in self.slopes.items()}
        for i, (mean, square, count) in enumerate(self.moments):
            found |= {f"moment.{i}.0": whole(mean), f"moment.{i}.1": whole(square), f"moment.{i}.2": count}
        return found | {"rng": self.rng.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
        sharded = self.ablation.processes.sharded
        with torch.no_grad():
            for i, (x, (mean, square, count)) in enumerate(zip(self.factors, self.moments, strict=True)):
                for own, name in ((x, f"factor.{i}"), (mean, f"moment.{i}.0"), (square, f"moment.{i}.1")):
                    local(own).copy_(local(sharded(state[name].to(own.device))))
                count.copy_(state[f"moment.{i}.2"])
        for kind, pool in (("source", self.sources), ("slope", self.slopes)):
            pool |= {path: state[f"{kind}.{path}"].to(own.device, copy=True) for path, own in pool.items()}
        self.rng.set_state(state["rng"])


def _activations(record: Record, site: Site, own: Pieces) -> list[Float[Tensor, "*batch component"]]:
    return [own.activations(inner) for inner in inner_activations(record, site, own)]


def _leaves(pieces: Pieces, processes: Processes) -> Pieces:
    """Copies that gradients can be taken of, apart from the pieces that a rejected round falls back to."""
    v, u = (processes.sharded(x.detach().clone()).requires_grad_() for x in pieces[:2])
    return Pieces(v, u, pieces.owner)


def _plain(x: Tensor) -> Tensor:
    """A contiguous copy, as a checkpoint gives it back: sums over another layout round differently (R1)."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def _size(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def _mean(x: Tensor, processes: Processes) -> float:
    return float(processes.mean(x)) if processes.total(len(x)) else 0.0
