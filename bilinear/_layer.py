"""The layer: weights, biases, skip path and norm of one bilinear layer, and its exact symmetric forms."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from bilinear._biases import added, or_zero, with_column
from bilinear._checks import check_inputs, check_tensor
from bilinear._directions import Direction, direction_rows, one_direction
from bilinear._factors import Factors, forms, joined, linear_factors
from bilinear._modules import BilinearMLP
from bilinear._norm import Norm, same_sphere


@dataclass(frozen=True, eq=False)
class Layer:
    r"""A bilinear layer.

    .. math:: y = d[(w z + w\_bias) \circ (v z + v\_bias)] + d\_bias + skip\, x, \qquad z = \mathrm{norm}(x)

    Its *coordinates* x~ are what its symmetric forms act on: x itself, or x-hat on the norm sphere where there is a
    norm, with a constant 1 **in front** where biases or a skip path make the layer *affine*. Then every output along a
    direction is exactly x~^T Q x~. A skip path around a norm is no function of x-hat and stays beside the forms.

    Attributes:
        w: Float[Tensor, "hidden d_in"].
        v: Float[Tensor, "hidden d_in"].
        d: Float[Tensor, "d_out hidden"].
        w_bias: Float[Tensor, " hidden"], or None.
        v_bias: Float[Tensor, " hidden"], or None.
        d_bias: Float[Tensor, " d_out"], or None.
        skip: Float[Tensor, "d_out d_in"], what is added from the raw input; the identity for a residual path.
        norm: What normalises the input, or None.

    Raises:
        ValueError: For shapes that do not fit, NaN or infinity, naming the argument.
        TypeError: For what is no float32 or float64 tensor, or mixed dtypes and devices.

    Source:
        Pearce et al., ICLR 2025 (arXiv 2410.08417), section 3; the lifted form with biases, skip path and norm is ours.
    """

    w: Tensor
    v: Tensor
    d: Tensor
    w_bias: Tensor | None = None
    v_bias: Tensor | None = None
    d_bias: Tensor | None = None
    skip: Tensor | None = None
    norm: Norm | None = None

    def __post_init__(self) -> None:
        """Refuse weights that do not fit together."""
        check_tensor("w", self.w, (None, None))
        hidden, d_in = self.w.shape
        check_tensor("v", self.v, (hidden, d_in), self.w)
        check_tensor("d", self.d, (None, hidden), self.w)
        if not d_in or not len(self.d):
            raise ValueError(f"the layer maps {d_in} inputs to {len(self.d)} outputs, expected at least one of each")
        shapes = {"w_bias": (hidden,), "v_bias": (hidden,), "d_bias": (self.d_out,), "skip": (self.d_out, d_in)}
        for name, shape in shapes.items():
            if getattr(self, name) is not None:
                check_tensor(name, getattr(self, name), shape, self.w)
        if self.norm is not None:
            for name in ("gain", "bias"):
                if getattr(self.norm, name) is not None:
                    check_tensor(f"norm.{name}", getattr(self.norm, name), (d_in,), self.w)

    @property
    def hidden(self) -> int:
        """Number of products."""
        return len(self.w)

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.w.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return len(self.d)

    @property
    def affine(self) -> bool:
        """Whether the forms need the constant coordinate: biases, or a skip path that no norm comes before."""
        biases = (self.w_bias, self.v_bias, self.d_bias, None if self.norm is None else self.norm.bias)
        return any(one is not None for one in biases) or (self.skip is not None and self.norm is None)

    @property
    def n_coordinates(self) -> int:
        """Size of the symmetric forms: d_in, and one more where the layer is affine."""
        return self.d_in + self.affine

    def __call__(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        """The layer's output on inputs (..., d_in).

        Raises:
            ValueError: For inputs of another width, NaN or infinity.
            TypeError: For another dtype or device than the weights'.
        """
        check_inputs("x", x, self.d_in, self.w)
        z = x if self.norm is None else self.norm(x)
        y = (linear(z, self.w, self.w_bias) * linear(z, self.v, self.v_bias)) @ self.d.T
        y = y if self.d_bias is None else y + self.d_bias
        return y + self.beside(x)

    def beside(self, x: Tensor) -> Tensor:
        """The skip path's output; 0 without one."""
        return torch.zeros_like(x[..., :1]) if self.skip is None else x @ self.skip.T

    def coordinates(self, x: Tensor) -> Float[Tensor, "*batch coordinate"]:
        """x~: what the forms act on, for inputs (..., d_in)."""
        check_inputs("x", x, self.d_in, self.w)
        x = x if self.norm is None else self.norm.unit(x)
        return torch.cat([torch.ones_like(x[..., :1]), x], -1) if self.affine else x

    def factors(self) -> Factors:
        """The layer in its coordinates as products alone: biases, gains and the skip path become weights, exactly."""
        w, v, biases = self.w, self.v, [self.w_bias, self.v_bias]
        if self.norm is not None:
            biases = [added(b, self.norm.offset(one)) for b, one in zip(biases, (w, v), strict=True)]
            w, v = self.norm.folded(w), self.norm.folded(v)
        if not self.affine:
            return Factors(w, v, self.d)
        w, v = (with_column(one, bias) for one, bias in zip((w, v), biases, strict=True))
        beside = or_zero(self.d_bias, self.d[:, 0])[:, None]
        if self.skip is not None and self.norm is None:
            beside = torch.cat([beside, self.skip], 1)
        if not beside.any():
            return Factors(w, v, self.d)
        return joined(Factors(w, v, self.d), linear_factors(beside, self.n_coordinates))

    def directions(self, direction: Direction | None) -> Float[Tensor, "direction d_out"]:
        """Output directions as rows; an integer is that output, None all of them.

        Raises:
            ValueError: For an output that does not exist, or directions of another width.
        """
        return direction_rows(direction, self.d_out, self.w)

    def form(self, direction: Direction | None = None) -> Float[Tensor, "*direction coordinate coordinate"]:
        r"""The symmetric form Q of one direction, or of several: the output along it is x~^T Q x~.

        .. math:: Q_g = \sum_a (g^\top d)_a\, \tfrac12 (\tilde w_a \tilde v_a^\top + \tilde v_a \tilde w_a^\top)

        Args:
            direction: An output's number, a vector (d_out,), rows (direction, d_out), or None for all outputs.

        Returns:
            (coordinate, coordinate) for one direction, else with a leading axis. With d_in + 1 coordinates the
            constant is coordinate 0.
        """
        rows = self.directions(direction)
        found = forms(self.factors(), rows)
        return found[0] if one_direction(direction) else found

    def with_embedding(self, embedding: Tensor, bias: Tensor | None = None) -> "Layer":
        """The layer as a function of p, where its input is `embedding @ p + bias`.

        Args:
            embedding: (d_in, d_embedded).
            bias: (d_in,), or None.

        Raises:
            ValueError: For shapes that do not fit, or a layer with a norm, which no linear map passes through.
        """
        if self.norm is not None:
            raise ValueError("an embedding cannot be folded through a norm, which is not linear; keep it in front")
        check_tensor("embedding", embedding, (self.d_in, None), self.w)
        if bias is not None:
            check_tensor("bias", bias, (self.d_in,), self.w)

        def moved(weight: Tensor | None, own: Tensor | None) -> Tensor | None:
            return own if bias is None or weight is None else added(own, weight @ bias)

        return Layer(
            self.w @ embedding,
            self.v @ embedding,
            self.d,
            moved(self.w, self.w_bias),
            moved(self.v, self.v_bias),
            moved(self.skip, self.d_bias),
            None if self.skip is None else self.skip @ embedding,
        )

    def with_head(self, head: Tensor, bias: Tensor | None = None) -> "Layer":
        """The layer followed by `head @ y + bias`: an unembedding, or the encoder of a sparse autoencoder.

        Args:
            head: (d_head, d_out).
            bias: (d_head,), or None.
        """
        check_tensor("head", head, (None, self.d_out), self.w)
        if bias is not None:
            check_tensor("bias", bias, (len(head),), self.w)
        d_bias = added(None if self.d_bias is None else head @ self.d_bias, bias)
        return replace(self, d=head @ self.d, d_bias=d_bias, skip=None if self.skip is None else head @ self.skip)

    def with_skip(self, skip: Tensor | None = None) -> "Layer":
        """The layer plus a linear path from its input: the identity (a residual stream) by default."""
        if skip is None:
            if self.d_in != self.d_out:
                raise ValueError(f"a residual path needs as many outputs as inputs, got {self.d_in} -> {self.d_out}")
            skip = torch.eye(self.d_in, dtype=self.w.dtype, device=self.w.device)
        return replace(self, skip=skip if self.skip is None else self.skip + skip)

    def __add__(self, other: "Layer") -> "Layer":
        """A layer that computes the sum of two layers on the same input."""
        return combined((self, other), (1.0, 1.0))

    def __sub__(self, other: "Layer") -> "Layer":
        """A layer that computes the difference of two layers on the same input."""
        return combined((self, other), (1.0, -1.0))

    def to(self, *args: Any) -> "Layer":
        """The layer in another dtype or on another device, as in `Tensor.to`."""
        values: Any = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: Any = {name: None if x is None else x.to(*args) for name, x in values.items()}
        return Layer(**moved)

    def double(self) -> "Layer":
        """The layer in float64."""
        return self.to(torch.float64)

    def module(self) -> BilinearMLP:
        """The layer as a module with weights of its own, to be run in a model."""
        weights = {"w": (self.w, self.w_bias), "v": (self.v, self.v_bias), "d": (self.d, self.d_bias)}
        if self.skip is not None:
            weights["skip"] = (self.skip, None)
        return BilinearMLP.of(weights, self.norm)


