"""Weight-space rivals: SVD and stochastic parameter decomposition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from weightdecomp._batches import call, select, size
from weightdecomp._forward import Operands, replaced
from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Bank, Fitted
from weightdecomp.baselines._closed import SHARES, kept_largest, per_site
from weightdecomp.baselines._data import Data, OnStep
from weightdecomp.baselines._train import Training, trained
from weightdecomp.baselines.protocols import without_sites


def components(site: Site, v: Float[Tensor, "piece d_in"], u: Float[Tensor, "piece d_out"], numbers: int = 0) -> Bank:
    """Rank-one parts of a weight as units."""
    return Bank(
        reads=(site.path,),
        encode=lambda x: x @ v.T,
        writes={site.path: u},
        offsets={},
        directions={site.path: v},
        numbers=torch.full((len(v),), float(sum(site.shape) + numbers)),
        values=torch.ones(len(v)),
    )


@dataclass(frozen=True, kw_only=True)
class SVD:
    """Singular pairs of every weight, the largest contributions on.

    Attributes:
        share: Share of the pairs kept on, on average, by the size of what they write.

    Source:
        Millidge and Black 2022, singular value decompositions of weights; the gate by size is ours.
    """

    share: float = 1.0
    name = "svd"

    @property
    def setting(self) -> str:
        """Share of pairs on."""
        return f"{self.share:g} on"

    def grid(self) -> Sequence["SVD"]:
        """Shares on."""
        return [replace(self, share=share) for share in SHARES]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Factorise every weight."""

        def made(site: Site) -> Bank:
            left, sizes, right = torch.linalg.svd(site.matrix(), full_matrices=False)
            bank = components(site, right, (left * sizes).T)
            rule = kept_largest(bank.encode(data.inputs(site.path)), bank.writes[site.path], self.share)
            return replace(bank, importance=rule)

        return per_site(data, self.name, self.setting, made)


@dataclass(frozen=True, kw_only=True)
class SPD:
    """Stochastic parameter decomposition: trained rank-one parts with gate networks, under random masks.

    Attributes:
        minimality: Weight of the sum of importances.
        ratio: Number of components as a multiple of the larger side of the matrix.
        hidden: Hidden units of each component's gate.
        training: Settings of the trainer; a row is one input of the model.

    Source:
        Bushnaq et al. 2025, arXiv 2506.20790, equations 1 to 8: faithfulness (weight 1), stochastic reconstruction with
        all sites and with one site masked (1 and 1), importance minimality with p = 1; gates are networks of one
        hidden layer of 16 on the component's own inner activation, leaky hard sigmoids (slope 0.01). Divergences are
        divided by that of ablating everything and faithfulness by the weights' squares, so that one minimality
        serves every model.
    """

    minimality: float = 3e-3
    ratio: float = 1.5
    hidden: int = 16
    training: Training = Training(steps=3000, batch=512)
    name = "spd"

    @property
    def setting(self) -> str:
        """Components and minimality."""
        return f"{self.ratio:g} x larger side, minimality {self.minimality:g}"

    def grid(self) -> Sequence["SPD"]:
        """Weights of minimality."""
        return [replace(self, minimality=c) for c in (3e-4, 1e-3, 3e-3, 1e-2)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train all sites together."""
        rng = data.generator(seed)
        for site in data.sites:
            data.check_varies(site.path)
        parts = {
            site.path: _Gated.started(site, round(self.ratio * max(site.shape)), self.hidden, rng)
            for site in data.sites
        }
        loss = _StochasticLoss(self, data, parts, rng)
        trained(
            [p for part in parts.values() for p in part.trained], loss, loss.rows, self.training, rng, None, on_step
        )
        banks = [parts[site.path].bank(site) for site in data.sites]
        parameters = sum(p.numel() for part in parts.values() for p in part.trained)
        return Fitted(self.name, self.setting, data.sites, banks, {}, parameters)


@dataclass(eq=False)
class _Gated:
    """Components of one site with their gate networks."""

    v: Float[Tensor, "component d_in"]
    u: Float[Tensor, "component d_out"]
    w_in: Float[Tensor, "component hidden"]
    b_in: Float[Tensor, "component hidden"]
    w_out: Float[Tensor, "component hidden"]
    b_out: Float[Tensor, " component"]

    @classmethod
    def started(cls, site: Site, n: int, hidden: int, rng: torch.Generator) -> "_Gated":
        """Random components of the weight's size; gates near open."""
        matrix = site.matrix()
        d_out, d_in = matrix.shape

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=rng.device).to(matrix)

        size = float(matrix.norm()) / n**0.5
        v, u = drawn(n, d_in) / d_in**0.5, drawn(n, d_out) * size / d_out**0.5
        gate = (drawn(n, hidden), torch.zeros(n, hidden).to(matrix), drawn(n, hidden) / hidden**0.5)
        found = cls(v, u, *gate, torch.ones(n).to(matrix))
        for tensor in found.trained:
            tensor.requires_grad_()
        return found

    @property
    def trained(self) -> list[Tensor]:
        """All tensors."""
        return [self.v, self.u, self.w_in, self.b_in, self.w_out, self.b_out]

    def logits(self, inner: Float[Tensor, "*batch component"]) -> Float[Tensor, "*batch component"]:
        """What the hard sigmoid is taken of."""
        hidden = F.gelu(inner[..., None] * self.w_in + self.b_in)
        return (hidden * self.w_out).sum(-1) + self.b_out

    def bank(self, site: Site) -> Bank:
        """The components as units; a gate network is stored with its component."""
        for tensor in self.trained:
            tensor.requires_grad_(False)
        numbers = 3 * self.w_in.shape[1] + 1
        found = components(site, self.v, self.u, numbers)
        return replace(found, importance=lambda inner: self.logits(inner).clamp(0, 1))


