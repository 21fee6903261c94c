"""Artefacts: directories of tensors and a document, written whole or not at all.

An artefact of kind `k` is `k.json` and one `k.<start of its sha256>.safetensors`. The JSON names the tensors
by their sha256 and its own content by another, and moving it into place is the single commit: whatever moment
the process is killed at, the JSON on disk is the old or the new one, and the tensors it names lie beside it.
Nothing is ever unpickled.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_FORMAT = 1
_KEYS = {"format", "kind", "tensors", "document", "sha256"}
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_PICKLES = (b"PK", b"\x80")  # a zip archive, as torch.save writes, and a bare pickle


class Artefact(NamedTuple):
    """What `write` was given and `read` returns."""

    tensors: dict[str, Tensor]
    document: dict[str, Any]


def write(directory: Path, kind: str, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write an artefact, replacing an earlier one of the same kind; files of others are left alone.

    Args:
        directory: Made if missing.
        kind: An identifier, which names the files.
        tensors: Any layout, device and sharing; read back contiguous, apart and on the CPU.
        document: JSON values. As always in JSON, tuples come back as lists and keys as strings.

    Raises:
        ValueError: If the directory holds something else (see `check_vacant`).
        OSError: If the disk is full, or another failure of the file system; the earlier artefact is intact.
    """
    check_vacant(directory, kind)
    data = safetensors.torch.save({name: _standalone(tensor) for name, tensor in tensors.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    content = {
        "format": _FORMAT,
        "kind": kind,
        "tensors": {"bytes": len(data), "sha256": sha256},
        "document": json.loads(json.dumps(document)),
    }
    text = json.dumps(content | {"sha256": _checksum(content)}, indent=1).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        commit({_tensor_file(directory, kind, sha256): data, _manifest(directory, kind): text})
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk is full: the {kind} needs {len(data) + len(text)} bytes in '{directory}'; what was "
            "saved there before is intact. Free some space, or save to another directory",
        ) from error
    finally:
        _sweep(directory, kind)


def read(directory: Path, kind: str) -> Artefact:
    """Read an artefact back, on the CPU.

    Raises:
        ValueError: If it is missing, of another kind or a newer format, or differs by a byte that matters
            from what was written.
    """
    if not directory.is_dir():
        raise ValueError(_not_a_directory(directory, kind))
    content = _content(directory, kind)
    file = _tensor_file(directory, kind, content["tensors"]["sha256"])
    if not file.exists():
        raise ValueError(f"'{file}' is missing: the {kind} in '{directory}' is incomplete; restore it or start anew")
    data = file.read_bytes()
    if looks_pickled(data):
        raise ValueError(f"'{file}' is a pickle, expected safetensors; nothing is ever unpickled")
    if len(data) != content["tensors"]["bytes"]:
        raise ValueError(f"'{file}' has {len(data)} bytes, expected {content['tensors']['bytes']}: {_DAMAGED}")
    if hashlib.sha256(data).hexdigest() != content["tensors"]["sha256"]:
        raise ValueError(f"'{file}' was altered after it was written: {_DAMAGED}")
    try:
        return Artefact(safetensors.torch.load(data), content["document"])
    except SafetensorError as error:
        raise ValueError(f"'{file}' is not a safetensors file ({error}): {_DAMAGED}") from error


_DAMAGED = "restore the file from a copy, or make the artefact anew"


def exists(directory: Path, kind: str) -> bool:
    """Whether an artefact of that kind was committed there, sound or not."""
    return _manifest(directory, kind).exists()


def check_writable(directory: Path) -> None:
    """Check that files can be written to a directory, or that it can be made.

    Raises:
        ValueError: If it, or the nearest of its parents that is there, is a file or may not be written to.
    """
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    what = "it" if nearest == directory else f"'{nearest}'"
    if not nearest.is_dir():
        raise ValueError(f"cannot save to '{directory}': {what} is a file, expected a directory")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"cannot save to '{directory}': {what} may not be written to; give another directory")


