"""Eigen: exact eigenpairs of output directions, by dense routes or by Lanczos over all outputs at once."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_count
from bilinear._directions import Direction, one_direction
from bilinear._factors import Factors, forms
from bilinear._lanczos import Pairs, lanczos, operator
from bilinear._layer import Layer
from bilinear._metric import Metric, resolved
from bilinear._squares import Squares, squares_of

_DENSE = 320  # coordinates up to which a dense eigh is as fast
_SHARE = 12  # pairs asked for beyond this share of the coordinates take the dense route
_CHUNK = 1 << 24  # numbers held at a time beside the factors
_MOST = 400  # Lanczos steps


@dataclass(frozen=True, eq=False)
class Eigen:
    r"""Eigenpairs of the symmetric forms of output directions, largest |value| first.

    The output along a direction is :math:`\sum_i \lambda_i (v_i \cdot \tilde x)^2`. One direction has no leading axis.

    Attributes:
        values: lambda, with its sign.
        vectors: v as columns, in the layer's coordinates (row 0 is the constant's where the layer is affine).
            Orthonormal in a Euclidean metric, orthonormal under the second moment's inverse in the data metric.
        residuals: Bound on the distance of each value to a true eigenvalue (in the whitened form).
        directions: The output directions, as rows.
        metric: In which the spectrum is taken.
        layer: What was decomposed.
    """

    values: Float[Tensor, "*direction k"]
    vectors: Float[Tensor, "*direction coordinate k"]
    residuals: Float[Tensor, "*direction k"]
    directions: Float[Tensor, "rows d_out"]
    metric: Metric
    layer: Layer

    @property
    def k(self) -> int:
        """Pairs per direction."""
        return self.values.shape[-1]

    def activations(self, x: Tensor) -> Float[Tensor, "*batch_direction k"]:
        """Each component's part of the output, lambda (v . x~)^2, on inputs (..., d_in)."""
        coordinates = self.layer.coordinates(x)
        if self.values.ndim == 1:
            return (coordinates @ self.vectors).square() * self.values
        return torch.einsum("...d,ndk->...nk", coordinates, self.vectors).square() * self.values

    def __call__(self, x: Tensor) -> Float[Tensor, "*batch_direction"]:
        """The output along the directions that these pairs make, a skip path around a norm included."""
        found = self.activations(x).sum(-1)
        if self.layer.norm is None or self.layer.skip is None:
            return found
        return found + (self.layer.beside(x) @ self.directions.T).reshape(found.shape)

    def top(self, k: int) -> "Eigen":
        """The k largest pairs of each direction."""
        check_count("k", k, self.k, "pairs found")
        cut = {name: getattr(self, name)[..., :k] for name in ("values", "vectors", "residuals")}
        return replace(self, **cut)

    def groups(self, rtol: float = 0.01) -> list[list[int]]:
        """Pairs of one direction whose values agree: only the subspace that a group spans is determined.

        Args:
            rtol: Largest difference of neighbours in a group, relative to the largest |value|.

        Returns:
            Numbers of the pairs, largest |value| first.

        Raises:
            ValueError: If there are several directions; index them with `eigen[i]` first.
        """
        if self.values.ndim > 1:
            raise ValueError("groups are those of one direction; take one with eigen[i]")
        values = self.values.tolist()
        order = sorted(range(self.k), key=lambda i: values[i])
        tolerance = rtol * max((abs(x) for x in values), default=0.0)
        found: list[list[int]] = []
        for i in order:
            if found and values[i] - values[found[-1][-1]] <= tolerance:
                found[-1].append(i)
            else:
                found.append([i])
        return sorted((sorted(group) for group in found), key=lambda group: group[0])

    def subspaces(self, rtol: float = 0.01) -> list[tuple[float, Float[Tensor, "coordinate _"]]]:
        """Mean value and spanning columns of each group of equal values of one direction; see `groups`."""
        return [(float(self.values[one].mean()), self.vectors[:, one]) for one in self.groups(rtol)]

    def __getitem__(self, index: int) -> "Eigen":
        """The pairs of one of several directions."""
        if self.values.ndim == 1:
            raise ValueError("these are the pairs of one direction; eigen[i] takes one of several")
        cut = {name: getattr(self, name)[index] for name in ("values", "vectors", "residuals")}
        return replace(self, **cut, directions=self.directions[[index]])

    def effective_rank(self) -> Float[Tensor, "*direction"]:
        """(sum |lambda|)^2 / sum lambda^2 of the pairs found; 0 for a zero form."""
        squares = self.values.square().sum(-1)
        return torch.where(squares > 0, self.values.abs().sum(-1).square() / squares, 0)

    def squares(self) -> Squares:
        """The pairs as components that write the outputs, to be run, selected from or written back.

        Directions other than single outputs overlap; their pseudo-inverse says what each writes. Outputs beyond the
        span of the directions are 0.
        """
        values = self.values.reshape(-1, self.k)
        back = torch.linalg.pinv(self.directions)
        writes = back[:, :, None] * values[None]
        vectors = self.vectors.reshape(len(values), -1, self.k).permute(1, 0, 2)
        whole = self.k == self.layer.n_coordinates and len(values) >= self.layer.d_out
        origin = "exact" if whole else "truncated"
        return squares_of(self.layer, vectors.flatten(1), writes.flatten(1), origin)

    def __str__(self) -> str:
        """A table of the largest pairs of every direction."""
        return eigen_table(self)

    __repr__ = __str__


