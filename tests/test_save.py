import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import QUICK, case, mlp, sparse
from weightdecomp import _storage


@pytest.fixture(scope="module")
def saved(decomposed: wd.Decomposition, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "run"
    decomposed.save(directory)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def altered(directory: Path, change: dict[str, Any]) -> None:
    """Rewrite the document with changes, as a whole artefact that another program might have written."""
    tensors, document = _storage.read(directory, "decomposition")
    _storage.write(directory, "decomposition", tensors, document | change)


def test_loading_gives_what_was_saved_bit_by_bit(decomposed: wd.Decomposition, saved: Path):
    loaded = wd.load(saved, decomposed.target)

    inputs = sparse(32, 5, seed=9)
    masks = decomposed.importances(inputs)
    assert all(torch.equal(found, masks[path]) for path, found in loaded.importances(inputs).items())
    assert torch.equal(loaded.ablate(inputs, masks), decomposed.ablate(inputs, masks))
    assert str(loaded) == str(decomposed)
    assert loaded.outcome == decomposed.outcome
    assert loaded.outcome.made is not None
    assert loaded.config == decomposed.config
    assert loaded.skipped == decomposed.skipped
    assert [one.members for one in loaded.circuits] == [one.members for one in decomposed.circuits]
    for path, parts in decomposed.parts.items():
        for index in range(parts.pieces.n):
            assert torch.equal(loaded.component(path, index).weight, decomposed.component(path, index).weight)
            assert loaded.component(path, index).frequency == decomposed.component(path, index).frequency


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
@pytest.mark.parametrize("name", ["one module twice", "tied embedding and head", "weight norm", "conv2d"])
def test_every_kind_of_site_is_found_again(name: str, quick: None, tmp_path: Path):
    target = case(name)
    decomposition = wd.decompose(target.model, [target.batch], config=QUICK, progress=False)
    decomposition.save(tmp_path)

    loaded = wd.load(tmp_path, target.model)

    assert [(site.path, site.n_calls) for site in loaded.sites] == list(target.n_calls.items())
    found, expected = loaded.importances(target.batch), decomposition.importances(target.batch)
    assert all(torch.equal(found[path], x) for path, x in expected.items())


def test_saving_again_replaces_the_folder(decomposed: wd.Decomposition, copied: Path):
    decomposed.save(copied)

    assert str(wd.load(copied, decomposed.target)) == str(decomposed)
    assert len(list(copied.iterdir())) == 2


def test_a_model_with_another_weight_is_refused_with_the_sites_name(saved: Path):
    other = mlp()
    with torch.no_grad():
        other[2].weight[0, 0] += 1e-6

    with pytest.raises(ValueError, match="decomposes another model: the weight of '2' differs; load the checkpoint"):
        wd.load(saved, other)


def test_a_model_without_the_site_is_refused_with_the_sites_name(saved: Path):
    with pytest.raises(ValueError, match="decomposes another model: this one has no weight matrix at '2'"):
        wd.load(saved, nn.Sequential(mlp()[0], nn.ReLU()))


def test_a_model_with_another_bias_is_refused(saved: Path):
    other = mlp()
    with torch.no_grad():
        other[0].bias += 1

    with pytest.raises(ValueError, match="the sites' weights agree but other parameters differ"):
        wd.load(saved, other)


def test_a_newer_format_says_to_upgrade(copied: Path):
    path = copied / "decomposition.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))

    with pytest.raises(ValueError, match="has format 99, .* upgrade weightdecomp"):
        wd.load(copied, mlp())


def test_unknown_settings_are_refused_by_name(decomposed: wd.Decomposition, copied: Path):
    altered(copied, {"config": decomposed.config.to_dict() | {"sparsity": 0.1}})

    with pytest.raises(ValueError, match=r"unknown settings \['sparsity'\]; this version knows"):
        wd.load(copied, mlp())


def test_settings_out_of_range_are_refused(decomposed: wd.Decomposition, copied: Path):
    altered(copied, {"config": decomposed.config.to_dict() | {"capacity": 0.5}})

    with pytest.raises(ValueError, match="capacity must be at least 1 and finite, got 0.5"):
        wd.load(copied, mlp())


@pytest.mark.parametrize("change", [{"sites": None}, {"outcome": {"unknown": 1}}, {"groups": 3}])
def test_a_document_of_another_form_is_refused(copied: Path, change: dict[str, Any]):
    altered(copied, change)

    with pytest.raises(ValueError, match="is not what this version of weightdecomp writes"):
        wd.load(copied, mlp())


def test_tensors_of_another_form_are_refused(copied: Path):
    tensors, document = _storage.read(copied, "decomposition")
    _storage.write(copied, "decomposition", {k: x for k, x in tensors.items() if k != "0|u"}, document)

    with pytest.raises(ValueError, match=r"is not what this version of weightdecomp writes .*0\|u"):
        wd.load(copied, mlp())


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_byte_changed_anywhere_is_refused_or_makes_no_difference(data: st.DataObject, copied: Path):
    path = data.draw(st.sampled_from(sorted(copied.iterdir())))
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    byte = data.draw(st.integers(0, 255))
    path.write_bytes(original[:position] + bytes([byte]) + original[position + 1 :])

    try:
        loaded = wd.load(copied, mlp())
        # Only the JSON's white space and the case of its escapes can change without being noticed.
        assert byte == original[position] or path.suffix == ".json"
        assert loaded.tolerance == 0.02
    except ValueError:
        assert byte != original[position]
    finally:
        path.write_bytes(original)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused(data: st.DataObject, copied: Path):
    path = data.draw(st.sampled_from(sorted(copied.iterdir())))
    original = path.read_bytes()
    path.write_bytes(original[: data.draw(st.integers(0, len(original) - 1))])

    try:
        with pytest.raises(ValueError):
            wd.load(copied, mlp())
    finally:
        path.write_bytes(original)


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_a_pickle_is_never_loaded(copied: Path, tmp_path: Path, suffix: str, dump: Any):
    (path,) = copied.glob(f"*{suffix}")
    with path.open("wb") as stream:
        dump(Trap(tmp_path / "sprung"), stream)

    with pytest.raises(ValueError, match="is a pickle, expected .*; nothing is ever unpickled"):
        wd.load(copied, mlp())

    assert not (tmp_path / "sprung").exists()


def test_a_missing_folder_is_named_with_the_nearest(saved: Path):
    with pytest.raises(ValueError, match=f"there is no directory .*did you mean one of .*{saved.name}"):
        wd.load(saved.with_name("runn"), mlp())


def test_a_full_disk_says_so_and_leaves_what_was_there(
    decomposed: wd.Decomposition, copied: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    changed = wd.load(copied, mlp())
    changed.tolerance = 0.5
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full: .* Free some space"):
        patch.setattr(os, "fsync", full)
        changed.save(copied)

    assert wd.load(copied, mlp()).tolerance == decomposed.tolerance


def test_a_folder_with_something_else_is_not_written_to(decomposed: wd.Decomposition, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("do not lose this")

    with pytest.raises(ValueError, match="not empty and holds no decomposition, but 'thesis.txt'"):
        decomposed.save(tmp_path)


def largest(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().amax(-1)


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_a_run_with_a_divergence_of_its_own_is_loaded_with_it(quick: None, tmp_path: Path):
    inputs = sparse(64, 5)
    decomposition = wd.decompose(mlp(), [inputs], config=QUICK, divergence=largest, progress=False)
    decomposition.save(tmp_path)

    with pytest.raises(ValueError, match="used the divergence 'largest' of its own; pass it as divergence="):
        wd.load(tmp_path, mlp())
    loaded = wd.load(tmp_path, mlp(), divergence=largest)

    zeros = torch.zeros(64, 3)
    assert_close(loaded.divergence(zeros + 2, zeros), torch.full((64,), 4.0))
    assert loaded.divergence.name == "largest"
