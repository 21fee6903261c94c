"""Normalisation in front of a layer: RMSNorm and LayerNorm, exactly."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bilinear._checks import check_tensor
from bilinear._foreign import output_of, plain, rounding


@dataclass(frozen=True, eq=False)
class Norm:
    r"""RMSNorm or LayerNorm, split into a projection to the norm sphere and an affine map.

    .. math:: \mathrm{norm}(x) = \gamma \circ \hat x + \beta, \qquad \|\hat x\|^2 = d \cdot \frac{s}{s + \epsilon} \le d

    with s the mean square of x (RMSNorm) or of x minus its mean (LayerNorm; then the entries of x-hat sum to 0).

    Attributes:
        kind: "rms" or "layer".
        eps: Added to the mean square; 0 puts x-hat on the sphere itself.
        gain: gamma, (d_in,); None is 1.
        bias: beta, (d_in,); None is 0.
    """

    kind: str
    eps: float = 0.0
    gain: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what is no norm."""
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"kind must be 'rms' or 'layer', got {self.kind!r}")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps must be finite and not negative, got {self.eps}")
        for name in ("gain", "bias"):
            if getattr(self, name) is not None:
                check_tensor(f"norm.{name}", getattr(self, name), (None,))

    def unit(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """x-hat: the input on the norm sphere, before gain and bias. Inputs of length 0 stay 0."""
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        square = x.square().mean(-1, keepdim=True) + self.eps
        # Only where eps is 0 can this be 0, and then x is.
        return x / torch.where(square > 0, square, torch.ones_like(square)).sqrt()

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The normalised input, gain and bias included."""
        x = self.unit(x)
        x = x if self.gain is None else x * self.gain
        return x if self.bias is None else x + self.bias

    def folded(self, weight: Float[Tensor, "hidden d_in"]) -> Float[Tensor, "hidden d_in"]:
        """The weight that acts on x-hat as the given one acts on gain * x-hat; centred for LayerNorm."""
        weight = weight if self.gain is None else weight * self.gain
        return weight - weight.mean(1, keepdim=True) if self.kind == "layer" else weight

    def offset(self, weight: Float[Tensor, "hidden d_in"]) -> Float[Tensor, " hidden"] | None:
        """What the norm's bias adds behind the weight."""
        return None if self.bias is None else weight @ self.bias

    def without_affine(self) -> "Norm":
        """The projection to the sphere alone."""
        return Norm(self.kind, self.eps)

    def to(self, *args: object) -> "Norm":
        """The norm with its tensors on another dtype or device."""
        moved = [None if x is None else x.to(*args) for x in (self.gain, self.bias)]  # type: ignore[arg-type]
        return Norm(self.kind, self.eps, *moved)


def norm_of(module: nn.Module) -> Norm:
    """The norm that a module computes; found by running it on random inputs, large and small.

    Args:
        module: `nn.RMSNorm`, `nn.LayerNorm`, or any module with an epsilon under a usual name that computes one of the
            two, with gain `weight` or, as Gemma's, 1 + `weight`.

    Raises:
        TypeError: For any other module, or one that normalises more than the last dimension.
    """
    shape = getattr(module, "normalized_shape", (0,))
    if len(shape) != 1:
        raise TypeError(f"the norm is over {len(shape)} dimensions, expected the last one alone")
    eps = next((getattr(module, one) for one in ("eps", "variance_epsilon", "epsilon") if hasattr(module, one)), None)
    given = (getattr(module, name, None) for name in ("weight", "bias"))
    gain, bias = (plain(one) if isinstance(one, Tensor) else None for one in given)
    if eps is None:  # nn.RMSNorm's default
        eps = torch.finfo(torch.get_default_dtype() if gain is None else gain.dtype).eps
    for kind in ("rms", "layer"):
        for own in (gain, None if gain is None else 1 + gain):
            found = Norm(kind, float(eps), own, bias)
            if _computes(module, found, len(gain) if gain is not None else shape[0] or 8):
                return found
    raise TypeError(
        f"norm must be an RMSNorm or a LayerNorm, got {type(module).__name__}, which computes neither; "
        "build a bilinear.Norm for your own"
    )


def _computes(module: nn.Module, norm: Norm, width: int) -> bool:
    """Whether a module is a norm, on inputs down to where its eps counts."""
    sizes = torch.tensor([1e-4, 1e-3, 1e-2, 1.0, 10.0])[:, None]
    x = sizes * torch.randn(len(sizes), width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        y = output_of(module, x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return False
    ours = norm.to(torch.float64)(x.to(y.device))
    scale = ours.abs().amax(1, keepdim=True)
    return bool(((y.double() - ours).abs() <= rounding(module) * scale).all())


def same_sphere(a: Norm | None, b: Norm | None) -> bool:
    """Whether two layers' coordinates are the same function of the input."""
    if a is None or b is None:
        return a is b
    return (a.kind, a.eps) == (b.kind, b.eps)
