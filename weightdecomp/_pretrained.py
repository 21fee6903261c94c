"""Pretrained models: Hugging Face directories as modules that return one tensor, under the checkpoint's own names."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from weightdecomp._divergence import output_tensor
from weightdecomp._hf_files import check_report, check_weights, configuration, model_class, pooling, remedy, told

_LISTED = 5  # ids in one message


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

    @property
    def embeds(self) -> bool:
        """Whether it returns hidden states or an embedding, where a model with a head returns scores of classes."""
        return self.pooling is not None or self.inner.base_model is self.inner

    @property
    def title(self) -> str:
        """Its class and where it comes from, for readers."""
        return f"{type(self.inner).__name__} of {self.directory.resolve().name}"

    @cached_property
    def context(self) -> int | None:
        """Most positions that it reads; None where the configuration does not say."""
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        tables = [module for path, module in self.named_modules() if path.endswith("position_embeddings")]
        # RoBERTa and its kin count positions from the row after the one for padding.
        before = [row + 1 for table in tables if (row := getattr(table, "padding_idx", None)) is not None]
        return most if most is None else most - max(before, default=0)

    @property
    def start(self) -> int | None:
        """The token that begins a text; None where the configuration does not say."""
        return getattr(self.config.get_text_config(), "bos_token_id", None)

    def check_text(self) -> None:
        """Refuse a model of something else than text.

        Raises:
            ValueError: With what it reads.
        """
        if (read := self.inner.main_input_name) != "input_ids":
            raise ValueError(
                f"a {type(self.inner).__name__} reads {read}, not token ids; give batches of them as --data"
            )

    def check_length(self, length: int, what: str) -> None:
        """Refuse inputs that are longer than the context.

        Raises:
            ValueError: With both numbers.
        """
        if self.context is not None and length > self.context:
            raise ValueError(f"{what} {length} tokens, but the model reads at most {self.context}; give fewer")

    def check_ids(self, ids: Tensor, what: str) -> None:
        """Refuse token ids that there is no embedding for.

        Raises:
            ValueError: With some of them.
        """
        size = self.inner.get_input_embeddings().weight.shape[0]
        wrong = ids[(ids < 0) | (ids >= size)].unique()
        if len(wrong):
            raise ValueError(
                f"{what} gives token ids outside the model's vocabulary of {size} (such as "
                f"{wrong[:_LISTED].tolist()}); the tokenizer and the model must belong together"
            )

    def check_batch(self, batch: Any, what: str) -> None:
        """Refuse a batch of token ids that the model cannot read.

        Raises:
            ValueError: For ids without an axis of positions, outside the vocabulary, or more than the context.
        """
        named = batch if isinstance(batch, Mapping) else {"input_ids": batch if isinstance(batch, Tensor) else batch[0]}
        ids = named.get("input_ids")
        if self.inner.main_input_name != "input_ids" or not isinstance(ids, Tensor) or ids.is_floating_point():
            return
        if ids.ndim != 2:
            raise ValueError(f"{what} has token ids of shape {tuple(ids.shape)}, expected (input, position)")
        self.check_length(ids.shape[1], f"the inputs of {what} have")
        self.check_ids(ids, what)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the inner model returns for the same arguments: logits (*batch, class), or embeddings.

        At positions that `attention_mask` leaves out it returns zeros, so that nothing counts what it says of padding.
        """
        output, held = output_tensor(self.inner(*args, **self._options, **kwargs)), kwargs.get("attention_mask")
        if self.pooling is None and held is not None and output.ndim == 3 and held.shape == output.shape[:2]:
            return output * held[..., None].to(output.dtype)
        if self.pooling is None:
            return output
        pooled = _pooled(output, held, self.pooling)
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
        The model in eval mode, on the CPU. Attention is computed as the configuration says, else by torch's
        `scaled_dot_product_attention` where the architecture has that.

    Raises:
        ValueError: If the directory is incomplete, holds weights of another architecture, or only pickled ones.
        ImportError: If `transformers` is not installed.
    """
    folder = Path(directory)
    config = configuration(folder)
    check_weights(folder)
    pooled, normalised = pooling(folder)
    kind = model_class(config, folder)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            model, report = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights in '{folder}' cannot be read: {error}; copy them again") from error
    except Exception as error:  # what settings that do not go together make the class raise has no bound
        raise ValueError(
            f"no {kind.__name__} can be made from '{folder}/config.json' ({told(error)}); {remedy(config)}"
        ) from error
    check_report(report, kind.__name__, folder)
    return Pretrained(model, folder, pooled, normalised).eval()


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
