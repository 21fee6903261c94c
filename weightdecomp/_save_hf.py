"""Saving a model as a Hugging Face directory: config and safetensors, whole or not at all."""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightdecomp._pretrained import Pretrained
from weightdecomp._split import unsplit
from weightdecomp._storage import digest


def save_hf(model: nn.Module, directory: str | Path) -> None:
    """Write a transformers model, such as an edited one, as a directory that `from_pretrained` loads.

    The model is read back from the directory and compared with what was given before it is put in place. Weights that
    an edit has untied are saved as untied, and what `split` took apart is saved as one matrix. Tokenizer files are not
    the model's; copy them beside it.

    Args:
        model: A transformers `PreTrainedModel`, what `load_hf` returned, or a module that wraps one and has no weights
            of its own.
        directory: A new or an empty directory.

    Raises:
        ValueError: If the directory is not empty, the wrapper has weights of its own, or what was written would not
            load as the same model.
        TypeError: If there is no one `PreTrainedModel` in the model.
        ModuleNotFoundError: If transformers is not installed.
        OSError: If the directory cannot be written.
    """
    inner, path = _pretrained(unsplit(model)), Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"'{path}' is not an empty directory; choose a new or an empty one")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _quiet(), _own_config(inner):
            inner.save_pretrained(part)
            _check_same(inner, part, path)
        # Temporary directories are made for their owner alone.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o777 & ~umask)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _pretrained(model: nn.Module) -> Any:
    """The one outermost transformers model."""
    try:
        from transformers import PreTrainedModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "saving a Hugging Face directory needs transformers, which is not installed: pip install 'weightdecomp[hf]'"
        ) from error
    if isinstance(model, Pretrained):
        return model.inner
    found = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    outer = [
        name
        for name in found
        if not any(name.startswith(f"{other}." if other else "") for other in found.keys() - {name})
    ]
    if len(outer) != 1:
        raise TypeError(
            f"model is {type(model).__name__} and holds {len(outer)} transformers models, expected one; save other "
            "models with safetensors.torch.save_model"
        )
    inner = found[outer[0]]
    inside = {id(value) for value in inner.state_dict(keep_vars=True).values()}
    others = [name for name, value in model.state_dict(keep_vars=True).items() if id(value) not in inside]
    if others:
        raise ValueError(
            f"{others[0]!r} is outside the {type(inner).__name__} and would not be saved; save the whole model with "
            "safetensors.torch.save_model"
        )
    return inner


@contextmanager
def _own_config(inner: Any) -> Iterator[None]:
    """A copy of the config that says whether weights are tied now; saving writes into it."""
    before = inner.config
    inner.config = copy.deepcopy(before)
    head = inner.get_output_embeddings()
    if head is not None and head.weight is not inner.get_input_embeddings().weight:
        inner.config.tie_word_embeddings = False
    try:
        yield
    finally:
        inner.config = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and the caller's random state as before."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_same(inner: Any, part: Path, path: Path) -> None:
    again = type(inner).from_pretrained(part, dtype=inner.dtype, local_files_only=True)
    if digest(again.state_dict()) != digest(inner.state_dict()):
        raise ValueError(
            f"{type(inner).__name__} does not load from what it saves, so '{path}' was not written; "
            "save its state_dict with safetensors.torch.save_model"
        )
