"""Tokens as a reader sees them: every id has bytes, and bytes that are no whole character are shown as such."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import nn

from weightdecomp._pretrained import Pretrained
from weightdecomp._tokens import has_tokenizer, tokenizer

_LONGEST = 4  # bytes of one character in UTF-8
_VISIBLE = {"\n": "↵", "\r": "␍", "\t": "⇥"}


class Vocabulary(Mapping[int, str]):
    """Labels of token ids; a mapping that knows every id.

    An id without a known piece, or with an empty one, is shown as `[id]`; bytes that begin or end inside a character
    as `\\xE2`.
    """

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        """Hold the bytes of the known ids."""
        self.pieces = dict(pieces)

    def __getitem__(self, token: int) -> str:
        """The label of one token."""
        return "".join(text for text, _ in self.words([token]))

    def get(self, token: int, default: Any = None) -> str:  # Mapping's own would take unknown ids for missing
        """The label of one token; every id has one."""
        return self[token]

    def __len__(self) -> int:
        """Number of known pieces."""
        return len(self.pieces)

    def __iter__(self) -> Iterator[int]:
        """The ids of known pieces."""
        return iter(self.pieces)

    def words(self, tokens: Sequence[int]) -> list[tuple[str, int]]:
        """A run of tokens as pairs of text and number of tokens; one pair for tokens that share a character."""
        found, start = [], 0
        while start < len(tokens):
            n, text = self._word(tokens[start:])
            found.append((text, n))
            start += n
        return found

    def _word(self, tokens: Sequence[int]) -> tuple[int, str]:
        """The fewest first tokens that are whole characters together, and their text."""
        if not self.pieces.get(tokens[0]):
            return 1, f"[{tokens[0]}]"
        joined = b""
        # An id without a piece has a label of its own.
        for n, token in enumerate(takewhile(self.pieces.get, tokens[:_LONGEST]), 1):
            joined += self.pieces[token]
            try:
                return n, _visible(joined.decode())
            except UnicodeDecodeError as error:
                if "unexpected end" not in error.reason:
                    break
        return 1, _broken(self.pieces[tokens[0]])


def _visible(text: str) -> str:
    """Text with its control characters drawn."""
    return "".join(_VISIBLE.get(c, c if c.isprintable() or c == " " else f"\\u{ord(c):04X}") for c in text)


def _broken(piece: bytes) -> str:
    """Bytes of which some are no whole character."""
    return _visible(piece.decode(errors="backslashreplace"))


def vocabulary(model: nn.Module, given: str | Path | None = None) -> Vocabulary | None:
    """The labels of a model's tokens.

    Args:
        model: A `Pretrained` one has its tokenizer in its directory.
        given: The directory of a tokenizer, or a JSON file of texts by id; None takes the model's own.

    Returns:
        None if nothing is given and the model has no tokenizer.

    Raises:
        ValueError: If what is given cannot be read.
    """
    if given is not None and not Path(given).is_dir():
        return Vocabulary(_listed(Path(given)))
    directory = model.directory if given is None and isinstance(model, Pretrained) else given
    if directory is None or (given is None and not has_tokenizer(directory)):
        return None
    return Vocabulary(_pieces(tokenizer(directory)))


def _listed(path: Path) -> dict[int, bytes]:
    """A JSON object of texts by id."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {int(token): text.encode() for token, text in found.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'--vocabulary: \'{path}\' is no JSON of texts by token id, as in {{"13": "\\n"}}') from error


def _pieces(made: Any) -> dict[int, bytes]:
    """The bytes of all ids of a tokenizer of `transformers`."""
    layout = made.backend_tokenizer.to_str() if getattr(made, "backend_tokenizer", None) else "{}"
    by_bytes = '"ByteLevel"' in json.dumps(json.loads(layout).get("decoder"))
    added = {token: str(text).encode() for token, text in made.added_tokens_decoder.items()}
    own = {token: _piece(text, by_bytes) for text, token in made.get_vocab().items()}
    return own | added


def _piece(text: str, by_bytes: bool) -> bytes:
    """The bytes that a tokenizer's piece stands for."""
    if by_bytes and all(c in _BYTES for c in text):
        return bytes(_BYTES[c] for c in text)
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes.fromhex(text[3:5])
    return text.replace("▁", " ").encode()  # sentencepiece's space


def _byte_alphabet() -> dict[str, int]:
    """Characters that stand for bytes in byte-level tokenizers (Radford et al. 2019): printable ones for themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
