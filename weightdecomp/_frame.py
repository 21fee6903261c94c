"""Frame: where the components of a site may move, so that they sum to its weights at every moment."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._pieces import Pieces

_CLEAR = 1e-2  # smallest over largest entry of a factorisation's diagonal from which float32 keeps a sum to 1e-5
_FLOOR = 1e-4  # least relative power of an input direction, so that hardly used ones do not run away


def exact(pieces: Pieces, weight: Float[Tensor, "d_out d_in"], move_v: bool) -> Pieces:
    """The nearest pieces that sum to the weight, moving only what they read (v) or only what they write (u).

    A least-squares correction: where the u span the weight's columns (or the v its rows) the sum is exact to rounding.
    """
    missing = weight - pieces.total()
    if move_v:
        return pieces._replace(v=pieces.v + _least_squares(pieces.u, missing))
    return pieces._replace(u=pieces.u + _least_squares(pieces.v, missing.T))


def _least_squares(factor: Float[Tensor, "piece d"], missing: Float[Tensor, "d other"]) -> Tensor:
    """The smallest change x with factor^T x = missing."""
    return _LeastSquares.apply(factor, missing)


class _LeastSquares(torch.autograd.Function):
    """x = F (F^T F + ridge)^-1 M, whose backward pass uses the forward's factorisation once more."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, missing: Tensor) -> Tensor:
        lower = _factorised(factor)
        precise = factor.to(lower)
        inner = torch.cholesky_solve(missing.to(lower), lower)
        ctx.save_for_backward(precise, lower, inner)
        return (precise @ inner).to(factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        factor, lower, inner = ctx.saved_tensors
        grad = grads[0].to(factor)
        by_missing = torch.cholesky_solve(factor.T @ grad, lower)
        # d(gram) = -by_missing inner^T; that the ridge too depends on the factor is below rounding.
        by_gram = by_missing @ inner.T
        by_factor = grad @ inner.T - factor @ (by_gram + by_gram.T)
        return by_factor.to(grads[0]), by_missing.to(grads[0])


def _factorised(factor: Float[Tensor, "piece d"]) -> Float[Tensor, "d d"]:
    """The Cholesky factor of F^T F, in float64 where pieces so nearly depend on one another that float32 loses the sum.

    Raises:
        torch.linalg.LinAlgError: If they depend on one another even then, and cannot write all of the weights.
    """
    lower, failed = torch.linalg.cholesky_ex(_gram(factor))
    sizes = lower.diagonal()
    if failed or sizes.min() < _CLEAR * sizes.max():
        return torch.linalg.cholesky(_gram(factor.double()))
    return lower


def _gram(factor: Float[Tensor, "piece d"]) -> Float[Tensor, "d d"]:
    """F^T F with a ridge of rounding's size."""
    gram = factor.T @ factor
    gram.diagonal().add_(torch.finfo(gram.dtype).eps * gram.diagonal().mean())
    return gram


def conditioning(factor: Float[Tensor, "piece d"]) -> float:
    """Smallest over largest singular value of the span; 0 where the pieces cannot span the space."""
    if factor.shape[0] < factor.shape[1]:
        return 0.0
    sizes = torch.linalg.svdvals(factor.detach())
    return float(sizes[-1] / sizes[0].clamp_min(1e-30))


class Frame(NamedTuple):
    """Where one site's components may move: the span of its inputs and the side that keeps the sum exact.

    Attributes:
        basis: Columns that span the site's inputs, each as long as the inputs' root mean square along it, so that a
            step of one size in any coordinate of a v changes activations by one size.
        dual: The matching columns with basis^T dual = 1.
        weight: W in that basis.
        move_v: Whether exactness is restored by the v (else by the u).
        columns: Orthonormal rows that span W's columns if the u must stay in them, else None.
        kept_v: What of the v never moves, so that each component goes on answering to its own exemplar alone; the
            basis is then what the exemplars do not span. Zero where there are none.
        kept_u: The u of those components, the first ones: u_c = W d_c is the one exact choice.
    """

    basis: Float[Tensor, "d_in reach"]
    dual: Float[Tensor, "d_in reach"]
    weight: Float[Tensor, "d_out reach"]
    move_v: bool
    columns: Float[Tensor, "rank d_out"] | None
    kept_v: Float[Tensor, "piece d_in"]
    kept_u: Float[Tensor, "exemplar d_out"]

    @property
    def moves(self) -> bool:
        """Whether the components may move at all."""
        return self.basis.shape[1] > 0

    def reduced(self, pieces: Pieces) -> Pieces:
        """The pieces with v in the basis."""
        return pieces._replace(v=pieces.v @ self.basis)

    def lifted(self, pieces: Pieces) -> Pieces:
        """The pieces with v in the site's own coordinates."""
        return pieces._replace(v=torch.addmm(self.kept_v, pieces.v, self.dual.T))

    def exact(self, pieces: Pieces) -> Pieces:
        """Restore what is kept, and the exact sum, after a step."""
        pieces = pieces._replace(u=torch.cat([self.kept_u, pieces.u[len(self.kept_u) :]]))
        if self.columns is not None:
            pieces = pieces._replace(u=pieces.u @ self.columns.T @ self.columns)
            inner = pieces._replace(u=pieces.u @ self.columns.T)
            return pieces._replace(v=exact(inner, self.columns @ self.weight, True).v)
        return exact(pieces, self.weight, self.move_v)


def frame(
    basis: Float[Tensor, "d_in reach"],
    power: Float[Tensor, " reach"],
    held: Float[Tensor, "held reach"],
    matrix: Float[Tensor, "d_out d_in"],
    pieces: Pieces,
) -> Frame:
    """Scale the basis to the inputs and choose the side on which exactness is best conditioned.

    Where the first pieces answer to directions, one each, they go on doing so: only what those do not span is left to
    move.
    """
    root = power.clamp_min(_FLOOR * power.max()).sqrt()
    basis, dual = basis * root, basis / root
    whole, n_held = matrix @ basis, len(held)
    if n_held:
        free = torch.linalg.svd(held / root).Vh[n_held:].T
        basis, dual = basis @ free, dual @ free
    kept_v = pieces.v - pieces.v @ basis @ dual.T if n_held else torch.zeros_like(pieces.v)
    by_v = conditioning(pieces.u)
    by_u = 0.0 if n_held else conditioning(pieces.v @ basis)
    columns = None
    if max(by_v, by_u) < 1e-4:
        left, sizes, _ = torch.linalg.svd(whole, full_matrices=False)
        columns = left[:, sizes > 1e-6 * sizes[0]].T
    move_v = by_v >= by_u or columns is not None
    return Frame(basis, dual, matrix @ basis, move_v, columns, kept_v, pieces.u[:n_held])
