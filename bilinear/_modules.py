"""Modules: the bilinear MLP and the gated MLP whose gate can be annealed away."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bilinear._norm import Norm

GATES = ("silu", "gelu", "gelu_tanh", "relu")


class NormModule(nn.Module):
    """A norm as a module, so that it follows its model's device and dtype."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.kind, self.eps = norm.kind, norm.eps
        self.register_buffer("gain", norm.gain)
        self.register_buffer("bias", norm.bias)

    def norm(self) -> Norm:
        """The norm with its present tensors."""
        return Norm(self.kind, self.eps, self.get_buffer("gain"), self.get_buffer("bias"))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The normalised input."""
        return self.norm()(x)


class BilinearMLP(nn.Module):
    """y = d((w z) * (v z)) + skip(x), z = norm(x): the bilinear MLP.

    Attributes:
        w: Linear, d_in to hidden.
        v: Linear, d_in to hidden.
        d: Linear, hidden to d_out.
        skip: Linear from the raw input, the identity for a residual path, or None.
        norm: Norm in front, or None.
    """

    def __init__(
        self,
        d_in: int,
        hidden: int,
        d_out: int | None = None,
        *,
        bias: bool = False,
        residual: bool = False,
        norm: nn.Module | None = None,
    ) -> None:
        """Weights as torch draws them for linear layers.

        Args:
            d_in: Width of the input.
            hidden: Number of products.
            d_out: Width of the output; that of the input by default.
            bias: Whether the three linear maps have biases.
            residual: Add the input to the output.
            norm: `nn.RMSNorm`, `nn.LayerNorm` or `NormModule` in front of both maps (not of the residual path).

        Raises:
            ValueError: For a residual path between different widths.
        """
        super().__init__()
        d_out = d_in if d_out is None else d_out
        if residual and d_in != d_out:
            raise ValueError(f"a residual path needs as many outputs as inputs, got {d_in} -> {d_out}")
        self.w = nn.Linear(d_in, hidden, bias)
        self.v = nn.Linear(d_in, hidden, bias)
        self.d = nn.Linear(hidden, d_out, bias)
        self.skip: nn.Module | None = nn.Identity() if residual else None
        self.norm = norm

    @classmethod
    def of(cls, weights: dict[str, tuple[Tensor, Tensor | None]], norm: Norm | None) -> "BilinearMLP":
        """One with copies of given weights and biases of w, v, d and perhaps skip, in evaluation mode."""
        (hidden, d_in), d_out = weights["w"][0].shape, len(weights["d"][0])
        module = cls.empty(d_in, hidden, d_out).to(weights["w"][0])
        if "skip" in weights:
            module.skip = nn.Linear(d_in, d_out, bias=False, device="meta")
        for name, (weight, bias) in weights.items():
            linear = getattr(module, name)
            linear.weight = nn.Parameter(weight.detach().clone())
            linear.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        module.norm = None if norm is None else NormModule(norm)
        return module.eval()

    @classmethod
    def empty(cls, d_in: int, hidden: int, d_out: int) -> "BilinearMLP":
        """One with uninitialised weights, which draws nothing from the global random state."""
        with torch.device("meta"):
            module = cls(d_in, hidden, d_out)
        return module.to_empty(device="cpu")

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The layer's output."""
        z = x if self.norm is None else self.norm(x)
        y = self.d(self.w(z) * self.v(z))
        return y if self.skip is None else y + self.skip(x)


class GatedMLP(nn.Module):
    r"""y = d(gate(w x) * (v x)): SwiGLU, GEGLU or ReGLU, with a sharpness that anneals the gate to a linear one.

    .. math:: \mathrm{gate}_\beta(z) = z/2 + \mathrm{odd}_\beta(z), \quad
        \mathrm{odd}_\beta(z) = \tfrac z2 \tanh(\beta z / 2),\ \tfrac z2 \mathrm{erf}(\beta z / \sqrt 2),\ \beta |z| / 2

    "gelu_tanh" is torch's GELU with `approximate="tanh"`. Sharpness 1 is the usual gate; at 0 the layer is half of the
    bilinear one.

    Source:
        Swish with beta annealed to 0: Pearce et al. (arXiv 2410.08417), appendix J; the other two gates are ours.
    """

    def __init__(self, d_in: int, hidden: int, d_out: int | None = None, *, gate: str = "silu", bias: bool = False):
        """Weights as torch draws them for linear layers.

        Raises:
            ValueError: For an unknown gate.
        """
        super().__init__()
        check_gate(gate)
        self.gate, self.sharpness = gate, 1.0
        self.w = nn.Linear(d_in, hidden, bias)
        self.v = nn.Linear(d_in, hidden, bias)
        self.d = nn.Linear(hidden, d_in if d_out is None else d_out, bias)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The layer's output at the present sharpness."""
        z = self.w(x)
        return self.d((z / 2 + odd_part(self.gate, z, self.sharpness)) * self.v(x))


def check_gate(gate: object) -> None:
    """Refuse a gate that has no split.

    Raises:
        ValueError: Naming the gates that have one.
    """
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}, got {gate!r}")


def odd_part(gate: str, z: Float[Tensor, "*n"], sharpness: float = 1.0) -> Float[Tensor, "*n"]:
    """What a gate is besides z/2: z/2 times an odd function between -1 and 1, hence even and not negative."""
    if gate == "silu":
        return z / 2 * torch.tanh(sharpness * z / 2)
    if gate == "gelu":
        return z / 2 * torch.erf(sharpness * z / 2**0.5)
    if gate == "gelu_tanh":
        sharp = sharpness * z
        return z / 2 * torch.tanh((2 / torch.pi) ** 0.5 * (sharp + 0.044715 * sharp**3))
    return sharpness * z.abs() / 2
