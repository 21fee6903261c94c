"""The autoencoder of least description length: width and sparsity chosen by bits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightdecomp._ledger import dictionary_bits
from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Bank, Fitted
from weightdecomp.baselines._closed import per_site
from weightdecomp.baselines._coder import Coder, fitted
from weightdecomp.baselines._data import Data, OnStep
from weightdecomp.baselines._price import quantised_length
from weightdecomp.baselines._rules import BatchTopK
from weightdecomp.baselines._sae import ROWS_PER_LATENT, coder_bank, latents_at
from weightdecomp.baselines._train import Training

_RATIOS = (1.0, 2.0, 4.0)
_KS = (2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class MDLSAE:
    """Per site, the BatchTopK autoencoder that describes the rows in the fewest bits at a stated error.

    All widths of 1, 2 and 4 times the site's and 2, 4, 8 and 16 latents a row are trained; bits are those of the
    latents in the coarsest bins that keep the error, plus the stored numbers. Where none keeps it, the one of least
    error is taken.

    Attributes:
        error: Largest mean squared error as a share of the rows' variance; None takes the run's tolerance.
        training: Settings of the trainer.

    Source:
        Ayonrinde et al. 2024, arXiv 2410.11179, section 3; stored numbers by the ledger of this package.
    """

    error: float | None = None
    training: Training = Training()
    name = "sae mdl"

    @property
    def setting(self) -> str:
        """The error."""
        return f"error {'at the tolerance' if self.error is None else format(self.error, 'g')}"

    def grid(self) -> Sequence["MDLSAE"]:
        """Width and sparsity are chosen inside."""
        return [self]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train all, keep the shortest."""
        rng = data.generator(seed)
        most = data.tolerance if self.error is None else self.error

        def made(site: Site) -> Bank:
            latents_at(data, site.path, _RATIOS[0], self.name)
            x = data.inputs(site.path)
            found = []
            for ratio in _RATIOS:
                n = max(1, round(ratio * x.shape[1]))
                if len(x) < ROWS_PER_LATENT * n:
                    continue
                for k in _KS:
                    coder = fitted(x, x, n, BatchTopK(k=k), self.training, rng, on_step=on_step)
                    found.append((*described(coder, x, most), coder))
            return coder_bank(site, min(found, key=lambda one: one[:2])[2])

        return per_site(data, self.name, self.setting, made)


@torch.no_grad()
def described(coder: Coder, x: Tensor, most: float) -> tuple[float, float]:
    """Bits per row, the stored numbers of live latents included, and the error as a share of the variance."""
    latents = coder.latents(x)
    variance = float((x - x.mean(0)).square().sum(1).mean())

    def error(rounded: Tensor) -> float:
        return float((x - rounded @ coder.decoder - coder.offset).square().sum(1).mean()) / variance

    bits, _ = quantised_length(latents, error, most)
    used = (latents != 0).double().mean(0)
    stored = dictionary_bits(used, torch.full_like(used, 2 * x.shape[1] + 1), len(x))
    return bits + float(stored.sum()) / len(x), error(latents)
