"""Batches of token ids for language models and text encoders: from text, from a file of ids, from the model itself.

Ids are made once; nothing later turns text back into tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from weightdecomp._check import called, check_finite, check_seed
from weightdecomp._divergence import output_tensor
from weightdecomp._hf_files import check_directory, told
from weightdecomp._pretrained import Pretrained
from weightdecomp._storage import nearest

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
)
_INPUTS = 64  # inputs in a batch
_NUMPY = b"\x93NUMPY"  # what every .npy file starts with


def tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory, from its files alone.

    Raises:
        ValueError: If the directory has none.
        ImportError: If `transformers` is not installed.
    """
    folder = Path(directory)
    check_directory(folder)
    if not has_tokenizer(folder):
        raise ValueError(
            f"'{folder}' has no tokenizer, which is one of {', '.join(_TOKENIZERS)}; give the directory of one as "
            "--tokenizer (tokenizer_from=), or token ids"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("tokenizers need transformers: pip install 'weightdecomp[hf]'") from error
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what damaged files make the reader raise has no bound
        raise ValueError(f"the tokenizer in '{folder}' cannot be read ({told(error)}); restore its files") from error


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a directory holds a tokenizer's files."""
    return any((Path(directory) / name).exists() for name in _TOKENIZERS)


def text_batches(
    model: nn.Module, path: str | Path, *, length: int = 128, tokenizer_from: str | Path | None = None
) -> list[Any]:
    """Token ids of a text file, in batches.

    For a `Pretrained` model that is no causal language model every line with text is one input, padded to the longest
    and passed by name with its attention mask. For all others the whole text is one run of tokens, cut into inputs of
    `length` tokens, each led by what the tokenizer puts in front of a text; the rest of the last cut is left out.

    Args:
        model: Takes token ids (batch, position).
        path: A file in UTF-8.
        length: Tokens an input; at most the model's context.
        tokenizer_from: The directory of the tokenizer; None takes that of a `Pretrained` model.

    Returns:
        Tensors (batch, position) of ids, or dicts of them.

    Raises:
        ValueError: If the file is missing, empty, not UTF-8 or too short, or the tokenizer does not suit the model.
    """
    _check_text(model)
    directory = _tokenizer_directory(model, tokenizer_from)
    made = tokenizer(directory)
    text = _text(Path(path))
    _check_vocabulary(model, made, directory)
    if isinstance(model, Pretrained) and not model.causal:
        return _lines(model, made, text, path)
    _check_length(model, length)
    lead = made("", verbose=False)["input_ids"]
    found = made(text, add_special_tokens=False, verbose=False)["input_ids"]
    if (own := length - len(lead)) < 1:
        raise ValueError(
            f"--length (length=): {length} leaves no room for text, as the tokenizer in '{directory}' puts {len(lead)} "
            "in front of it; give more"
        )
    if len(found) < own:
        raise ValueError(f"'{path}' has {len(found)} tokens, fewer than one input of {length}; give more text")
    rows = torch.tensor(found[: len(found) // own * own]).reshape(-1, own)
    rows = torch.cat([torch.tensor(lead, dtype=torch.long).expand(len(rows), -1), rows], 1)
    _check_ids(model, rows, f"'{path}' with the tokenizer in '{directory}'")
    return list(rows.split(_INPUTS))


def _tokenizer_directory(model: nn.Module, given: str | Path | None) -> str | Path:
    if given is not None:
        return given
    if isinstance(model, Pretrained):
        return model.directory
    raise ValueError(
        f"a {type(model).__name__} has no tokenizer; give the directory of one as --tokenizer (tokenizer_from=)"
    )


def _check_text(model: nn.Module) -> None:
    if isinstance(model, Pretrained):
        model.check_text()


def _check_vocabulary(model: nn.Module, made: Any, directory: str | Path) -> None:
    """Refuse a tokenizer that knows more pieces than the model, even if the text at hand needs none of those."""
    if not isinstance(model, Pretrained):
        return
    # Tokens added later, such as one for padding, may lie beyond a model that never sees them.
    known, size = made.vocab_size, model.inner.get_input_embeddings().weight.shape[0]
    if known > size:
        raise ValueError(
            f"the tokenizer in '{directory}' has {known} tokens, but the model's vocabulary is {size}; the tokenizer "
            "and the model must belong together"
        )


def _check_file(path: Path, expected: str) -> None:
    if path.is_dir():
        raise ValueError(f"'{path}' is a directory, expected {expected}")
    if not path.is_file():
        raise ValueError(f"there is no file '{path}'{nearest(path)}")


def _text(path: Path) -> str:
    _check_file(path, "a text file")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); "
            "convert it, as by iconv -f LATIN1 -t UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"'{path}' holds no text")
    return text


def _lines(model: Pretrained, made: Any, text: str, path: str | Path) -> list[dict[str, Tensor]]:
    """One input a line, padded at its end."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    found = made([line for _, line in lines], verbose=False)["input_ids"]
    for (number, _), ids in zip(lines, found, strict=True):
        model.check_length(len(ids), f"line {number} of '{path}', which is one input, has")
    longest = max(map(len, found))
    rows = torch.tensor([ids + [made.pad_token_id or 0] * (longest - len(ids)) for ids in found])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in found])
    _check_ids(model, rows, f"'{path}'")
    pairs = zip(rows.split(_INPUTS), mask.split(_INPUTS), strict=True)
    return [{"input_ids": ids, "attention_mask": ones} for ids, ones in pairs]


def token_batches(model: nn.Module, path: str | Path) -> list[Int64[Tensor, "batch position"]]:
    """Token ids of a `.npy` file, one row an input, in batches.

    Raises:
        ValueError: If the file is no array of integers (input, position), or the model cannot take its ids.
    """
    _check_text(model)
    file = Path(path)
    _check_file(file, "a .npy file")
    with file.open("rb") as stream:
        if stream.read(len(_NUMPY)) != _NUMPY:
            raise ValueError(f"'{file}' is no .npy file; write one with numpy.save, or give a text as --text")
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"'{file}' is no whole .npy file of numbers ({error}); use numpy.save") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
        came = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"'{file}' holds {came}, expected integers (input, position)")
    if (largest := int(array.max())) > torch.iinfo(torch.int64).max:
        raise ValueError(f"'{file}' holds the id {largest}, which no vocabulary has; write the ids anew")
    rows = torch.from_numpy(array.astype(np.int64))
    _check_length(model, rows.shape[1], f"the rows of '{file}' have")
    _check_ids(model, rows, f"'{file}'")
    return list(rows.split(_INPUTS))


def sampled_batches(
    model: nn.Module, n: int, *, length: int = 128, start: int | None = None, seed: int = 0
) -> list[Int64[Tensor, "batch position"]]:
    """Sequences that a language model writes itself, at temperature 1, in batches.

    Every token costs a forward pass over what is there already, so any module that maps ids to logits will do.

    Args:
        model: Maps token ids (batch, position) to logits (batch, position, token).
        n: How many sequences.
        length: Tokens in each, the first one included; at most the model's context.
        start: The first token; None takes the beginning of a text in a `Pretrained` model's configuration.
        seed: Of the draws.

    Raises:
        ValueError: If there is no first token, numbers are out of range, or the model gives no logits that are finite.
        TypeError: For a seed that is no whole number.
    """
    check_seed(seed)
    _check_text(model)
    _check_length(model, length)
    if n < 1:
        raise ValueError(f"the number of sequences must be at least 1, got {n}")
    if isinstance(model, Pretrained) and not model.causal:
        raise ValueError(f"a {type(model.inner).__name__} is no causal language model; give it text or tokens")
    if start is None:
        start = model.start if isinstance(model, Pretrained) else None
    if start is None:
        kind = type(model.inner if isinstance(model, Pretrained) else model).__name__
        raise ValueError(
            f"a {kind} says nowhere which token begins a text (bos_token_id in config.json does); give it as start= "
            "from Python, or token ids as --tokens"
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    rng = torch.Generator(device=device).manual_seed(seed)
    first = torch.full((n, 1), start, device=device)
    _check_ids(model, first, "start")
    _check_logits(model, first[:1])
    return [_continued(model, rows, length, rng) for rows in first.split(_INPUTS)]


def _check_logits(model: nn.Module, one: Tensor) -> None:
    """Refuse a model that cannot write: its weights are not finite, or it gives no logits for a token."""
    check_finite(model)
    fix = "sampling takes a module that maps token ids to logits; give other inputs as --data"
    with torch.no_grad():
        logits = output_tensor(called(model, one, "the model fails on the first token of a sequence", fix))
    if logits.shape[:2] != (1, 1) or logits.ndim != 3:
        raise ValueError(
            f"the model's output for one token has shape {tuple(logits.shape)}, expected logits (1, 1, token); {fix}"
        )


def _continued(model: nn.Module, rows: Tensor, length: int, rng: torch.Generator) -> Tensor:
    with torch.no_grad():
        while rows.shape[1] < length:
            logits = output_tensor(model(rows))[:, -1].float()
            probabilities: Float[Tensor, "batch token"] = logits.softmax(-1)
            if not torch.isfinite(probabilities).all():
                raise ValueError("the model's output on what it wrote contains NaN or infinity; load it in float32")
            rows = torch.cat([rows, torch.multinomial(probabilities, 1, generator=rng)], 1)
    return rows


def _check_length(model: nn.Module, length: int, what: str = "--length (length=): inputs would have") -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if isinstance(model, Pretrained):
        model.check_length(length, what)


def _check_ids(model: nn.Module, rows: Tensor, what: str) -> None:
    if isinstance(model, Pretrained):
        model.check_ids(rows, what)