def check_vacant(directory: Path, kind: str) -> None:
    """Check that `write` would not refuse the directory, which long runs want to know before they start.

    Raises:
        ValueError: If it cannot be written to, or is not empty and holds no readable artefact of that kind.
    """
    assert kind.isidentifier(), kind
    check_writable(directory)
    if exists(directory, kind):
        try:
            _content(directory, kind)
        except ValueError as error:
            raise ValueError(f"will not replace what is in '{directory}': {error}; move it away first") from error
    elif others := sorted(set(names(directory)) - {path.name for path in _leftovers(directory, kind)}):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"'{directory}' is not empty and holds no {kind}, but {others[0]!r}{more}; "
            "choose a new or an empty directory"
        )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, dtypes, shapes and values; their order, layout and device do not matter."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = _standalone(tensors[name])
        # One self-delimiting header a tensor, so that no two sets of tensors give the same stream of bytes.
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _standalone(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU; safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _manifest(directory: Path, kind: str) -> Path:
    return directory / f"{kind}.json"


def _tensor_file(directory: Path, kind: str, sha256: str) -> Path:
    return directory / f"{kind}.{sha256[:16]}.safetensors"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _checksum(content: Mapping[str, Any]) -> str:
    """The sha256 of JSON values whatever their layout and the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def commit(files: Mapping[Path, bytes]) -> None:
    """Write every file beside its place, then move each there; the move of the last one is the commit."""
    for path, data in files.items():
        with _temporary(path).open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    for path in files:
        os.replace(_temporary(path), path)
        _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make a move survive a power cut, where the system can sync a directory."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leftovers(directory: Path, kind: str) -> list[Path]:
    """Files of writes, finished or not, that the committed JSON may or may not name."""
    return [
        *directory.glob(f"{kind}.{'[0-9a-f]' * 16}.safetensors"),
        *directory.glob(f".{kind}.{'[0-9a-f]' * 16}.safetensors.tmp"),
        *directory.glob(f".{kind}.json.tmp"),
    ]


def _sweep(directory: Path, kind: str) -> None:
    """Remove what the committed JSON does not name."""
    current = None
    if exists(directory, kind):
        current = _tensor_file(directory, kind, _content(directory, kind)["tensors"]["sha256"])
    for path in _leftovers(directory, kind):
        if path != current:
            path.unlink(missing_ok=True)


def _content(directory: Path, kind: str) -> dict[str, Any]:
    """The checked content of an artefact's JSON."""
    path = _manifest(directory, kind)
    if not path.exists():
        others = sorted(name.removesuffix(".json") for name in names(directory) if name.endswith(".json"))
        raise ValueError(f"'{directory}' holds no {kind}: there is no '{path.name}'; it holds {others or 'none'}")
    data = path.read_bytes()
    if data.startswith(_PICKLES):
        raise ValueError(f"'{path}' is a pickle, expected JSON; nothing is ever unpickled")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not JSON ({error}): {_DAMAGED}") from error
    _check_content(content, path, kind)
    return content


def _check_content(content: Any, path: Path, kind: str) -> None:
    """Refuse a JSON of another format or kind, with unknown or missing keys, or that was altered."""
    if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] < 1:
        raise ValueError(f"'{path}' is no artefact of weightdecomp, which starts with a format number: {_DAMAGED}")
    if content["format"] > _FORMAT:
        raise ValueError(
            f"'{path}' has format {content['format']}, this version of weightdecomp reads up to {_FORMAT}: "
            "upgrade weightdecomp to the version that wrote it, or a newer one"
        )
    if content.get("kind") != kind:
        raise ValueError(f"'{path}' holds a {content.get('kind')!r}, expected a {kind!r}")
    if content.keys() != _KEYS:
        unknown, missing = sorted(content.keys() - _KEYS), sorted(_KEYS - content.keys())
        raise ValueError(f"'{path}' has unknown keys {unknown} and lacks {missing}: {_DAMAGED}")
    if content["sha256"] != _checksum({key: content[key] for key in content.keys() - {"sha256"}}):
        raise ValueError(f"'{path}' was altered after it was written: {_DAMAGED}")
    match content:
        case {"tensors": {"bytes": int(), "sha256": str()}, "document": dict()}:
            return
    raise ValueError(f"'{path}' does not say which tensors belong to it: {_DAMAGED}")


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.is_dir() else []


def nearest(path: Path) -> str:
    """A hint at what exists under a similar name."""
    full = path.absolute()
    parent = next(parent for parent in full.parents if parent.is_dir())
    missing = full.relative_to(parent).parts[0]
    close = get_close_matches(missing, names(parent), n=3, cutoff=0.5)
    return f"; did you mean one of {[str(parent / name) for name in close]}?" if close else f" ('{parent}' has none)"


def _not_a_directory(path: Path, kind: str) -> str:
    """Why a path is not the directory of an artefact."""
    if not path.exists():
        return f"there is no directory '{path}'{nearest(path)}"
    with path.open("rb") as stream:
        pickled = stream.read(2).startswith(_PICKLES)
    never = "; it is a pickle, and nothing is ever unpickled" if pickled else ""
    return f"'{path}' is a file, expected the directory that a {kind} was saved to{never}"


def looks_pickled(start: bytes) -> bool:
    """Whether a file's first bytes are a pickle's; a safetensors header may begin with any, and has its brace ninth."""
    return start.startswith(_PICKLES) and start[8:9] != b"{"
