"""Sparse autoencoders of a site's inputs: L1, TopK, BatchTopK, JumpReLU, Matryoshka, and the choice by bits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Bank, Fitted, dictionary
from weightdecomp.baselines._closed import per_site
from weightdecomp.baselines._coder import Coder, fitted
from weightdecomp.baselines._data import Data, OnStep
from weightdecomp.baselines._rules import BatchTopK, Rule, TopK
from weightdecomp.baselines._train import Training

ROWS_PER_LATENT = 2  # fewer rows than this a latent, and a latent can be a row


def latents_at(data: Data, path: str, ratio: float, name: str) -> int:
    """Number of latents for a site's width.

    Raises:
        Inapplicable: If there are too few rows for so many.
    """
    n = max(1, round(ratio * data.inputs(path).shape[1]))
    data.check_enough(path, ROWS_PER_LATENT * n, f"{name} with {n:,} latents")
    return n


def coder_bank(site: Site, coder: Coder) -> Bank:
    """An autoencoder's units: encoder, decoder, bias and, for JumpReLU, threshold are stored."""
    d = coder.encoder.shape[1]
    own = len(coder.state) == len(coder.encoder)
    return dictionary(site, coder.latents, coder.decoder, coder.offset, numbers=2 * d + 1 + own, shared=d + (not own))


@dataclass(frozen=True, kw_only=True)
class SAE:
    """A sparse autoencoder of each site's inputs.

    Attributes:
        rule: How it is sparse: `L1`, `TopK`, `BatchTopK` or `JumpReLU`.
        ratio: Number of latents as a multiple of the site's width.
        training: Settings of the trainer.

    Source:
        Cunningham et al. 2023 (arXiv 2309.08600); the rules name their own papers. Widths of 4 to 64 times are
        published; toy sites hold few rows, so 4 is the default.
    """

    rule: Rule = field(default_factory=TopK)
    ratio: float = 4.0
    training: Training = Training()

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.rule.name

    @property
    def setting(self) -> str:
        """Width and sparsity."""
        return f"{self.ratio:g} x width, {self.rule.setting}"

    def grid(self) -> Sequence["SAE"]:
        """Levels of sparsity."""
        return [replace(self, rule=rule) for rule in self.rule.grid()]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train one autoencoder a site."""
        rng = data.generator(seed)

        def made(site: Site) -> Bank:
            n, x = latents_at(data, site.path, self.ratio, self.name), data.inputs(site.path)
            return coder_bank(site, fitted(x, x, n, self.rule, self.training, rng, on_step=on_step))

        return per_site(data, self.name, self.setting, made)


@dataclass(frozen=True, kw_only=True)
class Matryoshka:
    """A BatchTopK autoencoder whose first latents must rebuild the rows on their own, at several lengths.

    Attributes:
        k: Latents a row.
        ratio: Number of latents as a multiple of the site's width.
        training: Settings of the trainer.

    Source:
        Bussmann et al. 2025, arXiv 2503.17547: BatchTopK, the mean of the errors of nested prefixes; lengths are
        1/16, 1/8, 1/4, 1/2 and all of the latents.
    """

    k: int = 8
    ratio: float = 4.0
    training: Training = Training()
    name = "sae matryoshka"

    @property
    def setting(self) -> str:
        """Width and sparsity."""
        return f"{self.ratio:g} x width, k {self.k}"

    def grid(self) -> Sequence["Matryoshka"]:
        """Numbers of latents."""
        return [replace(self, k=k) for k in (2, 4, 8, 16)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Train one autoencoder a site."""
        rng = data.generator(seed)

        def made(site: Site) -> Bank:
            n, x = latents_at(data, site.path, self.ratio, self.name), data.inputs(site.path)
            prefixes = sorted({max(1, n // part) for part in (16, 8, 4, 2, 1)})
            rule = BatchTopK(k=self.k)
            coder = fitted(x, x, n, rule, self.training, rng, prefixes=prefixes, on_step=on_step)
            return coder_bank(site, coder)

        return per_site(data, self.name, self.setting, made)
