"""The user's own model, data and divergence, found by the names that the command line is given."""

import importlib
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightdecomp._batches import Batch
from weightdecomp._weights import read_weights

_LISTED = 5  # names in one message


def loaded_model(name: str, weights: str | Path | None = None) -> nn.Module:
    """The model that a factory makes, in eval mode, with the weights of a safetensors file.

    Args:
        name: `package.module:factory`; the factory is called without arguments.
        weights: A safetensors file with exactly the model's weights; None keeps those that the factory gave.

    Raises:
        ValueError: If the name leads nowhere, the factory fails, or the weights are a pickle or do not fit.
        TypeError: If the name is no function, or the factory returns no module.
    """
    model = _called(name, "--model", "a function or class that makes the model")
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model: {name!r} returned {_kind(model)}, expected a torch.nn.Module")
    if weights is not None:
        _fill(model, read_weights(Path(weights)), weights)
    return model.eval()


def loaded_batches(name: str) -> Iterable[Batch]:
    """The batches that a function returns; `decompose` checks what is in them.

    Args:
        name: `package.module:function`; it is called without arguments.

    Raises:
        ValueError: If the name leads nowhere, or the function or the reading of its batches fails.
        TypeError: If the name is no function, or what it returns cannot be iterated over.
    """
    batches = _called(name, "--data", "a function that returns batches")
    if not isinstance(batches, Iterable):
        raise TypeError(f"--data: {name!r} returned {_kind(batches)}, expected an iterable of batches")
    if isinstance(batches, Tensor | Mapping):
        raise TypeError(f"--data: {name!r} returned one batch ({_kind(batches)}), expected several; return [batch]")
    read = _read(batches, name)
    # Only an iterator may be endless, which `decompose` reads no further than it needs.
    return read if iter(batches) is batches else list(read)


def _read(batches: Iterable[Batch], name: str) -> Iterator[Batch]:
    """The user's batches, one by one."""
    try:
        yield from batches
    except Exception as error:  # the user's code may raise anything; the message says where
        raise ValueError(f"--data: reading the batches of {name!r} failed: {_told(error)}") from error


def loaded_labels(name: str) -> Tensor:
    """The classes that a function returns, one an input.

    Args:
        name: `package.module:function`; it is called without arguments.

    Raises:
        ValueError: If the name leads nowhere or the function fails.
        TypeError: If it returns no one-dimensional tensor of integers.
    """
    labels = _called(name, "--labels", "a function that returns the classes of the inputs")
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        raise TypeError(f"--labels: {name!r} returned {_kind(labels)}, expected a tensor of one integer an input")
    return labels


def loaded_divergence(name: str) -> str | Callable[[Any, Any], Tensor]:
    """The name of a built-in divergence as it is, or the user's own `package.module:function`.

    Raises:
        ValueError: If the name leads nowhere.
        TypeError: If it is no function.
    """
    return _function(name, "--divergence", "a function of two outputs") if ":" in name else name


def _called(name: str, flag: str, expected: str) -> Any:
    """What the user's function returns."""
    function = _function(name, flag, expected)
    try:
        return function()
    except Exception as error:  # the user's code may raise anything; the message says where
        raise ValueError(f"{flag}: calling {name!r} failed: {_told(error)}") from error


def _function(name: str, flag: str, expected: str) -> Callable[..., Any]:
    found = _named(name, flag)
    if not callable(found):
        raise TypeError(f"{flag}: {name!r} is {_kind(found)}, expected {expected}")
    return found


def _named(name: str, flag: str) -> Any:
    """The object at `package.module:attribute`."""
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(f"{flag} must look like package.module:name, got {name!r}")
    found = _module(module_name, flag)
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), n=3, cutoff=0.5)
            hint = f"; did you mean one of {near}?" if near else ""
            raise ValueError(f"{flag}: {module_name!r} has no {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def _module(name: str, flag: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(f"{flag}: importing {name!r} failed: {_told(error)}") from error
        raise ValueError(
            f"{flag}: there is no module {name!r}; write it as in an import statement, and run the command "
            f"in the folder that holds it (this one is '{os.getcwd()}')"
        ) from error
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ValueError(f"{flag}: importing {name!r} failed: {_told(error)}") from error


def _told(error: Exception) -> str:
    """An exception of the user's code in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{at}"


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _fill(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Put weights into a model, all of them and nothing else.

    Raises:
        ValueError: For missing or unexpected names, shapes or types, and for tied weights that differ.
    """
    own = model.state_dict(keep_vars=True)
    # A tied weight has several names, of which a file of tensors that share no memory keeps one.
    covered = {id(value) for name, value in own.items() if name in weights}
    missing = [name for name, value in own.items() if id(value) not in covered]
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    whole = [
        f"{name} is {weights[name].dtype}, expected floating point"
        for name, value in own.items()
        if name in weights and value.is_floating_point() and not weights[name].is_floating_point()
    ]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "of another type": whole,
        "one parameter of the model, but not the same": [] if shapes else _untied(own, weights),
    }
    complaints = [f"{what}: {_some(names)}" for what, names in kinds.items() if names]
    if complaints:
        raise ValueError(
            f"--weights: '{path}' does not fit the model ({'; '.join(complaints)}); "
            "give the weights of the architecture that --model makes, under its own names"
        )
    # A model made on the meta device has no memory to copy into.
    on_meta = any(value.is_meta for value in own.values() if isinstance(value, Tensor))
    with torch.no_grad():
        model.load_state_dict(weights, strict=False, assign=on_meta)


def _untied(own: dict[str, Tensor], weights: dict[str, Tensor]) -> list[str]:
    """Names that are one parameter in the model and have different values in a file."""
    names: dict[int, list[str]] = {}
    for name, value in own.items():
        if name in weights:
            names.setdefault(id(value), []).append(name)
    groups = [group for group in names.values() if any(not torch.equal(weights[group[0]], weights[x]) for x in group)]
    return [" and ".join(group) for group in groups]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
