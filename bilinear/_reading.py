"""Reading: layers from modules of other people's models, checked by running them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from bilinear._attention import Attention, BilinearAttention
from bilinear._foreign import output_of, plain, rounding
from bilinear._gated import GatedLayer
from bilinear._layer import Layer
from bilinear._modules import GATES, BilinearMLP, GatedMLP
from bilinear._norm import Norm, norm_of

_SEPARATE = (("w", "v", "d"), ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
_PACKED = (("linear_in", "linear_out"), ("gate_up_proj", "down_proj"), ("w12", "w3"))
_GATES = {
    "silu": "silu", "siluactivation": "silu", "swish": "silu", "relu": "relu",
    "gelu": "gelu", "geluactivation": "gelu",
    "gelutanh": "gelu_tanh", "pytorchgelutanh": "gelu_tanh", "newgeluactivation": "gelu_tanh",
}  # fmt: skip
_PROBES = 8

Read = Layer | GatedLayer | Attention


def read(module: nn.Module, *, gate: str | None = None, shared: bool = True, residual: bool = False) -> Read:
    """The layer that a module computes, in its own dtype; half precision becomes float32.

    Known are `BilinearMLP`, `GatedMLP` and `BilinearAttention` of this package; `nn.Bilinear`; and any module with
    linear maps named w, v, d, or gate_proj, up_proj, down_proj, or w1, w3, w2, or wi_0, wi_1, wo; or packed ([w; v] as
    rows) as linear_in, linear_out, or gate_up_proj, down_proj, or w12, w3. What modules compute is checked on random
    inputs.

    Args:
        module: The module.
        gate: What a foreign module's first map goes through: "silu", "gelu", "gelu_tanh", "relu", or None for nothing.
            By default it is taken from `module.act_fn` (or `.activation_fn`, `.act`, `.activation`) where there is one.
        shared: For `nn.Bilinear`, whether both arguments are the same input; if not, the layer reads both, one after
            the other, as one input.
        residual: Whether the module's output is to be added to its input; not for attention.

    Returns:
        A `Layer`, `GatedLayer` or `Attention`.

    Raises:
        TypeError: For a module of no known kind.
        ValueError: For a module that does not compute what its linear maps suggest, an unknown gate, or an argument
            that is not for modules of this kind.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    if gate is not None and isinstance(module, BilinearAttention | nn.Bilinear | BilinearMLP | GatedMLP):
        raise ValueError(f"gate={gate!r}: what a {type(module).__name__} computes is known; leave gate out")
    if isinstance(module, BilinearAttention):
        if residual:
            raise ValueError("attention is read without a residual path, which stays beside it; leave residual out")
        return _detached(module.attention())
    if isinstance(module, nn.Bilinear):
        return _with_residual(_of_third_order(module, shared), residual)
    found = _of_own(module) if isinstance(module, BilinearMLP | GatedMLP) else _of_named(module, gate)
    _check_by_running(module, found)
    return _with_residual(found, residual)


def read_linears(
    w: nn.Linear,
    v: nn.Linear,
    d: nn.Linear,
    *,
    gate: str | None = None,
    residual: bool = False,
    norm: nn.Module | Norm | None = None,
) -> Layer | GatedLayer:
    """A layer from its three linear maps, biases included.

    Args:
        w: d_in to hidden, the gated one.
        v: d_in to hidden.
        d: hidden to d_out.
        gate: "silu", "gelu", "gelu_tanh", "relu", or None for a bilinear layer.
        residual: Whether the input is added to the output.
        norm: The norm in front of w and v; the residual path goes around it.
    """
    return _finished(_of_linears(w, v, d), gate, residual, norm)


def read_packed(
    packed: nn.Linear,
    d: nn.Linear,
    *,
    gate: str | None = None,
    residual: bool = False,
    norm: nn.Module | Norm | None = None,
) -> Layer | GatedLayer:
    """A layer whose w and v are the upper and lower half of one linear map; arguments as in `read_linears`.

    Raises:
        ValueError: If the packed map has an odd number of outputs.
    """
    return _finished(_of_packed(packed, d), gate, residual, norm)


def _finished(layer: Layer, gate: str | None, residual: bool, norm: nn.Module | Norm | None) -> Layer | GatedLayer:
    normed = norm_of(norm) if isinstance(norm, nn.Module) else norm
    layer = Layer(layer.w, layer.v, layer.d, layer.w_bias, layer.v_bias, layer.d_bias, None, normed)
    layer = layer.with_skip() if residual else layer
    return layer if gate is None else GatedLayer(layer, gate)


def _check_linears(**given: object) -> None:
    for name, one in given.items():
        if not isinstance(one, nn.Linear):
            raise TypeError(f"{name} must be an nn.Linear, got {type(one).__name__}")


def _of_linears(w: nn.Linear, v: nn.Linear, d: nn.Linear) -> Layer:
    _check_linears(w=w, v=v, d=d)
    weights = [plain(one.weight) for one in (w, v, d)]
    return Layer(*weights, *(plain(one.bias) for one in (w, v, d)))  # type: ignore[arg-type]


