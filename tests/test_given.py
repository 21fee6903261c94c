import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import ids
from weightdecomp.__main__ import main
from weightdecomp._given import add_model, model_and_batches

pytest.importorskip("transformers")

from tests.hf_models import saved


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fused queries, keys and values, and a file of ids beside it."""
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    saved("gpt2", folder)
    np.save(folder.with_name("ids.npy"), ids(61, 32, 7).numpy())
    return folder


def given(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model(parser)
    return parser.parse_args([str(word) for word in words])


def test_ids_of_a_file_reach_the_model_unchanged(gpt2: Path):
    _, batches = model_and_batches(given(["--hf", gpt2, "--tokens", gpt2.with_name("ids.npy")]))

    assert_close(torch.cat(list(batches)), ids(61, 32, 7), rtol=0, atol=0)


@pytest.mark.parametrize(
    "words, paths",
    [
        (["--split"], {"h.0.attn.c_attn.q", "h.1.attn.c_attn.v"}),
        (["--split", "*.c_attn=q:16,k:16,v:16"], {"h.0.attn.c_attn.q", "h.1.attn.c_attn.v"}),
        (["--fold-norms"], {"h.0.attn.c_attn"}),
        (
            ["--split", "*.h.0.attn.c_attn=(a:8,b:4)*4", "--split", "*.c_fc=one:24,two:40", "--fold-norms"],
            {"h.0.attn.c_attn.b", "h.1.attn.c_attn", "h.1.mlp.c_fc.two"},
        ),
    ],
)
def test_a_prepared_model_computes_the_same(gpt2: Path, words: list[str], paths: set[str]):
    model, batches = model_and_batches(given(["--hf", gpt2, "--sample", "8", "--length", "5", *words]))
    (x,) = batches

    with torch.no_grad():
        output, expected = model(x), wd.load_hf(gpt2)(x)
    assert_close(output, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert {f"transformer.{path}" for path in paths} <= dict(model.named_modules()).keys()
    norm = model.get_submodule("transformer.h.0.ln_1")
    assert bool((norm.weight == 1).all()) == ("--fold-norms" in words)


def test_another_seed_draws_other_sequences(gpt2: Path):
    words = ["--hf", gpt2, "--sample", "8", "--length", "5"]

    first, again, other = (list(model_and_batches(given([*words, *more]))[1])
                           for more in ([], ["--sample-seed", "0"], ["--sample-seed", "1"]))  # fmt: skip

    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--split", "c_attn"], "--split: expected PATTERN=name:rows,name:rows or .*, got 'c_attn'"),
        (["--split", "*.c_attn=q:x"], "--split: expected PATTERN"),
        (
            ["--split", "*.c_attn=q:16,k:16"],
            "split of 'transformer.h.0.attn.c_attn': q 16, k 16 are 32 rows, but .* 48",
        ),
        (["--split", "*.c_attn=(q:16,k:16,v:16"], "--split: expected PATTERN"),
        (["--split", "*.c_attn=q:16,k:16,v:16)*1"], "--split: expected PATTERN"),
        (["--split", "*.c_attn=(q:1,k:1,v:1)*99999999"], "--split: expected PATTERN.* of at most 9999 heads, got"),
        (["--split", "*.c_attn=q:48", "--split", "*.c_attn=k:48"], r"--split: '\*.c_attn' is given twice"),
        (
            ["--split", "*.c_attn=q:48", "--split", "*.0.attn.*=k:48"],
            r"split: '\*.c_attn' and '\*.0.attn.\*' both match 'transformer.h.0.attn.c_attn'; name it by one of them",
        ),
        (["--split", "--split", "*.c_attn=q:48"], "give it once without a value, or with patterns alone"),
        (["--weights", "some.safetensors"], "--weights belongs to --model; the weights of --hf are in its directory"),
        (["--tokenizer", "somewhere"], "--tokenizer belongs to --text"),
        (["--length", "4"], "--length belongs to --text and --sample"),
        (["--sample-seed", "1"], "--sample-seed belongs to --sample"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(gpt2: Path, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        model_and_batches(given(["--hf", gpt2, "--tokens", gpt2.with_name("ids.npy"), *words]))


@pytest.mark.parametrize("words", [["--hf", "a", "--model", "b:c", "--sample", "3"], ["--hf", "a"], ["--sample", "3"],
                                   ["--hf", "a", "--sample", "3", "--data", "b:c"]])  # fmt: skip
def test_one_model_and_one_source_of_inputs_are_needed(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        given(words)

    assert "not allowed with argument" in (said := capsys.readouterr().err) or "is required" in said


def test_a_directory_is_decomposed_and_verified_on_the_command_line(
    gpt2: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
):
    model = ["--hf", str(gpt2), "--tokens", str(gpt2.with_name("ids.npy")), "--no-progress"]
    sites = ["--sites", "*.h.0.attn.c_attn.v", "--steps", "0"]

    made = main(["decompose", *model, "--split", *sites, "--out", str(tmp_path / "out")])
    checked = main(["verify", str(tmp_path / "out"), *model, "--split", "--steps", "20"])

    assert made in (0, 1)
    assert checked in (0, 1)
    assert "transformer.h.0.attn.c_attn.v" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out"), *model, "--steps", "20"]) == 2
    assert "no weight matrix at 'transformer.h.0.attn.c_attn.v'; prepare it in the same way" in capsys.readouterr().err


def test_a_mistake_in_a_directory_ends_with_exit_code_two(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code = main(["decompose", "--hf", str(gpt2), "--text", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")])

    assert code == 2
    assert "has no tokenizer" in capsys.readouterr().err
