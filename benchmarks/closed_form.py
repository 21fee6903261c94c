"""Decompositions in closed form: any pieces as components, gated by size, so that every method has the same graph."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp import Config, Decomposition, Ledger
from weightdecomp._decomposition import Outcome, Parts
from weightdecomp._divergence import choose
from weightdecomp._forward import recorded
from weightdecomp._pieces import Pieces, rank_one_pieces
from weightdecomp._sites import Site, find_sites

Cut = Callable[[Site, Float[Tensor, "row d_in"], torch.Generator], Pieces]


def closed_form(
    model: torch.nn.Module,
    batch: Tensor,
    cut: Cut,
    *,
    active: float | Mapping[str, float] = 1.0,
    sites: Sequence[str] | None = None,
    seed: int = 0,
) -> Decomposition:
    """A decomposition whose components are given.

    Args:
        model: The target.
        batch: Inputs.
        cut: Components of a site, from its input rows.
        active: Mean number of components active per row, by site; or their share at every site. The largest are.
        sites: Patterns of sites.
        seed: For random cuts.
    """
    found, skipped = find_sites(model, batch, sites)
    record, rng, parts = recorded(model, batch, found), torch.Generator().manual_seed(seed), {}
    for site in found:
        rows = torch.cat([site.vectors(x).flatten(0, -2) for x in record.operands[site.path]])
        own = cut(site, rows, rng)
        sizes = own.activations(rows @ own.v.T).abs()
        share = active if isinstance(active, float) else active[site.path] / own.n
        n_closed = round((1 - min(share, 1.0)) * sizes.numel())
        level = float(sizes.flatten().kthvalue(n_closed).values) if n_closed else -1.0
        thresholds = torch.full((2, own.n), level, dtype=own.v.dtype)
        parts[site.path] = Parts(own, thresholds, (sizes > level).double().mean(0), cut.__name__)
    members = [(path, c) for path, one in parts.items() for c in range(one.pieces.n)]
    ledger = Ledger(len(batch), 0.0, 0.0, 0.0, 0.0)
    outcome = Outcome(True, "in closed form", 0.0, False, "not measured", 1.0, 1.0, ledger, 0.0, 0)
    metric = choose("auto", record.output, not batch.is_floating_point())
    groups = [[member] for member in members]
    frequencies = [1.0] * len(groups)
    return Decomposition(model, found, skipped, parts, metric, 0.02, Config(), outcome, groups, frequencies)


def svd(site: Site, rows: Tensor, rng: torch.Generator) -> Pieces:
    """Singular pairs of the weight."""
    u, s, v = torch.linalg.svd(site.matrix(), full_matrices=False)
    return rank_one_pieces(v, (u * s).T.contiguous())


def neurons_out(site: Site, rows: Tensor, rng: torch.Generator) -> Pieces:
    """One component an output coordinate."""
    matrix = site.matrix()
    return rank_one_pieces(matrix, torch.eye(len(matrix), dtype=matrix.dtype))


def neurons_in(site: Site, rows: Tensor, rng: torch.Generator) -> Pieces:
    """One component an input coordinate."""
    matrix = site.matrix()
    return rank_one_pieces(torch.eye(matrix.shape[1], dtype=matrix.dtype), matrix.T.contiguous())


def pca(site: Site, rows: Tensor, rng: torch.Generator) -> Pieces:
    """Principal directions of the site's inputs, about zero."""
    moment = rows.double().T @ rows.double()
    power, basis = torch.linalg.eigh(moment)
    kept = basis[:, power > 1e-9 * power[-1]].to(rows.dtype)
    return rank_one_pieces(kept.T.contiguous(), (site.matrix() @ kept).T.contiguous())


def ica(site: Site, rows: Tensor, rng: torch.Generator) -> Pieces:
    """Independent components of the site's inputs: what is read are sources, what is written their images."""
    from sklearn.decomposition import FastICA  # type: ignore[import-untyped]

    moment = rows.double().T @ rows.double()
    power, basis = torch.linalg.eigh(moment)
    n = int((power > 1e-6 * power[-1]).sum())
    whiten = (basis[:, -n:] / power[-n:].sqrt()).T * len(rows) ** 0.5
    white = (rows.double() @ whiten.T).numpy()
    solver = FastICA(whiten=False, random_state=int(torch.randint(1 << 30, (), generator=rng)), max_iter=400, tol=1e-3)
    solver.fit(white)
    read = torch.from_numpy(solver.components_) @ whiten
    write = site.matrix().double() @ torch.linalg.pinv(read)
    return rank_one_pieces(read.to(rows.dtype), write.T.contiguous().to(rows.dtype))


def random_directions(site: Site, rows: Tensor, rng: torch.Generator) -> Pieces:
    """A random orthonormal basis of the input space."""
    d_in = site.shape[1]
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=rng, dtype=torch.float64)).Q.to(site.dtype)
    return rank_one_pieces(basis, (site.matrix() @ basis.T).T.contiguous())


ACTIVATION_BASES: Mapping[str, Cut] = {
    "neurons in": neurons_in,
    "neurons out": neurons_out,
    "PCA of activations": pca,
    "ICA of activations": ica,
    "SVD of weights": svd,
    "random directions": random_directions,
}
