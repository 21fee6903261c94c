"""The model and the inputs that a command line names, by whichever flags it names them."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from weightdecomp._batches import Batch
from weightdecomp._loading import loaded_batches, loaded_model
from weightdecomp._pretrained import load_hf
from weightdecomp._tokens import sampled_batches, text_batches, token_batches

_LENGTH = 128  # tokens an input, unless given


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model and its inputs."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="MODULE:FACTORY", help=_MODEL)
    model.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face directory: config.json and safetensors")
    parser.add_argument("--weights", type=Path, metavar="FILE", help=_WEIGHTS)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", metavar="MODULE:FUNCTION", help=_DATA)
    data.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text, cut into inputs of --length tokens")
    data.add_argument("--tokens", type=Path, metavar="FILE", help=".npy file of token ids, one row an input")
    data.add_argument("--sample", type=int, metavar="N", help="N sequences that the language model writes itself")
    parser.add_argument("--length", type=int, metavar="N", help=f"tokens an input, of --text and --sample ({_LENGTH})")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="for --text; default: the --hf directory's own")


def model_and_batches(given: argparse.Namespace) -> tuple[nn.Module, Iterable[Batch]]:
    """What `add_model`'s flags name.

    Raises:
        ValueError: If it cannot be loaded, or flags do not go together.
    """
    _check_pairs(given)
    model = loaded_model(given.model, given.weights) if given.hf is None else load_hf(given.hf)
    length = _LENGTH if given.length is None else given.length
    if given.text is not None:
        return model, text_batches(model, given.text, length=length, tokenizer_from=given.tokenizer)
    if given.tokens is not None:
        return model, token_batches(model, given.tokens)
    if given.sample is not None:
        return model, sampled_batches(model, given.sample, length=length)
    return model, loaded_batches(given.data)


def _check_pairs(given: argparse.Namespace) -> None:
    """Refuse flags that would be ignored."""
    if given.hf is not None and given.weights is not None:
        raise ValueError("--weights belongs to --model; the weights of --hf are in its directory")
    if given.tokenizer is not None and given.text is None:
        raise ValueError("--tokenizer belongs to --text")
    if given.length is not None and given.text is None and given.sample is None:
        raise ValueError("--length belongs to --text and --sample")


_MODEL = "function or class that makes the model, called without arguments, as in package.module:factory"
_WEIGHTS = "of --model: safetensors, or a state_dict of torch.save; default: the factory's own"
_DATA = "function that returns batches of sample inputs, called without arguments"
