"""Labels of tokens: bytes, pieces of characters, and what no tokenizer knows."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from weightdecomp._vocabulary import Vocabulary, vocabulary

TEXT = "Ça va, 東京? 👍\n\tthe the end"


@given(st.text(min_size=1, max_size=20).filter(str.isprintable))
def test_single_bytes_read_as_their_text(text: str):
    """A character that is spread over some tokens is shown once, for all of them."""
    raw = text.encode()

    words = Vocabulary({byte: bytes([byte]) for byte in raw}).words(list(raw))

    assert words == [(c, len(c.encode())) for c in text]


def test_half_a_character_is_shown_as_bytes():
    labels = Vocabulary({0: "é".encode()[:1], 1: "é".encode()[1:], 2: b"a\xc3"})

    assert [labels[0], labels[1], labels[2]] == ["\\xc3", "\\xa9", "a\\xc3"]
    assert labels.words([0, 1]) == [("é", 2)]
    assert labels.words([0, 0]) == [("\\xc3", 1), ("\\xc3", 1)]


def test_unknown_ids_and_control_characters_are_named():
    labels = Vocabulary({0: b"\n", 1: b"\x00", 2: b" a"})

    assert [labels[i] for i in range(4)] == ["↵", "\\u0000", " a", "[3]"]
    assert labels.get(7) == "[7]"


def test_an_unknown_id_inside_a_character_keeps_its_place():
    first, second = "é".encode()[:1], "é".encode()[1:]
    labels = Vocabulary({0: first, 1: second, 2: b""})

    assert labels.words([0, 7, 1]) == [("\\xc3", 1), ("[7]", 1), ("\\xa9", 1)]
    assert labels.words([0, 2, 1]) == [("\\xc3", 1), ("[2]", 1), ("\\xa9", 1)]
    assert labels.words([0, 1, 7]) == [("é", 2), ("[7]", 1)]


def byte_level(folder: Path) -> list[int]:
    """A byte-level tokenizer with a few merges, and the ids that it makes of a text."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, special_tokens=["<s>"])
    made.train_from_iterator([TEXT] * 3, trainer)
    _write(made, folder)
    return made.encode(TEXT).ids


def sentencepiece(folder: Path) -> list[int]:
    """A tokenizer with a sign for spaces and bytes for what it has no piece for."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"tva,?hend", "▁the"[:2]]
    table = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(table, [("▁", "t")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    _write(made, folder)
    return made.encode(TEXT).ids


def _write(made, folder: Path) -> None:
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.mark.parametrize("kind", [byte_level, sentencepiece], ids=["byte level", "byte fallback"])
def test_the_tokens_of_a_tokenizer_read_as_the_text(kind, tmp_path: Path):
    ids = kind(tmp_path)

    labels = vocabulary(nn.Linear(1, 1), tmp_path)

    assert labels is not None
    words = labels.words(ids)
    assert len(ids) > len(words)
    assert "".join(text for text, _ in words) == TEXT.replace("\n", "↵").replace("\t", "⇥")


def test_a_file_of_texts_names_some_tokens(tmp_path: Path):
    (tmp_path / "pieces.json").write_text('{"3": " the", "4": "<b>"}')

    labels = vocabulary(nn.Linear(1, 1), tmp_path / "pieces.json")

    assert labels is not None
    assert [labels[3], labels[4], labels[5]] == [" the", "<b>", "[5]"]


@pytest.mark.parametrize("text", ["[1]", '{"a": "b"}', '{"1": 2}', "{", "\xff"])
def test_another_file_is_refused(text: str, tmp_path: Path):
    (tmp_path / "pieces.json").write_bytes(text.encode("latin1"))

    with pytest.raises(ValueError, match="--vocabulary: '.*pieces.json' is no JSON of texts by token id"):
        vocabulary(nn.Linear(1, 1), tmp_path / "pieces.json")


def test_a_model_without_a_tokenizer_has_no_labels():
    assert vocabulary(nn.Linear(1, 1)) is None
