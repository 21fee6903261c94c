"""Lanczos for the forms of many outputs at once: one matrix product a step serves all of them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._factors import Factors

_FIRST, _EVERY = 24, 8  # steps before the first test of convergence, and at least between tests
_GROWTH = 1.2  # and in proportion, since a test costs the cube of the steps
_PROBE = 6  # steps of the search for eigenvalues that were missed
_GUARD = 1e-2  # residual that the next pair must reach, so that none is overtaken


class Pairs(NamedTuple):
    """Eigenpairs of several forms, largest in size first.

    Attributes:
        values: Eigenvalues.
        vectors: Eigenvectors as columns.
        residuals: Bounds on |Q v - value v|, hence on the distance to an eigenvalue.
        sound: Per form, whether all asked for were found to the tolerance and no larger one turned up after them.
    """

    values: Float[Tensor, "direction k"]
    vectors: Float[Tensor, "direction coordinate k"]
    residuals: Float[Tensor, "direction k"]
    sound: Tensor


class Operator(NamedTuple):
    """Forms of several directions as one operator on a row each; two products with the stacked factors.

    Attributes:
        stacked: w over v.
        rows: Weight of every neuron in every form.
        without: Eigenvalues and eigenvectors that are taken out of the forms, or None.
    """

    stacked: Float[Tensor, "twice coordinate"]
    rows: Float[Tensor, "direction hidden"]
    without: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Float[Tensor, "direction coordinate"]) -> Float[Tensor, "direction coordinate"]:
        """Every form on its own vector."""
        inner = x @ self.stacked.T
        h = self.rows.shape[1]
        crossed = torch.cat([self.rows * inner[:, h:], self.rows * inner[:, :h]], 1)
        found = (crossed @ self.stacked) / 2
        if self.without is None:
            return found
        values, vectors = self.without
        inner = torch.bmm(vectors.mT, x[:, :, None]) * values[:, :, None]
        return found - torch.bmm(vectors, inner)[:, :, 0]


def operator(factors: Factors, directions: Float[Tensor, "direction d_out"]) -> Operator:
    """The operator of some directions' forms."""
    return Operator(torch.cat([factors.w, factors.v]), directions @ factors.d)


def lanczos(act: Operator, k: int, rtol: float, rng: torch.Generator, most: int) -> Pairs:
    """The k eigenpairs of largest size of every form, by Lanczos with full reorthogonalisation.

    Args:
        act: The forms.
        k: Pairs to find.
        rtol: Residual to reach, relative to the largest eigenvalue in size.
        rng: Of the start vectors.
        most: Steps after which to give up.

    Returns:
        Pairs; `sound` is false where the tolerance was not reached in time, or where a short search beside the found
        pairs met a larger eigenvalue (a second copy of a multiple one, say).

    Source:
        Lanczos with full reorthogonalisation (Golub and Van Loan, 10.3); stacking of the outputs is ours.
    """
    space = _Krylov(act, rng, most)
    m = min(max(_FIRST, 2 * k + 4), most)
    while True:
        space.extend(m)
        ritz = space.ritz(min(k + 1, m))
        scale = ritz.values[:, :1].abs().clamp_min(torch.finfo(ritz.values.dtype).tiny)
        done = (ritz.residuals[:, :k] <= rtol * scale).all(1) & (ritz.residuals[:, k:] <= _GUARD * scale).all(1)
        if done.all() or m == most:
            break
        m = min(max(m + _EVERY, int(m * _GROWTH)), most)
    vectors = space.vectors(ritz.coefficients[..., :k])
    values = ritz.values[:, :k].to(vectors.dtype)
    # What rounding does to the estimate: Q v is not known better than this.
    noise = 8 * torch.finfo(vectors.dtype).eps * scale
    residuals = ritz.residuals[:, :k].clamp_min(noise).to(vectors.dtype)
    missed = _largest_beside(act, values, vectors, rng)
    sound = done & (missed <= values[:, -1].abs() * 1.01 + 10 * noise[:, 0].to(values.dtype))
    return Pairs(values, vectors, residuals, sound)


