"""Gains of layer norms, folded into the matrices that read them."""

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from weightdecomp._batches import Batch, call, checked_batch
from weightdecomp._check import check_model, check_module
from weightdecomp._divergence import output_tensor
from weightdecomp._split import matrix, sharing_copy


class _Affine(NamedTuple):
    """What a norm does last: times a gain, plus a shift, in single precision or better."""

    gain: Float[Tensor, " d"]
    shift: Float[Tensor, " d"] | None
    neutral: float  # the value of the weight at which the gain is one


class _Reads(TorchFunctionMode):
    """Which modules read the outputs of norms, and which outputs are used in any other way."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, str] = {}  # id of a tensor -> path of the norm that made it
        self.alive: list[Tensor] = []  # so that no id is given twice
        self.readers: dict[str, list[str]] = {}
        self.calls: dict[str, int] = {}
        self.others: set[str] = set()
        self.inside = 0

    def made(self, path: str, output: Tensor) -> None:
        self.sources[id(output)] = path
        self.alive.append(output)

    def called(self, path: str, x: Any) -> None:
        self.calls[path] = self.calls.get(path, 0) + 1
        if (norm := self.sources.get(id(x))) is not None:
            self.readers.setdefault(norm, []).append(path)
        self.inside += 1

    def left(self) -> None:
        self.inside -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            for value in (*args, *(kwargs or {}).values()):
                if (norm := self.sources.get(id(value))) is not None:
                    self._used(norm, value, result)
        return result

    def _used(self, norm: str, value: Tensor, result: Any) -> None:
        if result is value or not isinstance(result, Tensor | list | tuple) or isinstance(result, torch.Size):
            return
        if isinstance(result, Tensor) and result.data_ptr() == value.data_ptr() and _layout(result) == _layout(value):
            self.made(norm, result)
        else:
            self.others.add(norm)


def _layout(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype


def fold_norms(model: nn.Module, batch: Batch) -> nn.Module:
    """A copy of a model whose layer norms have no gain and no shift of their own where that can be, with equal outputs.

    `W (g * n + b) + c = (W diag(g)) n + (c + W b)`: the gain and shift of a LayerNorm or RMSNorm go into the linear
    modules that read it. That is exact where nothing else reads the norm, as a forward pass on the batch shows; other
    norms, such as those whose output is also the residual stream, stay as they are. A head that is tied to the
    embedding is so no longer. Outputs are equal to rounding: in half precision that is about as far as the model's own
    are from those of its weights in float32.

    Args:
        model: Any module in eval mode; it is not changed. The copy shares what is not folded.
        batch: One batch, to see what reads what.

    Raises:
        ValueError: If `decompose` would refuse the model or the batch, there is no norm that can be folded, or the
            copy's output differs by more than rounding.
        TypeError: For what is no module, or no batch.
    """
    check_module(model)
    batch = checked_batch(batch, model, "batch")
    check_model(model, batch)
    twin = sharing_copy(model)
    modules = dict(twin.named_modules())
    affine = {path: found for path, module in modules.items() if (found := _affine(module)) is not None}
    reads, before = _traced(twin, batch, affine)
    done = [path for path in affine if _foldable(path, reads)]
    if not done:
        raise ValueError("fold_norms: no layer norm is read by linear modules alone; leave the norms as they are")
    for path in done:
        for reader in reads.readers[path]:
            _fold(modules[reader], affine[path])
        _reset(modules[path], affine[path])
    with torch.no_grad():
        difference = float((output_tensor(call(twin, batch)) - before).abs().max() / before.abs().max())
    # The norms of transformers compute in single precision whatever the model's.
    if not difference < max(1e-5, torch.finfo(before.dtype).eps ** 0.75):
        wider = " or load the model in float32" if torch.finfo(before.dtype).bits < 32 else ""
        raise ValueError(f"fold_norms: the output would change by {difference:.1e} of its size; leave the norms{wider}")
    return twin


def _traced(model: nn.Module, batch: Batch, affine: dict[str, _Affine]) -> tuple[_Reads, Tensor]:
    """One forward pass: what reads the norms, and the output."""
    reads, handles = _Reads(), []
    for path, module in model.named_modules():
        if path in affine:
            handles.append(module.register_forward_hook(lambda m, a, y, path=path: reads.made(path, y)))
        elif matrix(module) is not None:
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: reads.called(path, *a[:1])))
            handles.append(module.register_forward_hook(lambda *_: reads.left(), always_call=True))
    try:
        with torch.no_grad(), reads:
            output = output_tensor(call(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    if (norm := reads.sources.get(id(output))) is not None:
        reads.others.add(norm)
    return reads, output


def _foldable(path: str, reads: _Reads) -> bool:
    readers = reads.readers.get(path, [])
    # A module that is called again reads something else there, which its new weight would spoil.
    return bool(readers) and path not in reads.others and all(reads.calls[one] == 1 for one in readers)


def _affine(module: Any) -> _Affine | None:
    """Gain and shift of a norm, whichever way it is written; None for other modules."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    if not named or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    # In half precision rounding would hide what the norm does.
    precise = torch.promote_types(weight.dtype, torch.float32)
    module = copy.deepcopy(module).to(precise)
    x = torch.linspace(-1, 2, 3 * len(weight), dtype=precise, device=weight.device).sin().reshape(3, -1)
    plain = copy.deepcopy(module)
    with torch.no_grad():
        if bias is not None:
            plain.bias.zero_()
        plain.weight.zero_()
        # Gemma's norms multiply by one plus their weight.
        neutral = 0.0 if plain(x).any() else 1.0
        plain.weight.fill_(neutral)
        gain = module.weight.detach() + (1 - neutral)
        shift = None if bias is None else module.bias.detach()
        same = torch.allclose(plain(x) * gain + (0 if shift is None else shift), module(x), rtol=1e-4, atol=1e-5)
    return _Affine(gain, shift, neutral) if same else None


def _fold(module: Any, affine: _Affine) -> None:
    """Put a gain and a shift into a linear module of a copied model."""
    weight = matrix(module)
    assert weight is not None
    with torch.no_grad():
        # Rounded once, at the end.
        folded = (weight * affine.gain).to(weight.dtype)
        if affine.shift is not None:
            moved = weight.to(affine.shift.dtype) @ affine.shift
            own = moved if module.bias is None else module.bias + moved
            module.bias = nn.Parameter(own.to(weight.dtype), requires_grad=weight.requires_grad)
    folded = folded if isinstance(module, nn.Linear) else folded.T.contiguous()
    module.weight = nn.Parameter(folded, requires_grad=weight.requires_grad)


def _reset(module: Any, affine: _Affine) -> None:
    module.weight = nn.Parameter(torch.full_like(module.weight, affine.neutral))
    if affine.shift is not None:
        module.bias = nn.Parameter(torch.zeros_like(module.bias))
