"""Local loss landscape decomposition: directions of the whole network's weights that rebuild every input's gradient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._divergence import output_tensor
from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Fitted
from weightdecomp.baselines._data import Data, OnStep
from weightdecomp.baselines._slopes import Slopes, slopes
from weightdecomp.baselines._train import Training, trained
from weightdecomp.baselines._whole import Factors, largest, n_parts


@dataclass(frozen=True, kw_only=True)
class L3D:
    """Local loss landscape decomposition.

    Attributes:
        share: Of the directions on per input, on average over a batch.
        ratio: Number of directions as a multiple of the larger side of the widest matrix.
        rank: Of a direction at a site.
        training: Settings of the trainer; a row is one input of the model.

    Source:
        Chrisman, Bushnaq and Sharkey 2025, arXiv 2504.00194, section 3: gradients of the divergence between an input's
        output and that of another one drawn at random, an encoder and a decoder of low rank, batch top-k with a tenth
        of the directions, relative error; batches of 32 for 1,000 epochs of 1,000 inputs, rate 0.01. Nothing there ties
        directions to the weights themselves: to be taken out, each is scaled to its share of W by least squares at
        every site, and gated by its own contribution; both ours.
    """

    share: float = 0.1
    ratio: float = 1.0
    rank: int = 1
    training: Training = Training(steps=3000, batch=32, rate=1e-2)
    name = "l3d"

    @property
    def setting(self) -> str:
        """Directions and how many are on."""
        return f"{self.ratio:g} x larger side, {self.share:g} on"

    def grid(self) -> Sequence["L3D"]:
        """Shares on."""
        return [replace(self, share=share) for share in (0.025, 0.05, 0.1, 0.2)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train encoder and decoder on gradients recorded once."""
        rng = data.generator(seed)
        for site in data.sites:
            data.check_varies(site.path)
        found = slopes(data, lambda output: [_against_another(data, output, rng)])
        n = n_parts(data.sites, self.ratio)
        encoder, decoder = (
            {site.path: Factors.started(site, n, self.rank, rng) for site in data.sites} for _ in range(2)
        )
        with torch.no_grad():
            for path, own in encoder.items():
                own.u.copy_(decoder[path].u)
                own.v.copy_(decoder[path].v)
        loss = _Loss(self, found, encoder, decoder)
        leaves = [x for side in (encoder, decoder) for own in side.values() for x in (own.u, own.v)]
        trained(leaves, loss, len(loss.power), self.training, rng, None, on_step)
        banks = [_scaled(decoder[site.path], site).bank(site, data, self.share) for site in data.sites]
        return Fitted(self.name, self.setting, data.sites, banks, {}, sum(x.numel() for x in leaves))


def _against_another(data: Data, output: Any, rng: torch.Generator) -> Tensor:
    """Sum over inputs of the divergence from another input's output."""
    flat = output_tensor(output)
    other = torch.randperm(len(flat), generator=rng, device=rng.device)
    return data.divergence(output, flat.detach()[other]).sum()


class _Loss:
    """Relative error of rebuilt gradients, which are never formed: inner products of their factors say all."""

    def __init__(
        self,
        method: L3D,
        found: Mapping[str, Slopes],
        encoder: Mapping[str, Factors],
        decoder: Mapping[str, Factors],
    ) -> None:
        self.method, self.found, self.encoder, self.decoder = method, found, encoder, decoder
        self.power = torch.stack([one.squares()[0] for one in found.values()]).sum(0)
        # Codes are read in units of the gradients' size, so that the rate means the same for every model.
        self.unit = float(self.power.mean().sqrt()) or 1.0

    def __call__(self, index: Tensor, done: float) -> Tensor:
        at = {path: one.of(index) for path, one in self.found.items()}
        norms = torch.stack([own.gram().diagonal() for own in self.decoder.values()]).sum(0).clamp_min(1e-12).sqrt()
        read = torch.stack([own.along(at[path])[0] for path, own in self.encoder.items()]).sum(0) / self.unit
        n = read.shape[1]
        codes = read * largest(read.detach().abs(), self.method.share * n) / norms
        met = torch.stack([own.along(at[path])[0] for path, own in self.decoder.items()]).sum(0) / self.unit
        gram = torch.stack([own.gram() for own in self.decoder.values()]).sum(0)
        power = self.power[index] / self.unit**2
        error = power - 2 * (codes * met).sum(1) + ((codes @ gram) * codes).sum(1)
        return (error.clamp_min(0) + 1e-12).sum().sqrt() / (power.sum() + 1e-12).sqrt()


def _scaled(directions: Factors, site: Site) -> Factors:
    """Directions times the coefficients with which they sum to the weight as nearly as they can."""
    with torch.no_grad():
        gram = directions.gram().double()
        met: Float[Tensor, " part"] = torch.einsum(
            "cro,oi,cri->c", directions.u.double(), site.matrix().double(), directions.v.double()
        )
        sizes = torch.linalg.lstsq(gram, met[:, None], driver="gelsd").solution[:, 0]
        return Factors(directions.v.detach(), directions.u.detach() * sizes.to(directions.u)[:, None, None])