class _Ritz(NamedTuple):
    values: Tensor
    coefficients: Tensor
    residuals: Tensor


class _Krylov:
    """Krylov spaces of all forms, with their tridiagonal projections in float64."""

    def __init__(self, act: Operator, rng: torch.Generator, most: int) -> None:
        n, d = len(act.rows), act.stacked.shape[1]
        self.act, self.rng, self.m = act, rng, 0
        self.basis = act.rows.new_empty(n, min(most, _FIRST + 2 * _EVERY) + 1, d)
        self.basis[:, 0] = self._random(act.rows, n, d)
        self.alpha, self.beta = list[Tensor](), list[Tensor]()

    def _random(self, like: Tensor, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.rng, dtype=torch.float64).to(like)
        return x / x.norm(dim=-1, keepdim=True)

    def extend(self, m: int) -> None:
        """Grow the spaces to m vectors (and the one after)."""
        if m >= self.basis.shape[1]:
            room = self.basis.new_empty(len(self.basis), m + 4 * _EVERY + 1, self.basis.shape[2])
            room[:, : self.m + 1] = self.basis[:, : self.m + 1]
            self.basis = room
        for j in range(self.m, m):
            self._step(j)
        self.m = m

    def _step(self, j: int) -> None:
        q = self.basis[:, j]
        r = self.act(q)
        alpha = (r * q).sum(1)
        size = r.norm(dim=1)
        r = r - alpha[:, None] * q
        if j:
            r = r - self.beta[-1].to(r)[:, None] * self.basis[:, j - 1]
        r = self._orthogonal(r, j)
        beta = r.norm(dim=1)
        ended = beta <= 10 * torch.finfo(r.dtype).eps * size
        if ended.any():  # an invariant subspace: go on outside of it
            fresh = self._random(r, *r.shape)
            fresh = self._orthogonal(self._orthogonal(fresh, j), j)
            r = torch.where(ended[:, None], fresh, r)
            self.beta.append(torch.where(ended, 0, beta).double())
            beta = r.norm(dim=1)
        else:
            self.beta.append(beta.double())
        self.alpha.append(alpha.double())
        # In a space that is exhausted nothing is left to go on with.
        self.basis[:, j + 1] = r / beta.clamp_min(torch.finfo(r.dtype).tiny)[:, None]

    def _orthogonal(self, r: Tensor, j: int) -> Tensor:
        own = self.basis[:, : j + 1]
        inner = torch.bmm(own, r[:, :, None])
        return r - torch.bmm(own.mT, inner)[:, :, 0]

    def ritz(self, k: int) -> _Ritz:
        """The k Ritz pairs of largest size."""
        alpha, beta = torch.stack(self.alpha, 1), torch.stack(self.beta, 1)
        t = torch.diag_embed(alpha) + torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)
        values, coefficients = torch.linalg.eigh(t)
        order = values.abs().argsort(dim=1, descending=True)[:, :k]
        values = values.gather(1, order)
        coefficients = coefficients.gather(2, order[:, None].expand(-1, t.shape[1], -1))
        return _Ritz(values, coefficients, beta[:, -1:] * coefficients[:, -1].abs())

    def vectors(self, coefficients: Tensor) -> Tensor:
        """Ritz vectors as columns, of length 1."""
        found = self.basis[:, : self.m].mT @ coefficients.to(self.basis.dtype)
        return found / found.norm(dim=1, keepdim=True)


def _largest_beside(act: Operator, values: Tensor, vectors: Tensor, rng: torch.Generator) -> Tensor:
    """A lower bound on the largest eigenvalue in size beside the given pairs, from a few steps."""
    steps = min(_PROBE, act.stacked.shape[1])
    space = _Krylov(act._replace(without=(values, vectors)), rng, steps)
    space.extend(steps)
    return space.ritz(1).values[:, 0].abs().to(values.dtype)
