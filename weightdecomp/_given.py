"""The model, the inputs and their labels that a command line names, by whichever flags it names them."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from weightdecomp._batches import Batch, joined, read_batches, select, size, tensors
from weightdecomp._figures import Images
from weightdecomp._fold import fold_norms
from weightdecomp._loading import loaded_batches, loaded_labels, loaded_model
from weightdecomp._pretrained import load_hf
from weightdecomp._split import Rows, split
from weightdecomp._tokens import sampled_batches, text_batches, token_batches
from weightdecomp._vocabulary import Vocabulary, vocabulary

_PAIRS = r"\w+:\d+(?:,\w+:\d+)*"
_ROWS = re.compile(rf"(?:\(({_PAIRS})\)|({_PAIRS}))(?:\*(\d{{1,4}}))?")
_LENGTH = 128  # tokens an input, unless given


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model and its inputs."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="MODULE:FACTORY", help=_MODEL)
    model.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face directory: config.json and safetensors")
    parser.add_argument("--weights", type=Path, metavar="FILE", help=_WEIGHTS)
    parser.add_argument("--split", action="append", nargs="?", const="", metavar="PATTERN=q:64,k:32,v:32", help=_SPLIT)
    parser.add_argument(
        "--fold-norms", action="store_true", help="put gains of layer norms into the matrices they feed"
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", metavar="MODULE:FUNCTION", help=_DATA)
    data.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text, cut into inputs of --length tokens")
    data.add_argument("--tokens", type=Path, metavar="FILE", help=".npy file of token ids, one row an input")
    data.add_argument("--sample", type=int, metavar="N", help="N sequences that the language model writes itself")
    parser.add_argument("--sample-seed", type=seed, metavar="N", help=_SAMPLE_SEED)
    parser.add_argument("--length", type=int, metavar="N", help=f"tokens an input, of --text and --sample ({_LENGTH})")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="for --text; default: the --hf directory's own")


def seed(word: str) -> int:
    """A seed as it is given on the command line."""
    found = int(word)
    if not 0 <= found < 2**32:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2^32 - 1, got {found}")
    return found


def add_vocabulary(parser: argparse.ArgumentParser) -> None:
    """The flag that names tokens for readers."""
    parser.add_argument("--vocabulary", type=Path, metavar="PATH", help=_VOCABULARY)


def model_and_batches(given: argparse.Namespace) -> tuple[nn.Module, Iterable[Batch]]:
    """What `add_model`'s flags name.

    Raises:
        ValueError: If it cannot be loaded, or flags do not go together.
    """
    _check_pairs(given)
    model = loaded_model(given.model, given.weights) if given.hf is None else load_hf(given.hf)
    batches = _batches(given, model)
    if given.split is not None:
        model = split(model, _rows(given.split))
    if given.fold_norms:
        batches = read_batches(batches, model)
        model = fold_norms(model, batches[0])
    return model, batches


def given_vocabulary(given: argparse.Namespace, model: nn.Module, batches: Sequence[Batch]) -> Vocabulary | None:
    """Labels of tokens, where inputs are tokens.

    Raises:
        ValueError: If `--vocabulary` cannot be read, or inputs are no token ids.
    """
    if all(x.is_floating_point() for x in tensors(batches[0])):
        if given.vocabulary is not None:
            raise ValueError("--vocabulary: the inputs are no token ids, which are integers")
        return None
    return vocabulary(model, given.vocabulary)


def given_images(given: argparse.Namespace, batches: Sequence[Batch]) -> Images | None:
    """The inputs as pictures with their classes, where `--side` and `--labels` say that they are.

    Raises:
        ValueError: If there is one flag without the other, or they do not fit the inputs.
    """
    if given.side is None and given.labels is None:
        return None
    if given.side is None or given.labels is None:
        raise ValueError("--side and --labels go together: the pictures, and the class of each")
    pixels, labels = joined(batches), loaded_labels(given.labels)
    if len(pixels) != 1 or not isinstance(pixels[0], torch.Tensor) or pixels[0].shape[1:] != (given.side**2,):
        raise ValueError(f"--side: expected inputs of shape (input, {given.side**2}), one row a picture")
    if len(labels) != len(pixels[0]):
        raise ValueError(f"--labels: there are {len(labels)} classes for {len(pixels[0])} inputs")
    return Images(pixels[0], labels, given.side)


def one_input(batches: Sequence[Batch], number: int) -> Batch:
    """One input, numbered over all batches.

    Raises:
        ValueError: If there is none of that number.
    """
    n = 0
    for batch in batches:
        if 0 <= number - n < size(batch):
            return select(batch, torch.tensor([number - n]))
        n += size(batch)
    raise ValueError(f"--input: there is no input {number}; the data has {n}, numbered 0 to {n - 1}")


def _batches(given: argparse.Namespace, model: nn.Module) -> Iterable[Batch]:
    length = _LENGTH if given.length is None else given.length
    if given.text is not None:
        return text_batches(model, given.text, length=length, tokenizer_from=given.tokenizer)
    if given.tokens is not None:
        return token_batches(model, given.tokens)
    if given.sample is not None:
        return sampled_batches(model, given.sample, length=length, seed=given.sample_seed or 0)
    return loaded_batches(given.data)


def _rows(words: Sequence[str]) -> dict[str, Rows] | None:
    """What `--split` says: None for the known layouts, else the rows for each pattern."""
    if "" in words:
        if len(words) > 1:
            raise ValueError("--split: give it once without a value, or with patterns alone")
        return None
    found: dict[str, Rows] = {}
    for word in words:
        pattern, _, rest = word.partition("=")
        match = _ROWS.fullmatch(rest)
        if match is None:
            raise ValueError(
                "--split: expected PATTERN=name:rows,name:rows or PATTERN=(name:rows,name:rows)*heads, of at most 9999 "
                f"heads, got {word!r}"
            )
        if pattern in found:
            raise ValueError(f"--split: {pattern!r} is given twice; name all its rows at once")
        pairs = [pair.split(":") for pair in (match[1] or match[2]).split(",")]
        found[pattern] = [(name, int(size)) for name, size in pairs] * int(match[3] or 1)
    return found


def _check_pairs(given: argparse.Namespace) -> None:
    """Refuse flags that would be ignored."""
    if given.hf is not None and given.weights is not None:
        raise ValueError("--weights belongs to --model; the weights of --hf are in its directory")
    if given.tokenizer is not None and given.text is None:
        raise ValueError("--tokenizer belongs to --text")
    if given.sample_seed is not None and given.sample is None:
        raise ValueError("--sample-seed belongs to --sample")
    if given.length is not None and given.text is None and given.sample is None:
        raise ValueError("--length belongs to --text and --sample")


_MODEL = "function or class that makes the model, called without arguments, as in package.module:factory"
_WEIGHTS = "of --model: safetensors, or a state_dict of torch.save; default: the factory's own"
_DATA = "function that returns batches of sample inputs, called without arguments"
_SAMPLE_SEED = "of --sample (0); with another one `verify` has sequences that the run has not seen"
_SPLIT = "fused matrices as separate sites: those of known layout, or by numbers of rows, (q:8,k:8,v:8)*4 for 4 heads"
_VOCABULARY = "labels of tokens: directory of a tokenizer, or JSON of texts by id; default: the --hf directory's own"
