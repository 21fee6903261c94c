"""NMF, k-means and polytope codes: parts, prototypes and activation patterns."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Bank, Fitted, dictionary
from weightdecomp.baselines._closed import per_site
from weightdecomp.baselines._data import Data, Inapplicable, OnStep

_SWEEPS = 200  # of non-negative least squares when rows are encoded; the activations' error is then below 1e-3
_MOST_CODES = 4096  # polytope codes beyond which nearest codes are too many to search


@dataclass(frozen=True, kw_only=True)
class NMF:
    """Non-negative factors of non-negative inputs.

    Attributes:
        ratio: Number of factors as a multiple of the site's width.

    Source:
        scikit-learn's `NMF` with its defaults (coordinate descent, 'nndsvda' start, 200 iterations); Lee and Seung
        1999. Rows are encoded by non-negative least squares, as its `transform` does.
    """

    ratio: float = 0.5
    name = "nmf"

    @property
    def setting(self) -> str:
        """Number of factors."""
        return f"{self.ratio:g} x width"

    def grid(self) -> Sequence["NMF"]:
        """Numbers of factors."""
        return [replace(self, ratio=ratio) for ratio in (0.125, 0.25, 0.5, 1.0)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Factorise the rows."""

        def made(site: Site) -> Bank:
            x = data.inputs(site.path)
            if float(x.min()) < 0:
                raise Inapplicable(f"nmf needs non-negative activations, those at {site.path!r} reach {x.min():.3g}")
            n = max(1, round(self.ratio * x.shape[1]))
            data.check_enough(site.path, n, "nmf")
            parts = _factors(x, n, seed)
            bank = dictionary(
                site, lambda rows: non_negative(rows, parts), parts, torch.zeros_like(x[0]), numbers=x.shape[1]
            )
            return replace(bank, shared=0)

        return per_site(data, self.name, self.setting, made)


def _factors(x: Float[Tensor, "row d_in"], n: int, seed: int) -> Float[Tensor, "unit d_in"]:
    from sklearn.decomposition import NMF as Decomposer
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        start = "nndsvda" if n <= min(x.shape) else "random"
        found = Decomposer(init=start, random_state=seed).set_params(n_components=n).fit(x.double().cpu().numpy())
    parts = torch.from_numpy(found.components_).to(x)
    return parts[parts.norm(dim=1) > 0]


def non_negative(x: Float[Tensor, "*batch d_in"], parts: Float[Tensor, "unit d_in"]) -> Float[Tensor, "*batch unit"]:
    """Non-negative least squares codes, by coordinate descent from zero."""
    gram, target = parts @ parts.T, x @ parts.T
    codes = torch.zeros_like(target)
    # Accelerated projected gradients; coordinate descent proper would be a loop over units.
    step, ahead, momentum = 1 / torch.linalg.eigvalsh(gram)[-1], codes, 1.0
    for _ in range(_SWEEPS):
        new = (ahead - step * (ahead @ gram - target)).clamp_min(0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * (new - codes)
        codes, momentum = new, following
    return codes


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Prototypes: every row is its nearest cluster centre, a name without a value.

    Attributes:
        ratio: Number of clusters as a multiple of the site's width.

    Source:
        scikit-learn's `KMeans` with k-means++ and one start; Lloyd 1982.
    """

    ratio: float = 2.0
    name = "k-means"

    @property
    def setting(self) -> str:
        """Number of clusters."""
        return f"{self.ratio:g} x width"

    def grid(self) -> Sequence["KMeans"]:
        """Numbers of clusters."""
        return [replace(self, ratio=ratio) for ratio in (0.5, 1.0, 2.0, 4.0)]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """Cluster the rows."""
        from sklearn.cluster import KMeans as Clusterer
        from sklearn.exceptions import ConvergenceWarning

        def made(site: Site) -> Bank:
            x = data.inputs(site.path)
            n = max(1, round(self.ratio * x.shape[1]))
            data.check_enough(site.path, n, "k-means")
            with warnings.catch_warnings():
                # Fewer distinct rows than clusters leaves some empty, which the ledger does not charge.
                warnings.simplefilter("ignore", ConvergenceWarning)
                found = Clusterer(n, random_state=seed).set_params(n_init=1).fit(x.double().cpu().numpy())
            centres = torch.from_numpy(found.cluster_centers_).to(x)
            return prototypes(site, centres)

        return per_site(data, self.name, self.setting, made)


def prototypes(site: Site, centres: Float[Tensor, "unit d_in"]) -> Bank:
    """One-hot units, the nearest centre on."""

    def encode(x: Tensor) -> Tensor:
        # The largest inner product minus half a square is the smallest distance.
        nearest = (x @ centres.T - centres.square().sum(1) / 2).argmax(-1)
        return torch.nn.functional.one_hot(nearest, len(centres)).to(x.dtype)

    bank = dictionary(site, encode, centres, torch.zeros_like(centres[0]), numbers=centres.shape[1], valued=False)
    return replace(bank, shared=0)


@dataclass(frozen=True, kw_only=True)
class Polytopes:
    """Polytope codes: a unit is the set of inputs that turn the same ReLUs on, and writes their mean.

    Rows whose code was never seen take the seen code that differs in the fewest ReLUs.

    Source:
        Black et al. 2022, arXiv 2211.12312: spline codes of one layer. Their clustering of codes is left out; the
        mean as what a code writes is ours.
    """

    name = "polytopes"
    setting = "one unit a code"

    def grid(self) -> Sequence["Polytopes"]:
        """There is nothing to set."""
        return [self]

    def fit(self, data: Data, seed: int = 0, on_step: OnStep | None = None) -> Fitted:
        """List the codes."""

        def made(site: Site) -> Bank:
            _check_relu(data, site)
            x = data.inputs(site.path)
            codes, number = torch.unique(_code(site, x), dim=0, return_inverse=True)
            if len(codes) > _MOST_CODES:
                raise Inapplicable(
                    f"{len(codes):,} polytope codes at {site.path!r}, more than {_MOST_CODES:,}: nearly one an input"
                )
            counts = torch.bincount(number, minlength=len(codes)).to(x)
            means = torch.zeros(len(codes), x.shape[1]).to(x).index_add_(0, number, x) / counts[:, None]

            def encode(rows: Tensor) -> Tensor:
                nearest = (_code(site, rows) @ codes.T).argmax(-1)  # of vectors of signs
                return torch.nn.functional.one_hot(nearest, len(codes)).to(rows.dtype)

            numbers = x.shape[1] + codes.shape[1]
            bank = dictionary(site, encode, means, torch.zeros_like(x[0]), numbers=numbers, valued=False)
            return replace(bank, shared=0)

        return per_site(data, self.name, self.setting, made)


def _code(site: Site, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    """Signs of the site's outputs, bias included."""
    return torch.where(_with_bias(site, x) > 0, 1.0, -1.0).to(x.dtype)


def _with_bias(site: Site, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
    """The site's output rows."""
    rows, bias = x @ site.matrix().T, getattr(site.module, "bias", None)
    return rows if bias is None else rows + bias.detach()


def _check_relu(data: Data, site: Site) -> None:
    """Refuse a site whose outputs no ReLU follows: some other site must read exactly their positive parts."""
    after = _with_bias(site, data.inputs(site.path)).relu()
    for other in data.sites:
        x = data.inputs(other.path)
        if x.shape == after.shape and torch.allclose(x, after, rtol=1e-4, atol=1e-5 * float(after.abs().max())):
            return
    raise Inapplicable(f"no site reads the ReLU of what {site.path!r} writes, so that it has no polytope codes")
