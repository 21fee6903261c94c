"""Truncation: the largest components of every direction, with certified errors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from bilinear._checks import check_count, check_inputs
from bilinear._directions import Direction
from bilinear._dropped import Dropped, Interval, in_input_space, of_eigenpairs
from bilinear._eigen import dense_pairs
from bilinear._factors import Factors, forms, spanned
from bilinear._gram import as_double, traces
from bilinear._layer import Layer
from bilinear._metric import Metric, check_layer, moment, resolved
from bilinear._squares import Squares, squares_of

_CHUNK = 1 << 24  # numbers held at a time


class Certified(NamedTuple):
    """What is known of the full layer's arg-max from the kept components.

    Attributes:
        certain: Per input, whether the kept components' arg-max is certainly the full layer's.
        argmax: The kept components' arg-max.
        share: Share of the inputs that are certain.
    """

    certain: Bool[Tensor, "*batch"]
    argmax: Tensor
    share: float


@dataclass(frozen=True, eq=False)
class Truncation:
    """A layer reduced to the k largest eigenpairs of every direction, with certificates of what was dropped.

    Attributes:
        squares: The kept components, as weights that can be run or written back.
        directions: Output directions whose forms were truncated, as rows.
        k: Components kept per direction.
        metric: In which they are the largest.
        values: All eigenvalues per direction in that metric, largest |value| first; the first k are kept.
        layer: The full layer.
    """

    squares: Squares
    directions: Float[Tensor, "direction d_out"]
    k: int
    metric: Metric
    values: Float[Tensor, "direction coordinate"]
    layer: Layer
    dropped: tuple[Dropped, ...]

    def __call__(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        """The truncated layer's output on inputs (..., d_in)."""
        return self.squares(x)

    @torch.no_grad()
    def interval(self, x: Tensor) -> Interval:
        r"""Bounds per input on the full layer's output along each direction.

        In every metric that was prepared, the dropped part acts only on the input's energy in the span of the layer's
        forms and outside of the kept vectors, with its own signs:
        :math:`y - y_k \in [\lambda^-, \lambda^+] (\|Sz\|^2 - \|V_k^\top z\|^2)`; the intervals are intersected.

        Args:
            x: (..., d_in).
        """
        check_inputs("x", x, self.layer.d_in, self.layer.w)
        coordinates, kept = self.layer.coordinates(x).double(), self._kept(x)
        bounds = [one.bounds(coordinates) for one in self.dropped]
        lower = kept + torch.stack([one.lower for one in bounds]).amax(0)
        upper = kept + torch.stack([one.upper for one in bounds]).amin(0)
        return Interval(lower.to(x), upper.to(x))

    def _kept(self, x: Tensor) -> Tensor:
        """What the kept components of each direction's own form give along it.

        Not the output of `squares`: where directions are linearly dependent, these write the closest outputs to all.
        """
        parts = self.squares.activations(x).unflatten(-1, (len(self.directions), self.k)).double()
        kept = (parts * self.values[:, : self.k].double()).sum(-1)
        if self.layer.norm is None or self.layer.skip is None:
            return kept
        return kept + (self.layer.beside(x) @ self.directions.T).double()

    @torch.no_grad()
    def certified(self, x: Tensor) -> Certified:
        """On which inputs the arg-max over directions certainly is the full layer's.

        Meant for directions that are the outputs, or the outputs less their mean (`centred`); outputs that a skip path
        around a norm adds are included.

        Args:
            x: (..., d_in).
        """
        lower, upper = self.interval(x)
        kept = self.squares(x) @ self.directions.T
        argmax = kept.argmax(-1)
        own = lower.gather(-1, argmax[..., None])
        others = upper.scatter(-1, argmax[..., None], -torch.inf)
        certain = (own > others).all(-1)
        return Certified(certain, argmax, float(certain.double().mean()))

    @torch.no_grad()
    def expected_error(self, x: Tensor | None = None) -> Float[Tensor, " direction"]:
        r"""Expected squared error along every direction for Gaussian coordinates with the data's second moment.

        The error is that of the truncated layer as it runs.

        .. math:: \mathbb E[(z^\top R z)^2] = 2\, \mathrm{tr}(R M R M) - 2 (m^\top R m)^2 + (\mathrm{tr} R M - shift)^2

        with second moment M and mean m, known (from the constant) where the layer is affine, else taken as 0.

        Args:
            x: Inputs whose second moment to take; None takes the data metric's own.

        Raises:
            ValueError: Without inputs, if the truncation is in no data metric.
        """
        if x is None:
            if self.metric.moment is None:
                raise ValueError("expected_error needs inputs, since this truncation is in no data metric; pass x")
            sigma = self.metric.moment.double()
        else:
            sigma = moment(self.layer, x)
        # With a constant among the coordinates the mean is known: it is no Gaussian, and its own square counts once.
        mean = sigma[0] / sigma[0, 0] if self.layer.affine else torch.zeros_like(sigma[0])
        found = []
        bias = torch.zeros_like(self.layer.d[:, 0]) if self.squares.bias is None else self.squares.bias
        for row, shift in zip(self.directions, (self.directions @ bias).double(), strict=True):
            rest = self._remainder(row[None])[0]
            product = rest @ sigma
            variance = 2 * (product * product.T).sum() - 2 * (mean @ rest @ mean) ** 2
            found.append(variance + (product.trace() - shift) ** 2)
        return torch.stack(found).to(self.layer.w)

    def _remainder(self, rows: Tensor) -> Tensor:
        """Dropped parts of some directions as forms, in float64; the constant that was added back is not in them."""
        plain = squares_of(self.layer, self.squares.vectors, self.squares.writes, "truncated")
        kept = Factors(plain.vectors.T, plain.vectors.T, plain.writes)
        rows = rows.double()
        return forms(as_double(self.layer.factors()), rows) - forms(as_double(kept), rows)