@torch.no_grad()
def eigen(
    layer: Layer,
    direction: Direction | None = None,
    *,
    k: int | None = None,
    metric: str | Metric | Tensor | None = None,
    method: str = "auto",
    rtol: float | None = None,
    seed: int = 0,
) -> Eigen:
    """Exact eigenpairs of the symmetric form of one output direction, of several, or of all outputs.

    Args:
        layer: The layer. Biases and skip path are part of its forms (`Layer.form`).
        direction: An output's number, a vector (d_out,), rows (direction, d_out), or None for all outputs.
        k: Pairs per direction, largest |value| first; None is all of them.
        metric: Where lengths are measured, which the spectrum depends on: "input" (the default), "sphere" (the
            default, and canonical, behind a norm), or a data metric from `data_metric(layer, inputs)`.
        method: "dense" (`eigh` of each form), "lanczos" (all outputs at once, never a form), or the faster one.
        rtol: Residual that Lanczos must reach, relative to the largest |value|; by default 1e-4 in float32 and 1e-8
            in float64. Values are right to about its square over their gap.
        seed: Of Lanczos' start vectors.

    Returns:
        Pairs with residuals; all pairs of all directions reproduce the layer.

    Raises:
        ValueError: For k beyond the coordinates, or directions, metrics and methods that do not fit the layer.

    Source:
        Eigenvectors of an output: Pearce et al. (arXiv 2410.08417), section 3; metrics, lifted forms and the stacked
        Lanczos are ours.
    """
    measure, rows = resolved(layer, metric), layer.directions(direction)
    n = layer.n_coordinates
    if k is not None:
        check_count("k", k, n, "coordinates of the layer")
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(f"rtol must be between 0 and 1, got {rtol}")
    if method not in ("auto", "dense", "lanczos"):
        raise ValueError(f"method must be 'auto', 'dense' or 'lanczos', got {method!r}")
    count = n if k is None else k
    factors = measure.whitened(layer.factors())
    fast = method == "lanczos" or (method == "auto" and n > _DENSE and count * _SHARE <= n)
    if fast:
        tolerance = rtol or (1e-4 if layer.w.dtype == torch.float32 else 1e-8)
        pairs = _by_lanczos(factors, rows, count, tolerance, seed)
    else:
        pairs = dense_pairs(factors, rows, count)
    found = Eigen(pairs.values, measure.vectors(pairs.vectors), pairs.residuals, rows, measure, layer)
    return replace(found[0], directions=rows) if one_direction(direction) else found


