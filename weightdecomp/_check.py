"""Checks of what the user passes, before any work is done."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from weightdecomp._batches import Batch, call, named_parts, read_batches, select, tensors
from weightdecomp._divergence import Divergence, choose, output_tensor
from weightdecomp._pretrained import Pretrained
from weightdecomp._processes import ProcessLost

_STOCHASTIC = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RReLU,
    parametrizations._SpectralNorm,
)

_AS_TAKEN = (
    "pass batches as the model takes them (a tensor, a tuple of positional arguments, or a dict of keyword arguments, "
    "with its dtypes)"
)
# What a model raises on inputs that it was not made for.
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance outside (0, 1)."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise ValueError(
            f"tolerance must be between 0 and 1 (a share of the damage of ablating everything), got {tolerance!r}"
        )


def check_seed(seed: object) -> None:
    """Refuse a seed that torch does not take."""
    if not isinstance(seed, Integral):
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    if not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed must be from -2^63 to 2^64 - 1, got {seed}")


def check_finite(model: nn.Module) -> None:
    """Refuse weights with NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"parameter {name!r} contains NaN or infinity; decompose a checkpoint with finite weights")


def check_module(model: object) -> None:
    """Refuse what is no module, before anything is asked of it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def checked(
    model: nn.Module, batches: Iterable[Batch], tolerance: float, divergence: str | Callable[[Any, Any], Tensor]
) -> tuple[list[Batch], Divergence]:
    """The inputs, read and checked together with the model and the tolerance, and how outputs are compared."""
    check_module(model)
    check_tolerance(tolerance)
    kept = read_batches(batches, model)
    output = check_model(model, kept[0])
    _check_ids(model, kept)
    return kept, choose(divergence, output, scores_ids(model, kept[0]))


def scores_ids(model: nn.Module, batch: Batch) -> bool:
    """Whether a model is given token ids, and nothing says that it returns an embedding of them."""
    return not (tensors(batch)[0].is_floating_point() or isinstance(model, Pretrained) and model.embeds)


def check_model(model: nn.Module, batch: Batch) -> Any:
    """Refuse a model that cannot be decomposed, and return its output on one batch.

    Raises:
        ValueError: For training mode with dropout or batch statistics, NaN or infinity in weights or outputs, inputs
            of a type the model cannot take, outputs that change between identical calls, or a first axis that does
            not count inputs.
        TypeError: For outputs that hold no tensor.
    """
    for path, module in model.named_modules():
        active = module.training and isinstance(module, _STOCHASTIC) and getattr(module, "p", 1) > 0
        if active or (module.training and getattr(module, "dropout", 0) and isinstance(module, nn.MultiheadAttention)):
            raise ValueError(
                f"model is in training mode: {path or 'it'!r} ({type(module).__name__}) is random or uses batch "
                "statistics there; call model.eval() first"
            )
    check_finite(model)
    device = tensors(batch)[0].device
    # A model that draws random numbers is found out here, and the caller's generators stay as they were.
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        output = called(model, batch, "the model fails on the first batch", _AS_TAKEN)
        first, second = output_tensor(output), output_tensor(call(model, batch))
        called(
            model,
            select(batch, torch.arange(1, device=device)),
            "the model fails on the first input of the first batch alone",
            "the first axis of every tensor must count inputs",
        )
    if not first.is_floating_point():
        raise ValueError(
            f"the model's output is {first.dtype}, expected floating point; wrap the model to return its scores, "
            "before any rounding or argmax"
        )
    if not torch.isfinite(first).all():
        raise ValueError("the model's output on the first batch contains NaN or infinity; check the inputs' scale")
    if not torch.equal(first, second):
        raise ValueError(
            "the model's output changes between identical calls, so no ablation can be measured; "
            "call model.eval() and remove sampling or state from forward"
        )
    return output


def _check_ids(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Refuse ids that an embedding has no row for, in whichever batch, at the cost of one input's forward pass."""
    tables = _tables(model, select(batches[0], torch.arange(1, device=tensors(batches[0])[0].device)))
    for index, batch in enumerate(batches):
        for name, x in named_parts(batch):
            if name not in tables or not isinstance(x, Tensor) or not x.numel():
                continue
            path, rows = tables[name]
            least, largest = int(x.min()), int(x.max())
            if least < 0 or largest >= rows:
                raise ValueError(
                    f"batches[{index}] holds ids from {least} to {largest}, but the embedding {path!r} has rows for 0 "
                    f"to {rows - 1}; the data and the model must belong together"
                )


def _tables(model: nn.Module, batch: Batch) -> dict[str, tuple[str, int]]:
    """For parts of a batch that an embedding reads as they came, the smallest such embedding and its rows."""
    ids = [(name, x) for name, x in named_parts(batch) if isinstance(x, Tensor) and not x.is_floating_point()]
    found: dict[str, tuple[str, int]] = {}

    def note(path: str, table: Any, args: tuple) -> None:
        for name, x in ids:
            # A view of all of it, as transformers make, is the part too.
            same = args and x.data_ptr() == args[0].data_ptr() and x.numel() == args[0].numel()
            if same and (name not in found or table.num_embeddings < found[name][1]):
                found[name] = (path, table.num_embeddings)

    handles = [
        module.register_forward_pre_hook(partial(note, path))
        for path, module in model.named_modules()
        if ids and isinstance(module, nn.Embedding)
    ]
    try:
        if handles:
            with torch.no_grad():
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def unreadable_named(model: nn.Module, batches: Sequence[Batch], name: str = "batches") -> Iterator[None]:
    """Name the batch that the model fails on by itself, where that is why something fails.

    Batches are first run at different times; they are all run here only once something has failed.

    Args:
        model: The target.
        batches: All of them.
        name: Of the argument that they are; one that holds a single batch is named without a number.

    Raises:
        ValueError: Instead of what the model raises.
    """
    try:
        yield
    except (torch.OutOfMemoryError, ProcessLost):  # no batch is to blame
        raise
    except _FAILURES:
        for index, batch in enumerate(batches):
            with torch.no_grad():
                place = f"{name}[{index}]" if len(batches) > 1 or name == "batches" else name
                called(model, batch, f"the model fails on {place}", _AS_TAKEN.replace("batches", name))
        raise


def called(model: nn.Module, batch: Batch, what: str, fix: str) -> Any:
    """A model's output on one batch.

    Raises:
        ValueError: Saying what failed, why, and what to do, where the model fails on it.
    """
    try:
        return call(model, batch)
    except _FAILURES as error:
        ids = _integers(batch) if isinstance(error, IndexError) else ""
        raise ValueError(f"{what}: {error}{ids}; {fix}") from error


def _integers(batch: Batch) -> str:
    """What integers a batch has, where an embedding has no row for one."""
    found = [x for x in tensors(batch) if not x.is_floating_point() and x.numel()]
    if not found:
        return ""
    least, largest = min(int(x.min()) for x in found), max(int(x.max()) for x in found)
    return f" (token ids beyond the vocabulary? the integers in it go from {least} to {largest})"
