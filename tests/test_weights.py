import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.test_storage import Bomb
from weightdecomp._weights import read_weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}


def test_weights_read_back(tmp_path: Path):
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")

    weights = read_weights(tmp_path / "model.safetensors")

    assert_close(weights, TENSORS, rtol=0, atol=0)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_state_dict_reads_back(tmp_path: Path, zipped: bool):
    torch.save(TENSORS, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)

    assert_close(read_weights(tmp_path / "model.pt"), TENSORS, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dump",
    [
        torch.save,
        lambda bomb, path: torch.save(bomb, path, _use_new_zipfile_serialization=False),
        lambda bomb, path: path.write_bytes(pickle.dumps({"weight": bomb})),
    ],
    ids=["zip", "legacy", "bare"],
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, dump: Any):
    path = tmp_path / "model.pt"
    dump(Bomb(tmp_path / "exploded"), path)

    with pytest.raises(ValueError, match="model.pt' is a pickle that holds more than tensors.*save the weights alone"):
        read_weights(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "inside, told",
    [
        ({"state_dict": TENSORS, "epoch": 3}, r"a dict of \['epoch', 'state_dict'\]"),
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({0: torch.ones(2)}, r"a dict of \['0'\]"),
    ],
)
def test_a_pickle_of_something_else_than_named_tensors_is_told_apart(tmp_path: Path, inside: Any, told: str):
    torch.save(inside, tmp_path / "model.pt")

    with pytest.raises(ValueError, match=f"model.pt' holds {told}, expected tensors by name; save model.state_dict"):
        read_weights(tmp_path / "model.pt")


def test_missing_weights_are_named_with_the_nearest(tmp_path: Path):
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")

    with pytest.raises(ValueError, match=r"no file '.*modle.safetensors'; did you mean one of .*model.safetensors"):
        read_weights(tmp_path / "modle.safetensors")


def test_a_directory_of_weights_is_named_with_what_it_holds(tmp_path: Path):
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")

    with pytest.raises(ValueError, match=r"is a directory, .* it holds \['model.safetensors'\]"):
        read_weights(tmp_path)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=300)
def test_weights_cut_or_with_a_damaged_header_raise_nothing_but_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, seed: int
):
    draw = random.Random(seed)
    whole = safetensors.torch.save(TENSORS)
    damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.5 else whole)
    for position in (draw.randrange(len(whole)) for _ in range(draw.randrange(1, 4))):
        if position < len(damaged):
            damaged[position] ^= 1 << draw.randrange(8)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    path.write_bytes(damaged)

    try:
        read_weights(path)
    except ValueError as error:
        assert str(path) in str(error)