def centred(layer: Layer) -> Float[Tensor, "d_out d_out"]:
    """Directions of every output less the mean of all: logits as softmax and arg-max see them."""
    check_layer(layer)
    eye = layer.directions(None)
    return eye - 1 / len(eye)


@torch.no_grad()
def truncate(
    layer: Layer,
    k: int,
    direction: Direction | None = None,
    *,
    metric: str | Metric | Tensor | None = None,
    recentre: bool = False,
    refit: bool = False,
) -> Truncation:
    """Keep the k eigenpairs of largest size in every direction.

    All eigenvalues are computed (dense, one chunk of directions at a time), since the certificates need the extreme
    ones of what is dropped.

    Args:
        layer: The layer.
        k: Components per direction.
        direction: As in `Layer.form`; None is all outputs. For logits, `centred(layer)` takes out the part that all
            share, which softmax does not see.
        metric: As in `eigen`.
        recentre: Add the expected value of the dropped part under the data metric back as a constant, which removes
            the last term of `expected_error`. Needs a data metric.
        refit: Let every direction use the kept vectors of all directions, with the writes that come closest to the
            layer in the metric (closed form). Certificates are those of the eigenpairs, and hold all the same.

    Returns:
        The truncation. In another metric than the Euclidean one, intervals are certified in both.

    Raises:
        ValueError: For k beyond the coordinates, or `recentre` without a data metric.
    """
    measure, rows, n = resolved(layer, metric), layer.directions(direction), layer.n_coordinates
    check_count("k", k, n, "coordinates of the layer")
    if recentre and measure.moment is None:
        raise ValueError("recentre=True needs a data metric; pass metric=bilinear.data_metric(layer, inputs)")
    span = spanned(measure.whitened(layer.factors()))
    values, kept = _spectra(span.factors, rows, k)
    vectors = span.basis @ kept
    flat, back = vectors.permute(1, 0, 2).flatten(1), torch.linalg.pinv(rows)
    every = pad(values, (0, n - values.shape[1]))
    if refit:
        writes = back @ rows @ _closest_writes(span.factors, kept.permute(1, 0, 2).flatten(1))
    else:
        writes = (back[:, :, None] * every[None, :, :k]).flatten(1)
    # Whitened, the second moment is the identity: the expected dropped output is the trace of what is dropped.
    rest = back @ (rows @ traces(span.factors)) - writes @ flat.square().sum(0)
    origin = "exact" if k == n else "fitted" if refit else "truncated"
    squares = squares_of(layer, measure.vectors(flat), writes, origin, rest if recentre else None)
    bounds = [of_eigenpairs(measure, span, rows, kept, values)]
    if measure.root is not None:
        bounds.append(in_input_space(layer, rows, measure.vectors(vectors), every[:, :k]))
    return Truncation(squares, rows, k, measure, every, layer, tuple(bounds))


def _spectra(factors: Factors, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of every direction, largest in size first, and the first k vectors, padded with zeros."""
    n, values, kept = factors.w.shape[1], [], []
    for part in rows.split(max(1, _CHUNK // n**2)):
        pairs = dense_pairs(factors, part, n)
        values.append(pairs.values)
        kept.append(pad(pairs.vectors[:, :, :k], (0, max(0, k - n))).clone())
    return torch.cat(values), torch.cat(kept)


def _closest_writes(factors: Factors, vectors: Tensor) -> Float[Tensor, "d_out component"]:
    """The writes of given squares whose sum comes closest to a layer, in least squares over the tensor."""
    w, v, d = as_double(factors)
    s = vectors.double()
    s = s / s.norm(dim=0).clamp_min(torch.finfo(s.dtype).tiny)
    target = d @ ((w @ s) * (v @ s))
    # Kept vectors may repeat or be zero; then the writes of smallest size.
    writes = torch.linalg.lstsq((s.T @ s).square().cpu(), target.T.cpu(), driver="gelsd", rcond=1e-10).solution.T
    sizes = vectors.double().square().sum(0).clamp_min(torch.finfo(s.dtype).tiny)
    return (writes.to(s) / sizes).to(vectors)
