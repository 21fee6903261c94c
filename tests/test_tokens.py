import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import Calls, ids

pytest.importorskip("transformers")

from tests.hf_models import CONTEXT, VOCABULARY, saved

TEXT = "the cat sat on the mat\nthe dog saw the cat\n\nwhere is the mat\n" * 4


def tokenizer_in(folder: Path, n_words: int = 20, *, lead: bool = True) -> Path:
    """A tokenizer of words, which puts token 1 in front of a text if `lead`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "<s>", "</s>", *sorted(set(TEXT.split()))]
    vocabulary = {word: i for i, word in enumerate(words[:n_words])}
    # Identifiers that a larger model's tokenizer would have.
    vocabulary |= {f"word{i}": i for i in range(len(words), n_words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if lead:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    saved("llama, grouped queries, tied", folder)
    return tokenizer_in(folder)


@pytest.fixture(scope="module")
def model(directory: Path) -> wd.Pretrained:
    return wd.load_hf(directory)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


# ------------------------------------------------------------------------------------------ text


def test_a_text_is_one_run_of_tokens_cut_into_inputs_with_the_beginning_of_a_text(model: wd.Pretrained, text: Path):
    from transformers import AutoTokenizer

    (batch,) = wd.text_batches(model, text, length=8)

    made = AutoTokenizer.from_pretrained(model.directory)
    whole = made(TEXT)["input_ids"][1:]
    assert batch.shape == (len(whole) // 7, 8)
    assert batch.dtype == torch.int64
    assert batch[:, 0].tolist() == [1] * len(batch)
    assert batch[:, 1:].flatten().tolist() == whole[: len(batch) * 7]
    assert made.decode(batch[0, 1:]) == "the cat sat on the mat the"


def test_a_tokenizer_that_puts_nothing_in_front_leaves_all_positions_to_the_text(
    model: wd.Pretrained, text: Path, tmp_path: Path
):
    batches = wd.text_batches(model, text, length=8, tokenizer_from=tokenizer_in(tmp_path / "own", lead=False))

    assert 1 not in torch.cat(batches)


def test_a_model_of_the_users_own_takes_a_tokenizer(text: Path, directory: Path):
    own = Calls(lambda m, x: m.read(m.embed(x)), embed=nn.Embedding(61, 4), read=nn.Linear(4, 61)).eval()

    (batch,) = wd.text_batches(own, text, length=8, tokenizer_from=directory)

    assert batch.shape[1] == 8
    with pytest.raises(ValueError, match="a Calls has no tokenizer; give the directory of one as --tokenizer"):
        wd.text_batches(own, text, length=8)


def test_lines_of_text_are_the_inputs_of_an_encoder(text: Path, tmp_path: Path):
    saved("bert", tmp_path / "bert")
    encoder = wd.load_hf(tokenizer_in(tmp_path / "bert"))

    (batch,) = wd.text_batches(encoder, text)

    assert batch["input_ids"].shape == (12, 7)
    assert batch["attention_mask"].sum(1).tolist() == [7, 6, 5] * 4
    alone = encoder(batch["input_ids"][1:2, :6])
    assert_close(encoder(**batch)[1:2, :6], alone, rtol=1e-4, atol=1e-5)


def test_a_line_beyond_the_context_is_named(text: Path, tmp_path: Path):
    saved("bert", tmp_path / "bert")
    encoder = wd.load_hf(tokenizer_in(tmp_path / "bert"))
    text.write_text("the cat\n\n" + "mat " * CONTEXT)

    with pytest.raises(ValueError, match=rf"line 3 of '.*', .* has {CONTEXT + 1} tokens, .* at most 32"):
        wd.text_batches(encoder, text)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "text.txt' holds no text"),
        (b" \n\n", "text.txt' holds no text"),
        ("un café".encode("latin-1"), r"text.txt' is not UTF-8 \(byte 6 is 0xe9\); convert it"),
        (b"the cat", "text.txt' has 2 tokens, fewer than one input of 8; give more text"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(model: wd.Pretrained, text: Path, content: bytes, message: str):
    text.write_bytes(content)

    with pytest.raises(ValueError, match=message):
        wd.text_batches(model, text, length=8)


def test_a_missing_text_is_named(model: wd.Pretrained, text: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no file '.*texts.txt'; did you mean one of \['.*text.txt'\]"):
        wd.text_batches(model, tmp_path / "texts.txt")
    with pytest.raises(ValueError, match="is a directory, expected a text file"):
        wd.text_batches(model, tmp_path)


def test_a_tokenizer_of_another_model_is_refused_whatever_the_text(model: wd.Pretrained, text: Path, tmp_path: Path):
    other = tokenizer_in(tmp_path / "other", 200)

    with pytest.raises(ValueError, match=r"tokenizer in '.*other' has 200 tokens, but the model's vocabulary is 61"):
        wd.text_batches(model, text, length=8, tokenizer_from=other)


def test_tokens_added_beyond_the_model_are_refused_where_they_are_used(
    model: wd.Pretrained, text: Path, tmp_path: Path
):
    from tokenizers import Tokenizer

    folder = tokenizer_in(tmp_path / "own", VOCABULARY)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens(["<pad>"])
    made.save(str(folder / "tokenizer.json"))

    assert wd.text_batches(model, text, length=8, tokenizer_from=folder)
    text.write_text("the <pad> " * 8)
    message = r"with the tokenizer in '.*own' gives token ids outside the model's vocabulary of 61 \(such as \[61\]"
    with pytest.raises(ValueError, match=message):
        wd.text_batches(model, text, length=8, tokenizer_from=folder)


def test_a_directory_without_a_tokenizer_is_refused(text: Path, tmp_path: Path):
    saved("gpt2", tmp_path / "gpt2")

    with pytest.raises(ValueError, match="gpt2' has no tokenizer, which is one of tokenizer.json, .* or token ids"):
        wd.text_batches(wd.load_hf(tmp_path / "gpt2"), text)
    with pytest.raises(ValueError, match="there is no directory 'gpt2'; give a local one, as nothing is downloaded"):
        wd.text_batches(wd.load_hf(tmp_path / "gpt2"), text, tokenizer_from="gpt2")


@pytest.mark.parametrize("name, content", [("tokenizer.json", "{"), ("tokenizer_config.json", "[]")])
def test_a_damaged_tokenizer_is_refused(model: wd.Pretrained, text: Path, tmp_path: Path, name: str, content: str):
    folder = tokenizer_in(tmp_path / "own")
    (folder / name).write_text(content)

    with pytest.raises(ValueError, match="the tokenizer in '.*own' cannot be read .*; restore its files"):
        wd.text_batches(model, text, tokenizer_from=folder)


@pytest.mark.parametrize("length, told", [(CONTEXT + 1, "--length .*: inputs would have 33 .* most 32"), (0, "got 0")])
def test_a_length_that_the_model_cannot_read_is_refused(model: wd.Pretrained, text: Path, length: int, told: str):
    with pytest.raises(ValueError, match=told):
        wd.text_batches(model, text, length=length)
    with pytest.raises(ValueError, match=told):
        wd.sampled_batches(model, 2, length=length)


def test_a_length_without_room_for_text_is_refused(model: wd.Pretrained, text: Path):
    with pytest.raises(ValueError, match=r"--length \(length=\): 1 leaves no room for text, as .* puts 1 in front of"):
        wd.text_batches(model, text, length=1)


# ------------------------------------------------------------------------------------------ files of ids


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int64, np.dtype(">i4")])
def test_ids_of_a_file_come_as_they_are(model: wd.Pretrained, tmp_path: Path, dtype: Any):
    rows = ids(VOCABULARY, 100, 7)
    np.save(tmp_path / "ids.npy", rows.numpy().astype(dtype))

    batches = wd.token_batches(model, tmp_path / "ids.npy")

    assert len(batches) == 2
    assert_close(torch.cat(batches), rows, rtol=0, atol=0)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.full((3, 4), VOCABULARY), r"outside the model's vocabulary of 61 \(such as \[61\]\)"),
        (np.array([[0, -1]]), r"outside the model's vocabulary of 61 \(such as \[-1\]\)"),
        (
            np.zeros((2, CONTEXT + 1), int),
            "the rows of '.*' have 33 tokens, but the model reads at most 32",
        ),
        (np.zeros((2, 3)), r"holds float64 \(2, 3\), expected integers \(input, position\)"),
        (np.zeros(3, int), r"holds int64 \(3,\), expected integers"),
        (np.zeros((0, 3), int), r"holds int64 \(0, 3\), expected integers"),
        (np.array([["a"]]), "expected integers"),
        (np.array([[2**64 - 1, 3]], np.uint64), "ids.npy' holds the id 18446744073709551615, which no vocabulary has"),
    ],
    ids=["beyond", "negative", "too long", "floats", "one axis", "empty", "text", "too large"],
)
def test_ids_that_the_model_cannot_read_are_refused(
    model: wd.Pretrained, tmp_path: Path, array: np.ndarray, message: str
):
    np.save(tmp_path / "ids.npy", array)

    with pytest.raises(ValueError, match=message):
        wd.token_batches(model, tmp_path / "ids.npy")


def test_a_file_that_is_no_array_is_refused(model: wd.Pretrained, tmp_path: Path):
    path = tmp_path / "ids.npy"
    with pytest.raises(ValueError, match="there is no file '.*ids.npy'"):
        wd.token_batches(model, path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="ids.npy' is no whole .npy file of numbers .* use numpy.save"):
        wd.token_batches(model, path)
    path.write_text("12 13 14")
    with pytest.raises(ValueError, match="ids.npy' is no .npy file; write one with numpy.save, or give a text as --te"):
        wd.token_batches(model, path)
    with pytest.raises(ValueError, match="is a directory, expected a .npy file"):
        wd.token_batches(model, tmp_path)
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="ids.npy' is no whole .npy file of numbers"):
        wd.token_batches(model, path)


# ------------------------------------------------------------------------------------------ samples


def test_samples_start_as_texts_do_and_depend_on_the_seed_alone(model: wd.Pretrained):
    state = torch.random.get_rng_state()

    first = wd.sampled_batches(model, 70, length=5, seed=3)

    assert [batch.shape for batch in first] == [(64, 5), (6, 5)]
    assert {int(token) for batch in first for token in batch[:, 0]} == {1}
    assert_close(wd.sampled_batches(model, 70, length=5, seed=3), first, rtol=0, atol=0)
    assert not torch.equal(wd.sampled_batches(model, 70, length=5, seed=4)[0], first[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_samples_follow_the_models_probabilities():
    """A model that knows the last token alone: counts of what follows 0 against its softmax."""
    logits = torch.tensor([[0.0, 1.0, -1.0], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    own = Calls(lambda m, x: m.table(x), table=nn.Embedding.from_pretrained(logits)).eval()

    rows = torch.cat(wd.sampled_batches(own, 512, length=20, start=0))

    after = rows[:, 1:][rows[:, :-1] == 0]
    counts = torch.bincount(after, minlength=3) / len(after)
    # About 4,000 draws, so one standard error is .008.
    assert_close(counts, logits[0].softmax(-1), rtol=0, atol=0.03)


def test_what_cannot_be_sampled_is_refused(model: wd.Pretrained, tmp_path: Path):
    own = Calls(lambda m, x: m.table(x), table=nn.Embedding(3, 3)).eval()
    saved("bert", tmp_path)

    with pytest.raises(ValueError, match="a Calls says nowhere which token begins a text .*; give it as start= from"):
        wd.sampled_batches(own, 2)
    with pytest.raises(ValueError, match="the number of sequences must be at least 1, got 0"):
        wd.sampled_batches(model, 0, length=4)
    with pytest.raises(ValueError, match="a BertModel is no causal language model; give it text or tokens"):
        wd.sampled_batches(wd.load_hf(tmp_path), 2, length=4)
    with pytest.raises(ValueError, match="start gives token ids outside the model's vocabulary of 61"):
        wd.sampled_batches(model, 2, length=4, start=61)


def test_weights_that_are_not_finite_are_named_before_anything_is_sampled(directory: Path):
    model = wd.load_hf(directory)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = torch.nan

    with pytest.raises(ValueError, match="parameter 'model.norm.weight' contains NaN or infinity"):
        wd.sampled_batches(model, 2, length=4)


@pytest.mark.parametrize(
    "own, message",
    [
        (nn.Linear(2, 2), "the model fails on the first token of a sequence: .*; sampling takes a module that maps"),
        (
            Calls(lambda m, x: m.t(x)[:, 0], t=nn.Embedding(3, 3)),
            r"has shape \(1, 3\), expected logits \(1, 1, token\)",
        ),
        (
            Calls(lambda m, x: m.t(x) / 0, t=nn.Embedding(3, 3)),
            "on what it wrote contains NaN or infinity; load it",
        ),
    ],
    ids=["no ids", "one answer a text", "not finite"],
)
def test_a_module_that_gives_no_logits_is_refused(own: nn.Module, message: str):
    with pytest.raises(ValueError, match=message):
        wd.sampled_batches(own, 2, length=4, start=1)


def test_a_model_of_transformers_itself_can_be_sampled(model: wd.Pretrained):
    found = wd.sampled_batches(model.inner, 3, length=4, start=1)

    assert_close(found, wd.sampled_batches(model, 3, length=4), rtol=0, atol=0)


def test_a_model_of_pictures_takes_no_text(text: Path, tmp_path: Path):
    saved("vit", tmp_path / "vit")
    vit = wd.load_hf(tmp_path / "vit")
    np.save(tmp_path / "ids.npy", np.ones((2, 3), int))

    ways = (
        lambda: wd.token_batches(vit, tmp_path / "ids.npy"),
        lambda: wd.text_batches(vit, text),
        lambda: wd.sampled_batches(vit, 2),
    )
    for read in ways:
        with pytest.raises(
            ValueError, match="a ViTForImageClassification reads pixel_values, not token ids; .* --data"
        ):
            read()


@pytest.mark.data
def test_a_trained_model_writes_what_it_finds_likely(shared_data: Path):
    trained = wd.load_hf(shared_data / "stories260k")

    (rows,) = wd.sampled_batches(trained, 16, length=48)

    with torch.no_grad():
        nats = nn.functional.cross_entropy(trained(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert 0.8 < nats < 2  # its other samples have 1.3
