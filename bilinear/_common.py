"""The form that all outputs share: arg-max and softmax do not see it, so that it may be chosen freely."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_count
from bilinear._factors import forms, spanned
from bilinear._layer import Layer
from bilinear._metric import Metric, resolved
from bilinear._squares import squares_of

_STILL = 1e-3  # relative fall of the error over _OVER sweeps below which the alternation ends
_OVER = 10


@torch.no_grad()
def without_common(
    layer: Layer, k: int, *, metric: str | Metric | Tensor | None = None, sweeps: int = 300, seed: int = 0
) -> Layer:
    r"""The layer less what all outputs share, chosen so that k components an output come closest to what is left.

    .. math:: \min_{C,\ \mathrm{rank} L_u \le k} \sum_u \| Q_u - C - L_u \|^2

    in the metric, by alternation: L_u are the k largest eigenpairs of Q_u - C (followed by subspace iteration), C is
    the mean of Q_u - L_u. C starts at the mean form, which is all that is taken out by `centred`.

    Args:
        layer: Whose outputs are logits, or otherwise compared with each other alone.
        k: Components per output that are to be kept, by `truncate` say, in the same metric.
        metric: As in `eigen`.
        sweeps: Most alternations.
        seed: Of the first subspaces.

    Returns:
        A layer whose outputs differ from the given one's by one number an input: the same differences of outputs,
        hence the same arg-max and softmax, exactly. It holds all forms while it works.

    Raises:
        ValueError: For k beyond the coordinates.

    Source:
        That a common part is free is as in centred logits (Pearce et al., arXiv 2410.08417); choosing it is ours.
    """
    measure = resolved(layer, metric)
    check_count("k", k, layer.n_coordinates, "coordinates of the layer")
    span = spanned(measure.whitened(layer.factors()))
    q = forms(span.factors, layer.directions(None))
    common = _common(q, min(k, len(q[0])), sweeps, torch.Generator().manual_seed(seed))
    values, vectors = torch.linalg.eigh(common)
    writes = -values.expand(layer.d_out, -1)
    squares = squares_of(layer, measure.vectors(span.basis @ vectors), writes.contiguous(), "exact")
    return layer + replace(squares, skip=None).layer()


def _common(q: Float[Tensor, "d_out n n"], k: int, sweeps: int, rng: torch.Generator) -> Float[Tensor, "n n"]:
    """The common form: alternation of both closed forms, the errors of which never rise."""
    mean = q.mean(0)
    q, whole = q - mean, float((q - mean).square().sum())
    vectors = torch.linalg.qr(torch.randn(*q.shape[:2], k, generator=rng, dtype=torch.float64).to(q))[0]
    values = q.new_zeros(len(q), k)
    image, low = q @ vectors, torch.zeros_like(mean)
    errors: list[float] = []
    for _ in range(sweeps):
        # Less the common form, which is the mean less the mean of what is kept.
        image += low @ vectors
        # What was found and its image: the largest pairs in that span are no worse than those found.
        basis = torch.linalg.qr(torch.cat([vectors, image], 2)[:, :, : q.shape[1]])[0]
        moved = q @ basis
        values, inner = torch.linalg.eigh(basis.mT @ (moved + low @ basis))
        order = values.abs().argsort(1, descending=True)[:, :k]
        chosen = inner.gather(2, order[:, None].expand(-1, inner.shape[1], -1))
        values, vectors, image = values.gather(1, order), basis @ chosen, moved @ chosen
        flat = vectors.permute(1, 0, 2).flatten(1)
        low = (flat * values.flatten()) @ flat.T / len(q)
        # |Q - L + mean L|^2 over outputs; the mean of Q is 0.
        kept = float((values.square() - 2 * values * (vectors * image).sum(1)).sum())
        errors.append(whole + kept - len(q) * float(low.square().sum()))
        if len(errors) > _OVER and errors[-1] > errors[-1 - _OVER] * (1 - _STILL):
            break
    return mean - low
