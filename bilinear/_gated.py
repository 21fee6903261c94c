"""Gated layers: their exact split into one half bilinear and a bounded remainder."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_inputs
from bilinear._layer import Layer
from bilinear._modules import GatedMLP, check_gate, odd_part

_HALF_WIDTH = (2 / torch.pi) ** 0.5  # slope at 0 of erf(z / sqrt 2), and of its approximation by tanh


class BilinearShare(NamedTuple):
    """How bilinear a gated layer is on data: every figure is exact on the given inputs.

    Attributes:
        n_inputs: Inputs measured on.
        output: Mean squared length of the gated products' output, without its constant and skip path.
        bilinear: That of the bilinear half.
        remainder: That of the remainder; the two parts may correlate.
        explained: 1 - E|y - b|^2 / E|y|^2 for the bilinear half b: 1 for a bilinear layer, and possibly negative.
        scaled: The same with the best single factor on b.
        factor: That factor; 2 where the gate is always wide open, 1 where it is always at its middle.
        bound: Mean squared bound on the remainder, over the mean square of y; above `1 - explained`.
        per_output: `explained` of every output by itself.
    """

    n_inputs: int
    output: float
    bilinear: float
    remainder: float
    explained: float
    scaled: float
    factor: float
    bound: float
    per_output: Float[Tensor, " d_out"]

    def __str__(self) -> str:
        """The figures as text."""
        return (
            f"on {self.n_inputs} inputs the bilinear half explains {self.explained:.1%} of the output's energy, "
            f"{self.scaled:.1%} if scaled by {self.factor:.3f}; remainder {self.remainder / (self.output or 1):.1%}, "
            f"certified to be at most {self.bound:.1%}"
        )


@dataclass(frozen=True, eq=False)
class GatedLayer:
    r"""SwiGLU, GEGLU or ReGLU, y = d[gate(w z + w_bias) * (v z + v_bias)] + ..., as half a bilinear layer and the rest.

    .. math:: \mathrm{gate}(z) = \tfrac z2 + \tfrac z2\, o(z), \qquad |o(z)| \le 1 \text{ and odd}

    Attributes:
        full: The bilinear layer with the same weights, whose gate is z itself.
        gate: "silu", "gelu" (the exact one, by erf), "gelu_tanh" (its approximation by tanh) or "relu".

    Source:
        The split and its certificate are ours.
    """

    full: Layer
    gate: str

    def __post_init__(self) -> None:
        """Refuse gates without a split."""
        check_gate(self.gate)

    def __call__(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        """The gated layer's output on inputs (..., d_in)."""
        return self.bilinear(x) + self.remainder(x)

    @property
    def bilinear(self) -> Layer:
        """The bilinear half, exactly: constant and skip path belong to it."""
        full = self.full
        return Layer(
            full.w, full.v, full.d / 2, full.w_bias, full.v_bias, full.d_bias, full.skip, full.norm
        )  # fmt: skip

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        full = self.full
        check_inputs("x", x, full.d_in, full.w)
        z = x if full.norm is None else full.norm(x)
        linear = torch.nn.functional.linear
        return linear(z, full.w, full.w_bias), linear(z, full.v, full.v_bias)

    def remainder(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        """What the bilinear half leaves: d[odd part of the gate * v x]."""
        z, up = self._operands(x)
        return (odd_part(self.gate, z) * up) @ self.full.d.T

    def bound(self, x: Tensor) -> Float[Tensor, "*batch d_out"]:
        r"""A bound on |remainder| of each output: :math:`\sum_a |d_{ua}|\, b(z_a)\, |v_a x|`.

        b(z) is min(z^2/4, |z|/2) for SiLU, min(z^2/sqrt(2 pi), |z|/2) for both GELUs, and |z|/2 for ReLU.
        """
        z, up = self._operands(x)
        most = z.abs() / 2
        if self.gate == "silu":
            most = torch.minimum(most, z.square() / 4)
        if self.gate in ("gelu", "gelu_tanh"):
            most = torch.minimum(most, z.square() * (_HALF_WIDTH / 2))
        return (most * up.abs()) @ self.full.d.abs().T

    @torch.no_grad()
    def share(self, x: Tensor) -> BilinearShare:
        """How bilinear the layer is on the given inputs (..., d_in).

        Raises:
            ValueError: If there are no inputs.
        """
        x = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x[None]
        if not len(x):
            raise ValueError("x is empty; the share is measured on data")
        z, up = self._operands(x)
        half = ((z / 2 * up) @ self.full.d.T).double()
        rest, bound = self.remainder(x).double(), self.bound(x).double()
        y = half + rest
        energy = float(y.square().sum(1).mean())
        per_output = y.square().mean(0)
        own = float(half.square().sum(1).mean())
        cross = float((half * y).sum(1).mean())
        factor = cross / own if own else 0.0
        scale = energy or 1.0
        return BilinearShare(
            n_inputs=len(x),
            output=energy,
            bilinear=own,
            remainder=float(rest.square().sum(1).mean()),
            explained=1 - float(rest.square().sum(1).mean()) / scale,
            scaled=factor * cross / scale,
            factor=factor,
            bound=float(bound.square().sum(1).mean()) / scale,
            per_output=1 - rest.square().mean(0) / torch.where(per_output > 0, per_output, 1),
        )

    def module(self) -> GatedMLP:
        """The layer as a module whose gate can be annealed.

        Raises:
            ValueError: For a layer with a norm or a skip path, which stay outside of this module.
        """
        full = self.full
        if full.norm is not None or full.skip is not None:
            raise ValueError("GatedMLP has neither norm nor skip path; keep them beside it in the model")
        with torch.device("meta"):
            module = GatedMLP(full.d_in, full.hidden, full.d_out, gate=self.gate)
        module = module.to_empty(device=full.w.device)
        for name in ("w", "v", "d"):
            linear, bias = getattr(module, name), getattr(full, f"{name}_bias")
            linear.weight = torch.nn.Parameter(getattr(full, name).detach().clone())
            linear.bias = None if bias is None else torch.nn.Parameter(bias.detach().clone())
        return module.eval()
