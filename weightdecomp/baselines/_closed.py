"""Neurons, PCA and ICA: bases of a site's inputs in closed form or by a fixed point, without training by gradient."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Bank, Fitted, dictionary
from weightdecomp.baselines._data import Data, Inapplicable, OnStep

SHARES = (0.125, 0.25, 0.5, 1.0)  # of the units of a basis that are kept on: the grid of all bases


def per_site(data: Data, name: str, setting: str, made: Callable[[Site], Bank]) -> Fitted:
    """A bank for every site to which the method applies.

    Raises:
        Inapplicable: If it applies to none, with the reason of the first.
    """
    banks, skipped, parameters = [], {}, 0
    for site in data.sites:
        try:
            data.check_varies(site.path)
            bank = made(site)
        except Inapplicable as error:
            skipped[site.path] = str(error)
            continue
        banks.append(bank)
        parameters += int(bank.numbers.sum()) + bank.shared
    if not banks:
        raise Inapplicable(next(iter(skipped.values())))
    return Fitted(name, setting, data.sites, banks, skipped, parameters)


def kept_largest(
    inner: Float[Tensor, "row unit"], writes: Float[Tensor, "unit d_out"], share: float
) -> Callable[[Tensor], Tensor]:
    """Importances that are 1 where a contribution |a| |u| is above one size a site, as many as the share asks for."""
    sizes = writes.norm(dim=1)
    if share >= 1:
        return lambda a: (a.abs() * sizes > 0).to(a.dtype)
    every = (inner.abs() * sizes).flatten()
    level = every.kthvalue(max(1, round((1 - share) * len(every)))).values
    return lambda a: (a.abs() * sizes > level).to(a.dtype)


def _basis(
    data: Data,
    site: Site,
    read: Float[Tensor, "unit d_in"],
    write: Float[Tensor, "unit d_in"],
    mean: Float[Tensor, " d_in"],
    share: float,
    numbers: int,
) -> Bank:
    """A linear code `a = (x - mean) read^T`, its largest contributions kept."""

    def encode(x: Tensor) -> Tensor:
        return (x - mean) @ read.T

    bank = dictionary(site, encode, write, mean, numbers=numbers)
    rule = kept_largest(encode(data.inputs(site.path)), bank.writes[site.path], share)
    return replace(bank, importance=rule)


@dataclass(frozen=True, kw_only=True)
class Neurons:
    """Coordinates of a site's inputs as they are; nothing is fitted but one level a site.

    Attributes:
        share: Share of the coordinates kept on, on average, by the size of what they write.

    Source:
        The privileged basis as its own dictionary (Elhage et al. 2022, Toy Models of Superposition, section 2); the
        level is ours.
    """

    share: float = 1.0
    name = "neurons"

    @property
    def setting(self) -> str:
        """Share of coordinates on."""
        return f"{self.share:g} on"

    def grid(self) -> Sequence["Neurons"]:
        """Shares on."""
        return [replace(self, share=share) for share in SHARES]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Take the coordinates."""

        def made(site: Site) -> Bank:
            x = data.inputs(site.path)
            eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            # A coordinate is named by its number, so that only the level is stored.
            return _basis(data, site, eye, eye, torch.zeros_like(x[0]), self.share, numbers=0)

        return per_site(data, self.name, self.setting, made)


@dataclass(frozen=True, kw_only=True)
class PCA:
    """Principal components of a site's inputs, the first ones always on.

    Attributes:
        share: Share of the components that are kept.

    Source:
        scikit-learn's `PCA` with its full solver; Hotelling 1933.
    """

    share: float = 0.5
    name = "pca"

    @property
    def setting(self) -> str:
        """Share of components kept."""
        return f"{self.share:g} of the components"

    def grid(self) -> Sequence["PCA"]:
        """Shares kept."""
        return [replace(self, share=share) for share in SHARES]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Diagonalise the covariance."""
        from sklearn.decomposition import PCA as Decomposer

        def made(site: Site) -> Bank:
            x = data.inputs(site.path)
            data.check_enough(site.path, 2, "pca")
            n = max(1, round(self.share * min(x.shape)))
            found = Decomposer(n, svd_solver="full").fit(x.double().cpu().numpy())
            axes, mean = torch.from_numpy(found.components_).to(x), torch.from_numpy(found.mean_).to(x)
            return dictionary(site, lambda rows: (rows - mean) @ axes.T, axes, mean, numbers=x.shape[1])

        return per_site(data, self.name, self.setting, made)


@dataclass(frozen=True, kw_only=True)
class ICA:
    """Independent components of a site's inputs, their largest contributions kept.

    Attributes:
        share: Share of the components kept on, on average.

    Source:
        scikit-learn's `FastICA` with its defaults (unit variance whitening, log-cosh, tolerance 1e-4, 200 iterations);
        Hyvärinen and Oja 2000.
    """

    share: float = 0.5
    name = "ica"

    @property
    def setting(self) -> str:
        """Share of components on."""
        return f"{self.share:g} on"

    def grid(self) -> Sequence["ICA"]:
        """Shares on."""
        return [replace(self, share=share) for share in SHARES]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Whiten what varies and rotate to the least Gaussian."""

        def made(site: Site) -> Bank:
            x = data.inputs(site.path)
            data.check_enough(site.path, 2 * x.shape[1], "ica")
            read, write, mean = independent(x, seed)
            return _basis(data, site, read, write, mean, self.share, numbers=2 * x.shape[1])

        return per_site(data, self.name, self.setting, made)


def independent(x: Float[Tensor, "row d_in"], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What independent components read, what they write, and the mean; in the span that the rows use."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    mean = x.mean(0)
    _, sizes, right = torch.linalg.svd((x - mean).double(), full_matrices=False)
    span = right[sizes > 1e-6 * sizes[0]]
    inside = ((x - mean).double() @ span.T).cpu().numpy()
    with warnings.catch_warnings():
        # A fixed point that was not reached within the published iterations is scored as it is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = FastICA(whiten="unit-variance", random_state=seed).fit(inside)
    read = torch.from_numpy(found.components_).to(span) @ span
    write = torch.from_numpy(np.asarray(found.mixing_).T).to(span) @ span
    return read.to(x), write.to(x), mean
