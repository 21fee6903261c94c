"""Truncation: the largest components of every direction, with certified errors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilinear._checks import check_count, check_inputs
from bilinear._eigen import dense_pairs
from bilinear._factors import Factors, forms
from bilinear._gram import as_double, traces
from bilinear._layer import Direction, Layer
from bilinear._metric import Metric, moment, resolved
from bilinear._squares import Squares, squares_of

_CHUNK = 1 << 24  # numbers held at a time


class Interval(NamedTuple):
    """Where the full layer's output certainly is, from the truncated one's."""

    lower: Float[Tensor, "*batch direction"]
    upper: Float[Tensor, "*batch direction"]


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


class _Dropped(NamedTuple):
    """What a metric says about the dropped part: its extreme eigenvalues beside vectors that it does not see.

    Attributes:
        metric: Where lengths are measured.
        basis: Orthonormal columns, in whitened coordinates, of which the dropped part is (nearly) free.
        low: Smallest eigenvalue of the dropped part on the complement of the basis.
        high: Largest one.
    """

    metric: Metric
    basis: Float[Tensor, "direction coordinate k"]
    low: Float[Tensor, " direction"]
    high: Float[Tensor, " direction"]


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
    dropped: tuple[_Dropped, ...]

    def __call__(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        """The truncated layer's output on inputs (..., d_in)."""
        return self.squares(x)

    @torch.no_grad()
    def interval(self, x: Tensor) -> Interval:
        r"""Bounds per input on the full layer's output along each direction.

        In every metric that was prepared, the dropped part acts only on the input's energy outside of the kept
        vectors, with its own signs:
        :math:`y - y_k \in [\lambda^-, \lambda^+] (\|z\|^2 - \|V_k^\top z\|^2)`; the intervals are intersected.

        Args:
            x: (..., d_in).
        """
        check_inputs("x", x, self.layer.d_in, self.layer.w)
        coordinates = self.layer.coordinates(x).double()
        kept = self._kept(x)
        lower = torch.full_like(kept, -torch.inf)
        upper = torch.full_like(kept, torch.inf)
        for one in self.dropped:
            low, high = _outside(one, coordinates)
            lower, upper = torch.maximum(lower, kept + low), torch.minimum(upper, kept + high)
        slack = 1e2 * torch.finfo(x.dtype).eps * self._size(coordinates)
        return Interval((lower - slack).to(x), (upper + slack).to(x))

    def _kept(self, x: Tensor) -> Tensor:
        """What the kept components of each direction's own form give along it.

        Not the output of `squares`: where directions are linearly dependent, these write the closest outputs to all.
        """
        parts = self.squares.activations(x).unflatten(-1, (len(self.directions), self.k)).double()
        kept = (parts * self.values[:, : self.k].double()).sum(-1)
        if self.layer.norm is None or self.layer.skip is None:
            return kept
        return kept + (self.layer.beside(x) @ self.directions.T).double()

    def _size(self, coordinates: Tensor) -> Tensor:
        """Size of the terms that outputs are sums of, to which rounding is relative."""
        energy = self.metric.energy(coordinates.to(self.layer.w)).double()
        return energy[..., None] * self.values[:, 0].abs().double()

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
    rows, measure = layer.directions(direction), resolved(layer, metric)
    check_count("k", k, layer.n_coordinates, "coordinates of the layer")
    if recentre and measure.moment is None:
        raise ValueError("recentre=True needs a data metric; pass metric=bilinear.data_metric(layer, inputs)")
    factors = measure.whitened(layer.factors())
    n, values, kept, dropped = layer.n_coordinates, [], [], []
    for part in rows.split(max(1, _CHUNK // n**2)):
        pairs = dense_pairs(factors, part, min(n, 2 * layer.factors().w.shape[0]))
        padded = torch.nn.functional.pad(pairs.values, (0, n - pairs.values.shape[1]))
        values.append(padded)
        found = pairs.vectors[:, :, :k]
        kept.append(torch.nn.functional.pad(found, (0, k - found.shape[2])))
        dropped.append(_own_bound(measure, kept[-1], padded, k))
    every, vectors = torch.cat(values), torch.cat(kept)
    reads = measure.vectors(vectors)
    back = torch.linalg.pinv(rows)
    flat = vectors.permute(1, 0, 2).flatten(1)
    if refit:
        writes = back @ rows @ _closest_writes(factors, flat)
    else:
        writes = (back[:, :, None] * every[None, :, :k]).flatten(1)
    # Whitened, the second moment is the identity: the expected dropped output is the trace of what is dropped.
    rest = back @ (rows @ traces(factors)) - writes @ flat.square().sum(0)
    origin = "exact" if k == n else "fitted" if refit else "truncated"
    squares = squares_of(layer, measure.vectors(flat), writes, origin, rest if recentre else None)
    bounds = [_Dropped(measure, *(torch.cat(one) for one in list(zip(*dropped, strict=True))[1:]))]
    if measure.root is not None:
        bounds.append(_euclidean_bound(layer, rows, reads, every[:, :k]))
    return Truncation(squares, rows, k, measure, every, layer, tuple(bounds))


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


def _own_bound(measure: Metric, vectors: Tensor, values: Tensor, k: int) -> _Dropped:
    """In the metric of the truncation the dropped part is exactly free of the kept vectors."""
    rest = values[:, k:] if k < values.shape[1] else values[:, :1] * 0
    low, high = rest.amin(1).double(), rest.amax(1).double()
    return _Dropped(measure, vectors.double(), low, high)


def _euclidean_bound(layer: Layer, rows: Tensor, reads: Tensor, values: Tensor) -> _Dropped:
    """The dropped part of another metric's truncation, by its Euclidean extreme eigenvalues."""
    low, high = [], []
    factors = as_double(layer.factors())
    for row, vectors, own in zip(rows.double(), reads.double(), values.double(), strict=True):
        rest = forms(factors, row[None])[0] - (vectors * own) @ vectors.T
        spectrum = torch.linalg.eigvalsh(rest)
        low.append(spectrum[0])
        high.append(spectrum[-1])
    ends = torch.stack(low), torch.stack(high)
    empty = reads.new_zeros(len(rows), reads.shape[1], 0).double()
    return _Dropped(Metric("input"), empty, *ends)


def _outside(bound: _Dropped, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of the dropped part's output on each input."""
    whitened = coordinates if bound.metric.inverse is None else coordinates @ bound.metric.inverse.double()
    whole = whitened.square().sum(-1)[..., None]
    inside = torch.einsum("...d,ndk->...nk", whitened, bound.basis).square().sum(-1)
    energy = (whole - inside).clamp_min(0)
    return energy * bound.low, energy * bound.high
