"""Files of weights that users have."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from weightdecomp._storage import looks_pickled, names, nearest

_SHOWN = 5  # names in one message


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a user's weights from a safetensors file, or from a state_dict that torch.save wrote, on the CPU.

    A pickle goes through torch's restricted reader (`weights_only=True`), which makes tensors and containers alone
    and runs nothing from the file.

    Raises:
        ValueError: If the file is missing, damaged, or holds anything else than tensors by name.
    """
    if path.is_dir():
        found = sorted(name for name in names(path) if name.endswith(".safetensors"))
        raise ValueError(f"'{path}' is a directory, expected a safetensors file; it holds {found or 'none'}")
    if not path.exists():
        raise ValueError(f"there is no file '{path}'{nearest(path)}")
    with path.open("rb") as stream:
        start = stream.read(9)
    if looks_pickled(start):
        return _unpickled_weights(path)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"'{path}' is not a whole safetensors file ({error}); copy it again, or write it with "
            "safetensors.torch.save_file"
        ) from error


def _unpickled_weights(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle makes the reader raise has no bound
        raise ValueError(
            f"'{path}' is a pickle that holds more than tensors, or is damaged; such files can run code and are not "
            "loaded. Where it was made, save the weights alone: safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    named = isinstance(found, Mapping) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(x, Tensor) for x in found.values()):
        inside = f"a dict of {sorted(map(str, found))[:_SHOWN]}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"'{path}' holds {inside}, expected tensors by name; save model.state_dict() by itself")
    return dict(found)
