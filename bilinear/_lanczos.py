"""Lanczos for the forms of many outputs at once: one matrix product a step serves all that are not finished."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._factors import Factors

_FIRST = 24  # steps before the first test of convergence
_PROBE = 6  # steps of the search for eigenvalues that were missed
_GUARD = 1e-2  # residual that the next pair must reach, so that none is overtaken
_BLOCK = 64  # neurons
_TOGETHER = 128  # spaces at a time: products with the factors are no faster with more
_ROOM = 1 << 18  # numbers in a row of every space


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
    """Forms of several directions as one operator on a row each; products with the factors that all share.

    Attributes:
        factors: The layer's.
        weights: Half the weight of every neuron in every form.
    """

    factors: Factors
    weights: Float[Tensor, "hidden direction"]

    def of(self, numbers: list[int]) -> "Operator":
        """Some of the forms."""
        return self._replace(weights=self.weights[:, numbers])

    def __call__(self, x: Float[Tensor, "direction coordinate"]) -> Float[Tensor, "direction coordinate"]:
        """Every form on its own vector."""
        x = x.T.contiguous()
        found = torch.zeros_like(x)
        # A block of neurons that is still in a CPU's cache is fast to read the other way round.
        size = _BLOCK if x.device.type == "cpu" else len(self.weights)
        blocks = (one.split(size) for one in (self.factors.w, self.factors.v, self.weights))
        for w, v, weights in zip(*blocks, strict=True):
            left, right = (w @ x).mul_(weights), (v @ x).mul_(weights)
            found.addmm_(w.T, right).addmm_(v.T, left)
        return found.T.contiguous()


def operator(factors: Factors, directions: Float[Tensor, "direction d_out"]) -> Operator:
    """The operator of some directions' forms."""
    return Operator(factors, (directions @ factors.d).T.contiguous() / 2)


def lanczos(act: Operator, k: int, rtol: float, rng: torch.Generator, most: int) -> Pairs:
    """The k eigenpairs of largest size of every form, by Lanczos with full reorthogonalisation.

    A form that is finished leaves its place to the next, so that products stay large and no form takes more steps than
    it needs.

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
    w, n = act.factors.w, act.weights.shape[1]
    values, vectors, residuals = w.new_zeros(n, k), w.new_zeros(n, w.shape[1], k), w.new_zeros(n, k)
    found = Pairs(values, vectors, residuals, torch.zeros(n, dtype=torch.bool, device=w.device))
    places = max(1, min(n, _TOGETHER, _ROOM // w.shape[1]))
    spaces, plans = _Krylov(w, places, most, rng), [_Plan(k, rtol, most) for _ in range(n)]
    owners, waiting = dict(enumerate(range(places))), list(range(places, n))
    running = act.of(list(owners.values()))
    while owners:
        spaces.step(running, list(owners))
        ended = [place for place, form in owners.items() if plans[form].ended(spaces, place)]
        for place in ended:
            form = owners.pop(place)
            _store(found, form, spaces, place, plans[form])
            if waiting:
                owners[place] = waiting.pop(0)
                spaces.start(place)
        running = act.of(list(owners.values())) if ended else running
    for part in torch.arange(n).split(places):
        missed = _largest_beside(act.of(part.tolist()), found.values[part], found.vectors[part], rng)
        noise = 80 * torch.finfo(w.dtype).eps * found.values[part, 0].abs()
        found.sound[part] &= missed <= found.values[part, -1].abs() * 1.01 + noise
    return found


class _Ritz(NamedTuple):
    """Ritz pairs of one space, largest in size first."""

    values: Tensor
    coefficients: Tensor
    residuals: Tensor


class _Krylov:
    """Krylov spaces of forms that are worked on together, each at a step of its own, with float64 projections."""

    def __init__(self, like: Tensor, places: int, most: int, rng: torch.Generator) -> None:
        # Memory that no space grows into is never touched, hence not taken.
        self.basis = like.new_empty(places, most + 1, like.shape[1])
        self.alpha, self.beta = (like.new_zeros(places, most, dtype=torch.float64) for _ in range(2))
        self.steps, self.rng = [0] * places, rng
        for place in range(places):
            self.start(place)

    def start(self, place: int) -> None:
        """Begin a new space in a place."""
        self.steps[place] = 0
        self.beta[place] = 0
        self.basis[place, 0] = self._random(self.basis[0, 0])

    def _random(self, like: Tensor) -> Tensor:
        x = torch.randn(like.shape, generator=self.rng, dtype=torch.float64).to(like)
        return x / x.norm()

    def step(self, act: Callable[[Tensor], Tensor], places: list[int]) -> None:
        """Grow the spaces in some places by one vector each; the operator's forms are those of the places, in order."""
        now = [self.steps[place] for place in places]
        q = self.basis[places, now]
        r = act(q)
        size = r.norm(dim=1)
        alpha = (r * q).sum(1)
        r -= alpha[:, None] * q
        before = [max(j - 1, 0) for j in now]  # at the first step beta is still 0
        r -= self.beta[places, before].to(r)[:, None] * self.basis[places, before]
        # One space after the other, so that its second reading is from the cache.
        for row, place, j in zip(r, places, now, strict=True):
            _orthogonalise(row, self.basis[place, : j + 1])
        beta = r.norm(dim=1)
        ended = beta <= 10 * torch.finfo(r.dtype).eps * size
        for i in ended.nonzero().flatten().tolist():  # an invariant subspace: go on outside of it
            r[i] = self._random(r[i])
            for _ in range(2):
                _orthogonalise(r[i], self.basis[places[i], : now[i] + 1])
        length = torch.where(ended, r.norm(dim=1), beta)
        self.alpha[places, now] = alpha.double()
        self.beta[places, now] = torch.where(ended, 0, beta).double()
        # In a space that is exhausted nothing is left to go on with.
        after = [j + 1 for j in now]
        self.basis[places, after] = r / length.clamp_min(torch.finfo(r.dtype).tiny)[:, None]
        for place, j in zip(places, after, strict=True):
            self.steps[place] = j

    def ritz(self, place: int, k: int) -> _Ritz:
        """The k Ritz pairs of largest size."""
        m = self.steps[place]
        alpha, beta = self.alpha[place, :m], self.beta[place, :m]
        t = alpha.diag() + beta[:-1].diag(1) + beta[:-1].diag(-1)
        values, coefficients = torch.linalg.eigh(t)
        order = values.abs().argsort(descending=True)[:k]
        coefficients = coefficients[:, order]
        return _Ritz(values[order], coefficients, beta[-1] * coefficients[-1].abs())

    def vectors(self, place: int, coefficients: Tensor) -> Tensor:
        """Ritz vectors as columns, of length 1."""
        found = self.basis[place, : self.steps[place]].T @ coefficients.to(self.basis)
        return found / found.norm(dim=0)