def _of_packed(packed: nn.Linear, d: nn.Linear) -> Layer:
    _check_linears(packed=packed, d=d)
    weight, bias = plain(packed.weight), plain(packed.bias)
    assert weight is not None
    if len(weight) % 2:
        raise ValueError(f"a packed map holds w over v and has an even number of outputs, got {len(weight)}")
    w, v = weight.chunk(2)
    w_bias, v_bias = (None, None) if bias is None else bias.chunk(2)
    return Layer(w, v, plain(d.weight), w_bias, v_bias, plain(d.bias))  # type: ignore[arg-type]


def _of_third_order(module: nn.Bilinear, shared: bool) -> Layer:
    """Each output's matrix A as neurons (row i of A against coordinate i), rank by rank where that is fewer."""
    a, bias = plain(module.weight), plain(module.bias)
    assert a is not None
    n, d_left, d_right = a.shape
    if shared and d_left != d_right:
        raise ValueError(
            f"nn.Bilinear reads inputs of widths {d_left} and {d_right}, which cannot be one; pass shared=False"
        )
    d_in = d_left if shared else d_left + d_right
    w, v = a.new_zeros(n * d_left, d_in), a.new_zeros(n * d_left, d_in)
    w[:, :d_left] = torch.eye(d_left).to(a).repeat(n, 1)
    v[:, d_in - d_right :] = a.reshape(n * d_left, d_right)
    d = torch.eye(n).to(a).repeat_interleave(d_left, 1)
    return Layer(w, v, d, d_bias=bias)


def _of_own(module: BilinearMLP | GatedMLP) -> Layer | GatedLayer:
    layer = _of_linears(module.w, module.v, module.d)
    if isinstance(module, GatedMLP):
        if module.sharpness != 1:
            raise ValueError(f"the gate is annealed to sharpness {module.sharpness:g}, which is no gate by name")
        return GatedLayer(layer, module.gate)
    if module.norm is not None:
        norm = module.norm.norm() if hasattr(module.norm, "norm") else norm_of(module.norm)  # type: ignore[operator]
        layer = Layer(layer.w, layer.v, layer.d, layer.w_bias, layer.v_bias, layer.d_bias, None, norm)
    if isinstance(module.skip, nn.Linear):
        return layer.with_skip(plain(module.skip.weight))
    return layer if module.skip is None else layer.with_skip()


def _of_named(module: nn.Module, gate: str | None) -> Layer | GatedLayer:
    for names in _SEPARATE + _PACKED:
        found: Sequence[Any] = [getattr(module, name, None) for name in names]
        if all(isinstance(one, nn.Linear) for one in found):
            layer = _of_linears(*found) if len(found) == 3 else _of_packed(*found)
            name = gate if gate is not None else _activation(module)
            return layer if name is None else GatedLayer(layer, name)
    children = [name for name, _ in module.named_children()] or "none"
    raise TypeError(
        f"{type(module).__name__} is no bilinear or gated layer that is known: its children are {children}, expected "
        f"linear maps named as in one of {[*_SEPARATE, *_PACKED]}; use bilinear.read_linears(w, v, d) for other names"
    )


def _activation(module: nn.Module) -> str | None:
    """The gate by the name of the module's activation, or None where it has none."""
    for name in ("act_fn", "activation_fn", "act", "activation"):
        function = getattr(module, name, None)
        if function is None or isinstance(function, nn.Identity):
            continue
        called = getattr(function, "__name__", type(function).__name__).lower()
        if called not in _GATES:
            raise ValueError(f"{name} of the module is {called!r}; pass gate= one of {', '.join(map(repr, GATES))}")
        return "gelu_tanh" if getattr(function, "approximate", "none") == "tanh" else _GATES[called]
    return None


@torch.no_grad()
def _check_by_running(module: nn.Module, found: Layer | GatedLayer) -> None:
    """Refuse a module that computes something else than was read from it.

    Raises:
        ValueError: With the size of the difference.
    """
    layer = found.full if isinstance(found, GatedLayer) else found
    x = torch.randn(_PROBES, layer.d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        y = output_of(module, x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{type(module).__name__} cannot be run on inputs (..., {layer.d_in}): {error}") from error
    ours = found(x.to(layer.w))
    if not isinstance(y, Tensor) or y.shape != ours.shape:
        raise ValueError(f"{type(module).__name__} does not map (..., {layer.d_in}) to (..., {layer.d_out})")
    error = float((y.to(ours) - ours).abs().max() / ours.abs().max().clamp_min(1e-30))
    if not error <= rounding(module):
        kind = f"d({found.gate}(w x) * (v x))" if isinstance(found, GatedLayer) else "d((w x) * (v x))"
        raise ValueError(
            f"{type(module).__name__} does not compute {kind}: on random inputs it differs by {error:.1e} of its size; "
            "pass gate= if it is gated, or use bilinear.read_linears with the norm and residual path that it has"
        )


def _detached(attention: Attention) -> Attention:
    values: dict[str, Any] = {one.name: getattr(attention, one.name) for one in fields(attention)}
    detached: Any = {name: plain(x) if isinstance(x, Tensor) else x for name, x in values.items()}
    return Attention(**detached)


def _with_residual(found: Any, residual: bool) -> Any:
    if not residual:
        return found
    if isinstance(found, GatedLayer):
        return GatedLayer(found.full.with_skip(), found.gate)
    return found.with_skip()
