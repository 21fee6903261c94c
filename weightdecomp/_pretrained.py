"""Pretrained models: Hugging Face directories as modules that return one tensor, under the checkpoint's own names."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from weightdecomp._divergence import output_tensor

_LISTED = 5  # names in one message


class Pretrained(nn.Module):
    """A Hugging Face model whose call returns its logits, its hidden states or its sentence embedding.

    Attributes:
        inner: The model of `transformers`, with the same parameters: `inner.generate`, `inner.save_pretrained`.
        directory: Where it was loaded from.
        pooling: "mean" or "first" over positions for sentence encoders, else None.
        normalised: Whether embeddings are scaled to length one.
    """

    inner: Any
    directory: Path

    def __init__(self, inner: nn.Module, directory: Path, pooling: str | None = None, normalised: bool = False) -> None:
        super().__init__()
        # Registered as a submodule, `inner` would add a prefix to all paths; so it shares its parts instead.
        object.__setattr__(self, "inner", inner)
        self._modules, self._parameters, self._buffers = inner._modules, inner._parameters, inner._buffers
        self.directory, self.pooling, self.normalised = directory, pooling, normalised
        accepted = inspect.signature(inner.forward).parameters
        # The cache of keys and values serves generation alone, and holds memory for every masked forward.
        self._options = {"use_cache": False} if "use_cache" in accepted else {}

    @property
    def config(self) -> Any:
        """The `transformers` configuration."""
        return self.inner.config

    @property
    def causal(self) -> bool:
        """Whether it is a language model whose output at a position is a guess at the next token."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return type(self.inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the inner model returns for the same arguments: logits (*batch, class), or embeddings."""
        output = output_tensor(self.inner(*args, **self._options, **kwargs))
        if self.pooling is None:
            return output
        pooled = _pooled(output, kwargs.get("attention_mask"), self.pooling)
        return F.normalize(pooled, dim=-1) if self.normalised else pooled


def _pooled(hidden: Float[Tensor, "batch position d"], mask: Tensor | None, pooling: str) -> Float[Tensor, "batch d"]:
    if pooling == "first":
        return hidden[:, 0]
    weights = torch.ones_like(hidden[..., :1]) if mask is None else mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def load_hf(directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Pretrained:
    """Load a Hugging Face directory (`config.json` and safetensors) as a module that returns one tensor.

    Everything is read from the directory: nothing is downloaded, unpickled, or run from it as code. The class is the
    one that the configuration names; a directory of sentence-transformers returns the sentence's embedding. Module
    paths are those of the checkpoint. A matrix with two uses (tied embedding and head) is a site at each of them.

    Args:
        directory: The folder.
        dtype: What weights are converted to; half precision is slow on CPUs.

    Returns:
        The model in eval mode, on the CPU. Attention is computed with plain matrix products.

    Raises:
        ValueError: If the directory is incomplete, holds weights of another architecture, or only pickled ones.
        ImportError: If `transformers` is not installed.
    """
    folder = Path(directory)
    config = _configuration(folder)
    _check_weights(folder)
    pooling, normalised = _pooling(folder)
    kind = _model_class(config, folder)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            model, report = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights in '{folder}' cannot be read: {error}") from error
    _check_report(report, kind.__name__, folder)
    return Pretrained(model, folder, pooling, normalised).eval()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Hugging Face directories need transformers: pip install 'weightdecomp[hf]'") from error
    return transformers


def _configuration(folder: Path) -> Any:
    """The configuration in a directory, by a class that transformers has."""
    if not folder.is_dir():
        raise ValueError(f"there is no directory '{folder}'; give a local one, as nothing is downloaded")
    if not (folder / "config.json").exists():
        found = sorted(path.name for path in folder.iterdir())
        raise ValueError(f"'{folder}' has no config.json; it holds {found[:_LISTED] or 'nothing'}")
    document = _json(folder / "config.json")
    transformers = _transformers()
    if document.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"'{folder}/config.json' has model_type {document.get('model_type')!r}, which transformers "
            f"{transformers.__version__} does not have; load the model by --model and --weights"
        )
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON ({error}); restore the file") from error


def _model_class(config: Any, folder: Path) -> Any:
    transformers = _transformers()
    names = config.architectures or []
    if len(names) != 1 or not hasattr(transformers, names[0]):
        raise ValueError(
            f"'{folder}/config.json' has architectures {names}, expected the name of one class of transformers "
            f"{transformers.__version__}; load the model by --model and --weights"
        )
    return getattr(transformers, names[0])


def _check_weights(folder: Path) -> None:
    """Refuse a directory whose safetensors are missing, in part or altogether."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(_json(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise ValueError(f"'{folder}' lacks {_some(missing)} of {len(shards)} shards; copy them there")
    elif not (folder / "model.safetensors").exists():
        pickled = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(ending))
        why = f"only pickled weights ({_some(pickled)}), which are never loaded" if pickled else "no weights"
        raise ValueError(
            f"'{folder}' has {why}; expected model.safetensors, or its shards and model.safetensors.index.json "
            "(save_pretrained of transformers writes them)"
        )


def _check_report(report: dict[str, Any], kind: str, folder: Path) -> None:
    """Refuse a model that would keep random weights, or a checkpoint of which a part goes unused."""
    shapes = [f"{name} is {tuple(came)}, expected {tuple(own)}" for name, came, own in report["mismatched_keys"]]
    complaints = [
        f"{what}: {_some(sorted(names))}"
        for what, names in (
            ("missing", report["missing_keys"]),
            ("unexpected", report["unexpected_keys"]),
            ("of another shape", shapes),
        )
        if names
    ]
    if complaints:
        raise ValueError(
            f"the weights in '{folder}' are not those of the {kind} in config.json ({'; '.join(complaints)}); "
            "take both files from one checkpoint"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _pooling(folder: Path) -> tuple[str | None, bool]:
    """How a directory of sentence-transformers makes one embedding of all positions, and whether of length one."""
    if not (folder / "modules.json").exists():
        return None, False
    kinds = {entry["type"].split(".")[-1]: entry["path"] for entry in _json(folder / "modules.json")}
    others = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    settings = _json(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    # Files name modes by flags or, since sentence-transformers 5.5, by one word.
    modes = {name.removeprefix("pooling_mode_") for name, on in settings.items() if on is True} | {
        settings.get("pooling_mode")
    }
    found = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}
    chosen = [found[mode] for mode in modes if mode in found]
    wrong = sorted(str(mode) for mode in modes if mode not in found and mode not in (None, "include_prompt"))
    if others or wrong or len(chosen) != 1:
        raise ValueError(
            f"'{folder}' is a sentence encoder with {others or wrong or 'no pooling'}, expected pooling by mean or by "
            "first token and then at most Normalize; load it by --model with a module of your own"
        )
    return chosen[0], "Normalize" in kinds


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no warnings while transformers loads; what it finds amiss is checked afterwards."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