def _orthogonalise(row: Tensor, basis: Tensor) -> None:
    """Take out of a vector what lies in a space, in place."""
    row.addmv_(basis.T, basis @ row, alpha=-1)


class _Plan:
    """When a form's convergence is tested, and what the last test found."""

    def __init__(self, k: int, rtol: float, most: int) -> None:
        self.k, self.rtol, self.most = k, rtol, most
        self.due = min(max(_FIRST, 2 * k + 4), most)
        self.last: tuple[int, float] | None = None
        self.converged = False

    def ended(self, spaces: _Krylov, place: int) -> bool:
        """Whether the form is finished: converged, or out of steps."""
        m = spaces.steps[place]
        if m < self.due:
            return False
        self.ritz = spaces.ritz(place, min(self.k + 1, m))
        scale = float(self.ritz.values[0].abs()) or 1.0
        goal = torch.full_like(self.ritz.residuals, self.rtol * scale)
        goal[self.k :] = _GUARD * scale
        excess = float((self.ritz.residuals / goal).max())
        self.converged = excess <= 1
        if self.converged or m == self.most:
            return True
        self.due = min(m + self._wait(m, math.log(excess)), self.most)
        return False

    def _wait(self, m: int, excess: float) -> int:
        """Steps to the next test: most of what the fall of the residual since the last one says is left."""
        wait = m // 5
        if self.last is not None and self.last[1] > excess:
            wait = min(wait, int(0.8 * excess * (m - self.last[0]) / (self.last[1] - excess)))
        self.last = m, excess
        return max(wait, 2)


def _store(found: Pairs, form: int, spaces: _Krylov, place: int, plan: _Plan) -> None:
    """Keep the pairs of a finished form."""
    values, coefficients, residuals = plan.ritz
    found.values[form] = values[: plan.k]
    found.vectors[form] = spaces.vectors(place, coefficients[:, : plan.k])
    # What rounding does to the estimate: Q v is not known better than this.
    noise = 8 * torch.finfo(found.values.dtype).eps * values[0].abs()
    found.residuals[form] = residuals[: plan.k].clamp_min(noise)
    found.sound[form] = plan.converged


def _largest_beside(act: Operator, values: Tensor, vectors: Tensor, rng: torch.Generator) -> Tensor:
    """A lower bound on the largest eigenvalue in size beside the given pairs, from a few steps."""
    n, d = len(values), act.factors.w.shape[1]

    def beside(x: Tensor) -> Tensor:
        inner = torch.bmm(vectors.mT, x[:, :, None]) * values[:, :, None]
        return act(x) - torch.bmm(vectors, inner)[:, :, 0]

    spaces = _Krylov(vectors[:, :, 0], n, min(_PROBE, d), rng)
    for _ in range(min(_PROBE, d)):
        spaces.step(beside, list(range(n)))
    return torch.stack([spaces.ritz(i, 1).values[0].abs() for i in range(n)]).to(values.dtype)
