"""Attribution-based parameter decomposition: parts of all weights, few of them needed on an input, each simple."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._batches import call, select, tensors
from weightdecomp._divergence import output_tensor
from weightdecomp._forward import Operands, replaced
from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Fitted
from weightdecomp.baselines._data import Data, OnStep
from weightdecomp.baselines._slopes import Slopes, slopes
from weightdecomp.baselines._train import Training, trained
from weightdecomp.baselines._whole import Factors, largest, n_parts
from weightdecomp.baselines.protocols import without_sites

_PROBES = 8  # random sums of outputs that attributions are averaged over, where there are more outputs


@dataclass(frozen=True, kw_only=True)
class APD:
    """Attribution-based parameter decomposition.

    Attributes:
        k: Parts on per input, on average over a batch.
        simplicity: Weight of the Schatten norm of the parts that are on.
        power: p of the Schatten norm.
        ratio: Number of parts as a multiple of the larger side of the widest matrix.
        rank: Of a part at a site.
        training: Settings of the trainer; a row is one input of the model.

    Source:
        Braun et al. 2025, arXiv 2501.14926, section 2: faithfulness 1, minimality 1 with batch top-k of gradient
        attributions, Schatten norm with p = 0.9, 1.3 parts a feature, as in their residual MLP (k = 1.28); 10,000 to
        40,000 steps are published. Divergences are divided by that of ablating everything, faithfulness and Schatten
        norms by the weights' own, so that one set of weights serves every model; attributions over more than eight
        outputs are averaged over eight random sums of them. After training, gates read a part's own contribution,
        with k parts on an input; both ours.
    """

    k: float = 2.0
    simplicity: float = 0.1
    power: float = 0.9
    ratio: float = 1.3
    rank: int = 2
    training: Training = Training(steps=3000, batch=256)
    name = "apd"

    @property
    def setting(self) -> str:
        """Parts and how many are on."""
        return f"{self.ratio:g} x larger side, k {self.k:g}"

    def grid(self) -> Sequence["APD"]:
        """Numbers of parts on."""
        return [replace(self, k=k) for k in (1.0, 2.0, 4.0, 8.0)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train the parts of all sites together."""
        rng = data.generator(seed)
        for site in data.sites:
            data.check_varies(site.path)
        n = n_parts(data.sites, self.ratio)
        parts = {site.path: Factors.started(site, n, self.rank, rng) for site in data.sites}
        loss = _Loss(self, data, parts, rng)
        leaves = [x for part in parts.values() for x in (part.u, part.v)]
        trained(leaves, loss, loss.rows, self.training, rng, None, on_step)
        banks = [parts[site.path].bank(site, data, min(1.0, self.k / n)) for site in data.sites]
        return Fitted(self.name, self.setting, data.sites, banks, {}, sum(x.numel() for x in leaves))


class _Loss:
    """Faithfulness, minimality and simplicity of one step."""

    def __init__(self, method: APD, data: Data, parts: Mapping[str, Factors], rng: torch.Generator) -> None:
        self.method, self.data, self.parts = method, data, parts
        self.matrices = {site.path: site.matrix() for site in data.sites}

        def sums(output: Any) -> list[Tensor]:
            flat = output_tensor(output).flatten(1)
            if flat.shape[1] <= _PROBES:
                return list(flat.sum(0))
            signs = torch.randint(2, (_PROBES, flat.shape[1]), generator=rng, device=flat.device) * 2.0 - 1
            return list((flat @ signs.T.to(flat)).sum(0))

        self.slopes: dict[str, Slopes] = slopes(data, sums)
        self.rows = len(next(iter(self.slopes.values())).x)
        with torch.no_grad():
            self.batch = select(data.batches[0], torch.arange(self.rows, device=tensors(data.batches[0])[0].device))
            target = call(data.model, self.batch)
            ablated = without_sites(data.model, self.batch, data.sites)
            self.unit = float(data.divergence(ablated, target).mean())

    def __call__(self, index: Tensor, done: float) -> Tensor:
        mask = largest(self.attributions(index), self.method.k)
        part = select(self.batch, index)
        with torch.no_grad():
            target = call(self.data.model, part)
        minimality = self.data.divergence(self._masked(part, mask), target).mean() / self.unit
        faithful, simple = [], []
        for path, own in self.parts.items():
            power = self.matrices[path].square().sum()
            faithful.append((self.matrices[path] - own.total()).square().sum() / power)
            sizes = own.u.square().sum(-1) * own.v.square().sum(-1) / power
            # The floor keeps the gradient of x**p finite at x = 0 when p < 1.
            simple.append((mask.mean(0)[:, None] * (sizes + 1e-12) ** (self.method.power / 2)).sum())
        return torch.stack(faithful).sum() + minimality + self.method.simplicity * torch.stack(simple).sum()

    @torch.no_grad()
    def attributions(self, index: Tensor) -> Float[Tensor, "input part"]:
        """Root mean square over outputs of what removing each part changes, to first order."""
        moved = torch.stack([own.along(self.slopes[path].of(index)) for path, own in self.parts.items()]).sum(0)
        return moved.square().mean(0).sqrt()

    def _masked(self, part: Any, mask: Float[Tensor, "input part"]) -> Any:
        def forward(site: Site, _: int, operands: Operands) -> Any:
            own = self.parts[site.path]
            inner = site.read(operands, own.v.flatten(0, 1))
            on = mask.repeat_interleave(self.method.rank, 1)
            on = on.reshape(len(on), *[1] * (inner.ndim - 2), -1)
            return site.write((inner * on) @ own.u.flatten(0, 1), operands)

        with replaced(self.data.sites, forward):
            return call(self.data.model, part)