class _StochasticLoss:
    """The loss of one step: faithfulness, stochastic reconstruction, minimality."""

    def __init__(self, method: SPD, data: Data, parts: Mapping[str, _Gated], rng: torch.Generator) -> None:
        self.method, self.data, self.parts, self.rng = method, data, parts, rng
        self.batch, self.turn = data.batches[0], 0
        self.rows = size(self.batch)
        self.matrices = {site.path: site.matrix() for site in data.sites}
        with torch.no_grad():
            target = call(data.model, self.batch)
            ablated = without_sites(data.model, self.batch, data.sites)
            self.unit = float(data.divergence(ablated, target).mean())

    def __call__(self, index: Tensor, done: float) -> Tensor:
        part = select(self.batch, index)
        logits: dict[str, list[Tensor]] = {path: [] for path in self.parts}

        def clean(site: Site, _: int, operands: Operands) -> Any:
            own = self.parts[site.path]
            logits[site.path].append(own.logits(site.read(operands, own.v)))
            return site.write(site.read(operands, self.matrices[site.path]), operands)

        with replaced(self.data.sites, clean):
            target = call(self.data.model, part)
        everywhere = self._masked(part, target, logits, set(self.parts))
        one = list(self.parts)[self.turn % len(self.parts)]
        self.turn += 1
        single = self._masked(part, target, logits, {one})
        # The leaky upper side keeps gradients where gates are fully open, as the leaky lower side does in masks.
        open_gates = [torch.where(x > 1, 1 + 0.01 * (x - 1), x.clamp_min(0)) for xs in logits.values() for x in xs]
        minimality = torch.stack([gate.sum(-1).mean() for gate in open_gates]).sum()
        faithful = [
            (self.matrices[path] - own.u.T @ own.v).square().sum() / self.matrices[path].square().sum()
            for path, own in self.parts.items()
        ]
        return torch.stack(faithful).sum() + (everywhere + single) / self.unit + self.method.minimality * minimality

    def _masked(self, part: Any, target: Any, logits: Mapping[str, Sequence[Tensor]], at: set[str]) -> Tensor:
        """Divergence with random masks at some sites."""

        def forward(site: Site, index: int, operands: Operands) -> Any:
            if site.path not in at:
                return site.write(site.read(operands, self.matrices[site.path]), operands)
            own, x = self.parts[site.path], logits[site.path][index]
            gate = torch.where(x < 0, 0.01 * x, x.clamp_max(1))
            drawn = torch.rand(gate.shape, generator=self.rng, device=self.rng.device).to(gate)
            mask = gate + (1 - gate) * drawn
            return site.write((site.read(operands, own.v) * mask) @ own.u, operands)

        with replaced(self.data.sites, forward):
            output = call(self.data.model, part)
        return self.data.divergence(output, target).mean()