def _by_lanczos(factors: Factors, rows: Tensor, k: int, rtol: float, seed: int) -> Pairs:
    """Lanczos; forms for which it fails take the dense route."""
    rng = torch.Generator().manual_seed(seed)
    pairs = lanczos(operator(factors, rows), k, rtol, rng, min(factors.w.shape[1], _MOST))
    if not pairs.sound.all():
        dense = dense_pairs(factors, rows[~pairs.sound], k)
        for ours, theirs in zip(pairs, dense, strict=True):
            ours[~pairs.sound] = theirs
    return pairs


def dense_pairs(factors: Factors, rows: Tensor, k: int) -> Pairs:
    """Eigenpairs from forms, in chunks; in the factors' own span where that is smaller."""
    n, span = factors.w.shape[1], None
    if 2 * len(factors.w) < n and k <= 2 * len(factors.w):
        span = torch.linalg.qr(torch.cat([factors.w, factors.v]).T)[0]
        factors = Factors(factors.w @ span, factors.v @ span, factors.d)
    size = factors.w.shape[1]
    found = [_of_forms(forms(factors, part), k) for part in rows.split(max(1, _CHUNK // size**2))]
    values, vectors, residuals = (torch.cat(one) for one in zip(*found, strict=True))
    vectors = vectors if span is None else span @ vectors
    return Pairs(values, vectors, residuals, torch.ones(len(rows), dtype=torch.bool, device=rows.device))


def _of_forms(dense: Float[Tensor, "direction n n"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(dense)
    order = values.abs().argsort(dim=1, descending=True)[:, :k]
    values = values.gather(1, order)
    vectors = vectors.gather(2, order[:, None].expand(-1, dense.shape[1], -1))
    # eigh is backward stable: its values are those of a matrix this close to the form.
    noise = 8 * torch.finfo(dense.dtype).eps * values[:, :1].abs()
    return values, vectors, noise.expand_as(values)


def eigen_table(found: Eigen, most: int = 8) -> str:
    """The largest pairs of every direction as text, each with how many pairs of equal values span its subspace."""
    values = found.values.reshape(-1, found.k)
    residuals, vectors = found.residuals.reshape(values.shape), found.vectors.reshape(len(values), -1, found.k)
    head = (
        f"{len(values)} direction{'s' * (len(values) != 1)} of a bilinear layer {found.layer.d_in} -> "
        f"{found.layer.d_out}, {found.k} of {found.layer.n_coordinates} eigenpairs, metric {found.metric.name}"
    )
    names = ["direction", "pair", "value", "residual", "share of |values|", "subspace of"]
    names += ["offset"] * found.layer.affine
    lines = [head, "", "  ".join(f"{name:>17}" for name in names)]
    for i in range(min(len(values), most)):
        total = float(values[i].abs().sum()) or 1.0
        groups = (found[i] if found.values.ndim > 1 else found).groups()
        sizes = {pair: len(group) for group in groups for pair in group}
        for j in range(min(found.k, most)):
            cells = [str(i), str(j), f"{values[i, j]:.6g}", f"{residuals[i, j]:.1e}"]
            cells.append(f"{float(values[i, j].abs()) / total:.1%}")
            cells.append(f"{sizes[j]} pair{'s' * (sizes[j] != 1)}")
            cells += [f"{vectors[i, 0, j]:.4g}"] * found.layer.affine
            lines.append("  ".join(f"{cell:>17}" for cell in cells))
    hidden = max(0, len(values) - most)
    lines += [f"... and {hidden} more directions"] * bool(hidden)
    ranks = found.effective_rank().reshape(-1)
    lines += ["", f"effective rank of the pairs: {ranks.min():.2f} to {ranks.max():.2f}"]
    return "\n".join(lines)
