"""Batches: what the user passes as sample inputs, read once and cut into the sizes the engine wants."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from weightdecomp._pretrained import Pretrained
from weightdecomp._processes import Processes

Batch = Any  # a tensor, a tuple of positional arguments, or a dict of keyword arguments

_MOST_INPUTS = 32_768  # an endless iterator is read up to here; a collection is read whole


def call(model: nn.Module, batch: Batch) -> Any:
    """Run the model on one batch: a tensor, positional arguments or keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch in a fixed order."""
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, Tensor)]


def size(batch: Batch) -> int:
    """Number of inputs in a batch: the first axis of its first tensor."""
    return len(tensors(batch)[0])


def select(batch: Batch, index: Tensor) -> Batch:
    """Some inputs of a batch."""
    return _mapped(batch, lambda x: x[index] if _per_input(x, batch) else x)


def unpadded(batch: Batch) -> Bool[Tensor, "input position"] | None:
    """Which positions hold a token, as the batch's `attention_mask` says; None where it does not, or all do."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all() else None


def without_padding(rows: Float[Tensor, "*batch n"], held: Bool[Tensor, "input position"] | None) -> Tensor:
    """The same with zeros at padded positions, where its rows are positions of inputs."""
    return rows if held is None or rows.shape[:2] != held.shape else rows * held[..., None]


def share(batch: Batch, processes: Processes) -> Batch:
    """This process's inputs of a batch."""
    return batch if processes.alone else select(batch, processes.indices(size(batch)).to(tensors(batch)[0].device))


def _per_input(x: Tensor, batch: Batch) -> bool:
    return x.ndim > 0 and len(x) == size(batch)


def _mapped(batch: Batch, function: Any) -> Batch:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: function(x) if isinstance(x, Tensor) else x for key, x in batch.items()}
    return tuple(function(x) if isinstance(x, Tensor) else x for x in batch)


def checked_batch(batch: Batch, model: nn.Module, name: str) -> Batch:
    """One batch for a model, under the name that the user knows it by, without gradients.

    Raises:
        ValueError: As `read_batches`.
        TypeError: For something that is no batch.
    """
    if not isinstance(batch, Tensor | Mapping | tuple | list):
        raise TypeError(f"{name} must be a tensor, a tuple or a dict of them, got {type(batch).__name__}")
    found = tensors(batch)
    if not found or found[0].ndim == 0 or len(found[0]) == 0:
        raise ValueError(f"{name} holds no inputs; every batch needs a tensor with a non-empty first axis")
    parameter = next(model.parameters(), None)
    for x in found:
        if parameter is not None and x.device != parameter.device:
            raise ValueError(
                f"{name} is on {x.device} but the model is on {parameter.device}; "
                f"move the batch with .to({str(parameter.device)!r})"
            )
        if x.is_meta:
            raise ValueError(f"{name} and the model are on the meta device, which holds no values; load them")
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise ValueError(f"{name} contains NaN or infinity; drop or repair those inputs")
    if isinstance(model, Pretrained):
        model.check_batch(batch, name)
    return _mapped(batch, torch.Tensor.detach)


def read_batches(batches: Iterable[Batch], model: nn.Module) -> list[Batch]:
    """Read sample inputs once, checked.

    A collection (list, DataLoader) is read whole; an iterator, which may be endless, up to 32,768 inputs.

    Raises:
        ValueError: For no batches, empty ones, NaN or infinity, another device than the model's, or token ids that a
            `Pretrained` model cannot read.
        TypeError: For something that is not batches.
    """
    if isinstance(batches, Tensor | Mapping):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}; write [batch]")
    endless = iter(batches) is batches
    kept: list[Batch] = []
    n = 0
    for index, batch in enumerate(batches):
        kept.append(checked_batch(batch, model, f"batches[{index}]"))
        n += size(kept[-1])
        if endless and n >= _MOST_INPUTS:
            break
    if not kept:
        raise ValueError("batches is empty; pass at least one batch of sample inputs")
    return kept


def joined(batches: Sequence[Batch]) -> list[Batch]:
    """One batch of all inputs where their shapes allow it, else the batches as they are."""
    first = batches[0]
    layouts = {_layout(batch) for batch in batches}
    if len(batches) == 1 or len(layouts) > 1 or isinstance(first, Mapping | tuple | list) and _odd(batches):
        return list(batches)
    columns = (torch.cat(column) for column in zip(*(tensors(batch) for batch in batches), strict=True))
    return [_mapped(first, lambda _: next(columns))]


def _layout(batch: Batch) -> tuple:
    names = tuple(batch) if isinstance(batch, Mapping) else ()
    return (type(batch).__name__, names, tuple((x.shape[1:], x.dtype) for x in tensors(batch)))


def _odd(batches: Sequence[Batch]) -> bool:
    """Whether some part of some batch is not one row an input."""
    return any(
        not isinstance(x, Tensor) or not _per_input(x, batch)
        for batch in batches
        for x in (batch.values() if isinstance(batch, Mapping) else batch)
    )


def split(batches: Sequence[Batch], inputs: int) -> list[Batch]:
    """The same inputs in order, in batches of at most the given number."""
    parts: list[Batch] = []
    for batch in batches:
        index = torch.arange(size(batch), device=tensors(batch)[0].device)
        parts += [select(batch, piece) for piece in index.split(inputs)] if size(batch) > inputs else [batch]
    return parts


def digest(batches: Sequence[Batch]) -> str:
    """A fingerprint of all inputs, to recognise a resumed run's data."""
    sha = hashlib.sha256()
    for batch in batches:
        for name, x in named_parts(batch):
            if not isinstance(x, Tensor):
                sha.update(f"{name}={x!r};".encode())
                continue
            sha.update(f"{name}:{x.dtype}{tuple(x.shape)}".encode())
            sha.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return sha.hexdigest()


def named_parts(batch: Batch) -> list[tuple[str, Any]]:
    """All that a batch hands to the model, by name or position; the order of a dict does not matter."""
    if isinstance(batch, Mapping):
        return sorted(batch.items())
    return [(str(i), x) for i, x in enumerate([batch] if isinstance(batch, Tensor) else batch)]