def combined(layers: Sequence[Layer], weights: Sequence[float]) -> Layer:
    """A layer that computes a weighted sum of layers, by setting their neurons side by side.

    Raises:
        ValueError: If they differ in widths or in their norm.
    """
    first = layers[0]
    for other in layers[1:]:
        if (other.d_in, other.d_out) != (first.d_in, first.d_out):
            raise ValueError(
                f"layers {first.d_in} -> {first.d_out} and {other.d_in} -> {other.d_out} differ in their widths"
            )
        if not same_sphere(first.norm, other.norm):
            raise ValueError("layers behind different norms are functions of different coordinates")
    plain = [_without_norm_affine(layer) for layer in layers]

    def stacked(name: str, like: str) -> Tensor | None:
        if all(getattr(one, name) is None for one in plain):
            return None
        return torch.cat([or_zero(getattr(one, name), getattr(one, like)[:, 0]) for one in plain])

    def total(name: str) -> Tensor | None:
        found = None
        for one, weight in zip(plain, weights, strict=True):
            value = getattr(one, name)
            found = found if value is None else added(found, weight * value)
        return found

    return Layer(
        torch.cat([one.w for one in plain]),
        torch.cat([one.v for one in plain]),
        torch.cat([weight * one.d for one, weight in zip(plain, weights, strict=True)], 1),
        stacked("w_bias", "w"),
        stacked("v_bias", "v"),
        total("d_bias"),
        total("skip"),
        plain[0].norm,
    )


def _without_norm_affine(layer: Layer) -> Layer:
    """The same layer with gain and bias of its norm in its weights."""
    norm = layer.norm
    if norm is None or (norm.gain is None and norm.bias is None):
        return layer
    biases = [
        added(b, norm.offset(one)) for b, one in zip((layer.w_bias, layer.v_bias), (layer.w, layer.v), strict=True)
    ]
    return replace(
        layer,
        w=norm.folded(layer.w),
        v=norm.folded(layer.v),
        w_bias=biases[0],
        v_bias=biases[1],
        norm=norm.without_affine(),
    )
