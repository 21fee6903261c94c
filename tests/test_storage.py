import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from weightdecomp import _storage

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]
TENSORS = {"layers.0/u": torch.arange(6.0).view(2, 3), "layers.0/owner": torch.tensor([0, 1])}
DOCUMENT = {"seed": 0, "sites": ["layers.0", "é"], "config": {"tolerance": 0.02, "steps": None}}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    _storage.write(directory, "toy", TENSORS, DOCUMENT)
    return directory


def tensor_file(directory: Path) -> Path:
    (path,) = directory.glob("toy.*.safetensors")
    return path


def assert_holds(directory: Path, tensors: dict[str, Tensor], document: dict) -> None:
    """The artefact reads back equal, bit by bit, and nothing else is left in the directory."""
    read_tensors, read_document = _storage.read(directory, "toy")
    assert read_document == document
    assert_close(read_tensors, tensors, rtol=0, atol=0)
    assert len(list(directory.iterdir())) == 2


def edit(directory: Path, **changes: object) -> None:
    """Change top-level entries of the JSON and make its checksum right again; None removes one."""
    path = directory / "toy.json"
    content = {**json.loads(path.read_text()), **changes}
    content = {key: value for key, value in content.items() if value is not None and key != "sha256"}
    path.write_text(json.dumps(content | {"sha256": _storage._checksum(content)}))


# ------------------------------------------------------------------------------------------ round trips


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    name=st.text(min_size=1).filter(lambda name: name != "__metadata__"),
    document=st.dictionaries(st.text(), json_values, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_reading_gives_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    shape: list[int],
    name: str,
    document: dict,
    seed: int,
):
    rng = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(shape, generator=rng) * 100).to(dtype)
    directory = tmp_path_factory.mktemp("run")

    _storage.write(directory, "toy", {name: tensor}, document)

    assert_holds(directory, {name: tensor}, document)


def test_views_that_share_memory_are_written_apart(tmp_path: Path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "transposed": whole.T, "tied": whole, "slice": whole[:, 1], "empty": whole[:0]}

    _storage.write(tmp_path, "toy", tensors, {})

    assert_holds(tmp_path, tensors, {})


def test_an_artefact_without_tensors_reads_back(tmp_path: Path):
    _storage.write(tmp_path, "toy", {}, DOCUMENT)

    assert_holds(tmp_path, {}, DOCUMENT)


def test_values_that_are_not_finite_read_back(tmp_path: Path):
    _storage.write(tmp_path, "toy", {"a": torch.tensor([torch.nan, torch.inf])}, {"loss": float("inf")})

    tensors, document = _storage.read(tmp_path, "toy")
    assert document == {"loss": float("inf")}
    assert_close(tensors["a"], torch.tensor([torch.nan, torch.inf]), equal_nan=True)


def test_tuples_come_back_as_lists_and_keys_as_strings(tmp_path: Path):
    _storage.write(tmp_path, "toy", {}, {"shape": (2, 3), "counts": {2: "two", 10: "ten"}})

    document = _storage.read(tmp_path, "toy").document
    assert document == {"shape": [2, 3], "counts": {"2": "two", "10": "ten"}}


def test_writing_again_replaces_the_artefact_and_nothing_else(saved: Path):
    (saved / "report.md").write_text("words")

    _storage.write(saved, "toy", {"a": torch.ones(1)}, {"seed": 1})

    assert (saved / "report.md").read_text() == "words"
    (saved / "report.md").unlink()
    assert_holds(saved, {"a": torch.ones(1)}, {"seed": 1})


def test_writing_the_same_again_changes_nothing(saved: Path):
    _storage.write(saved, "toy", TENSORS, DOCUMENT)

    assert_holds(saved, TENSORS, DOCUMENT)


def test_an_artefact_exists_from_its_first_write(saved: Path):
    assert (_storage.exists(saved, "toy"), _storage.exists(saved, "other")) == (True, False)


# ------------------------------------------------------------------------------------------ refusals to write


def test_a_directory_with_something_else_in_it_is_refused_by_name(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("words")

    with pytest.raises(ValueError, match=r"is not empty and holds no toy, but 'thesis.tex'; choose a new"):
        _storage.write(tmp_path, "toy", TENSORS, DOCUMENT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_with_another_artefact_is_refused(saved: Path):
    with pytest.raises(ValueError, match=r"holds no other, but 'toy\.[0-9a-f]{16}\.safetensors' and 1 more"):
        _storage.check_vacant(saved, "other")


def test_an_artefact_that_cannot_be_read_is_not_replaced(saved: Path):
    (saved / "toy.json").write_text("{}")

    with pytest.raises(ValueError, match="will not replace what is in .*; move it away first"):
        _storage.write(saved, "toy", TENSORS, DOCUMENT)


def test_a_file_where_a_directory_is_expected_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("words")

    with pytest.raises(ValueError, match="it is a file, expected a directory"):
        _storage.write(tmp_path / "run", "toy", TENSORS, DOCUMENT)


def test_what_a_killed_first_write_left_is_no_obstacle(tmp_path: Path):
    (tmp_path / ".toy.json.tmp").write_text("{")
    (tmp_path / ".toy.0123456789abcdef.safetensors.tmp").write_text("")
    (tmp_path / "toy.0123456789abcdef.safetensors").write_text("")

    _storage.write(tmp_path, "toy", TENSORS, DOCUMENT)

    assert_holds(tmp_path, TENSORS, DOCUMENT)


# ------------------------------------------------------------------------------------------ refusals to read


def test_a_missing_directory_is_named_with_the_nearest(saved: Path):
    with pytest.raises(ValueError, match=r"no directory '.*/runn'; did you mean one of \['.*/run'\]"):
        _storage.read(saved.with_name("runn"), "toy")


def test_a_missing_artefact_is_named_with_what_is_there(saved: Path):
    with pytest.raises(ValueError, match=r"holds no decomposition: .*'decomposition.json'; it holds \['toy'\]"):
        _storage.read(saved, "decomposition")


def test_a_file_given_as_directory_is_refused(saved: Path):
    with pytest.raises(ValueError, match="is a file, expected the directory that a toy was saved to$"):
        _storage.read(saved / "toy.json", "toy")


def test_a_pickle_given_as_directory_is_refused(tmp_path: Path):
    torch.save(TENSORS, tmp_path / "run.pt")

    with pytest.raises(ValueError, match="it is a pickle, and nothing is ever unpickled"):
        _storage.read(tmp_path / "run.pt", "toy")


def test_a_newer_format_says_to_upgrade(saved: Path):
    edit(saved, format=2)

    with pytest.raises(ValueError, match=r"has format 2, .* reads up to 1: upgrade weightdecomp"):
        _storage.read(saved, "toy")


def test_another_kind_is_refused(saved: Path):
    edit(saved, kind="graph")

    with pytest.raises(ValueError, match="holds a 'graph', expected a 'toy'"):
        _storage.read(saved, "toy")


def test_unknown_keys_are_refused_by_name(saved: Path):
    edit(saved, extra=1)

    with pytest.raises(ValueError, match=r"unknown keys \['extra'\]"):
        _storage.read(saved, "toy")


@pytest.mark.parametrize("changes", [{"tensors": {"sha256": "0"}}, {"document": []}, {"tensors": 3}])
def test_entries_of_the_wrong_form_are_refused(saved: Path, changes: dict):
    edit(saved, **changes)

    with pytest.raises(ValueError, match="does not say which tensors belong to it"):
        _storage.read(saved, "toy")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", "[]", "3", '{"format": true}', '{"format": 0}'])
def test_a_malformed_document_is_refused(saved: Path, text: str):
    (saved / "toy.json").write_text(text)

    with pytest.raises(ValueError, match="is not JSON|is no artefact of weightdecomp"):
        _storage.read(saved, "toy")


def test_a_document_edited_by_hand_is_refused(saved: Path):
    path = saved / "toy.json"
    path.write_text(path.read_text().replace("0.02", "0.03"))

    with pytest.raises(ValueError, match=r"toy.json' was altered after it was written"):
        _storage.read(saved, "toy")


def test_missing_tensors_are_refused(saved: Path):
    tensor_file(saved).unlink()

    with pytest.raises(ValueError, match="is missing: the toy in .* is incomplete"):
        _storage.read(saved, "toy")


def test_truncated_tensors_are_refused(saved: Path):
    path = tensor_file(saved)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ValueError, match=r"bytes, expected \d+"):
        _storage.read(saved, "toy")


def test_altered_tensors_are_refused(saved: Path):
    path = tensor_file(saved)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(ValueError, match=r"safetensors' was altered after it was written"):
        _storage.read(saved, "toy")


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("dump", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_a_pickle_among_the_tensors_is_never_loaded(saved: Path, dump):
    dump(Bomb(saved / "exploded"), tensor_file(saved))

    with pytest.raises(ValueError, match="is a pickle, expected safetensors; nothing is ever unpickled"):
        _storage.read(saved, "toy")
    assert not (saved / "exploded").exists()


def test_a_pickle_in_place_of_the_document_is_never_loaded(saved: Path):
    (saved / "toy.json").write_bytes(pickle.dumps(Bomb(saved / "exploded")))

    with pytest.raises(ValueError, match="is a pickle, expected JSON; nothing is ever unpickled"):
        _storage.read(saved, "toy")
    assert not (saved / "exploded").exists()


def assert_refused_or_equal(directory: Path) -> None:
    try:
        tensors, document = _storage.read(directory, "toy")
    except ValueError:
        return
    assert document == DOCUMENT
    assert_close(tensors, TENSORS, rtol=0, atol=0)


@pytest.mark.parametrize("pattern", ["toy.json", "toy.*.safetensors"])
@given(seed=st.integers(0, 2**32 - 1), n_flips=st.integers(1, 4), cut=st.booleans())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_damaged_artefact_is_refused_or_reads_as_written(
    saved: Path, pattern: str, seed: int, n_flips: int, cut: bool
):
    draw = random.Random(seed)
    (path,) = saved.glob(pattern)
    whole = path.read_bytes()
    damaged = bytearray(whole[: draw.randrange(1, len(whole))] if cut else whole)
    for _ in range(n_flips):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)

    path.write_bytes(damaged)

    assert_refused_or_equal(saved)
    path.write_bytes(whole)


@pytest.mark.parametrize("pattern", ["toy.json", "toy.*.safetensors"])
def test_an_artefact_cut_anywhere_is_refused(saved: Path, pattern: str):
    (path,) = saved.glob(pattern)
    whole = path.read_bytes()

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"toy\."):
            _storage.read(saved, "toy")


# ------------------------------------------------------------------------------------------ broken off


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["disk full", "disk broken"])
@pytest.mark.parametrize("step", range(4))
def test_a_failed_write_leaves_the_earlier_artefact(
    saved: Path, monkeypatch: pytest.MonkeyPatch, step: int, error: int
):
    """Fails at each sync: tensors written, document written, tensors moved, document moved."""
    calls = iter(range(100))
    sync = os.fsync

    def fails(descriptor: int) -> None:
        if next(calls) == step:
            raise OSError(error, os.strerror(error))
        sync(descriptor)

    monkeypatch.setattr(_storage.os, "fsync", fails)

    with pytest.raises(OSError) as caught:
        _storage.write(saved, "toy", {"a": torch.ones(1)}, {})
    assert caught.value.errno == error
    assert_holds(saved, *((TENSORS, DOCUMENT) if step < 3 else ({"a": torch.ones(1)}, {})))


def test_a_full_disk_says_what_to_do(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_storage.os, "fsync", fails)

    with pytest.raises(OSError, match=r"needs \d+ bytes in .*intact. Free some space, or save to another"):
        _storage.write(saved, "toy", TENSORS, {})


def test_an_interrupted_write_leaves_the_earlier_artefact(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupts(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_storage.os, "fsync", interrupts)

    with pytest.raises(KeyboardInterrupt):
        _storage.write(saved, "toy", {}, {})
    assert_holds(saved, TENSORS, DOCUMENT)


class Killed(BaseException):
    """Ends a write where SIGKILL would: the test takes away what would still run."""


@pytest.mark.parametrize("n_moves", [0, 1, 2])
@pytest.mark.parametrize("first", [True, False], ids=["first write", "later write"])
def test_a_kill_at_any_move_leaves_the_old_or_the_new_artefact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, n_moves: int
):
    """Nothing is at its place before the first move; the second and last is the commit."""
    if not first:
        _storage.write(tmp_path, "toy", TENSORS, DOCUMENT)
    calls = iter(range(100))
    move = os.replace

    def killed_after_moves(source: Path, target: Path) -> None:
        if next(calls) == n_moves:
            raise Killed
        move(source, target)

    def killed_at_sweep(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patches, pytest.raises(Killed):
        patches.setattr(_storage.os, "replace", killed_after_moves)
        patches.setattr(_storage, "_sweep", killed_at_sweep)
        _storage.write(tmp_path, "toy", {"a": torch.ones(1)}, {"seed": 1})

    if first and n_moves < 2:
        assert not _storage.exists(tmp_path, "toy")
    else:
        expected = {"seed": 1} if n_moves == 2 else DOCUMENT
        assert _storage.read(tmp_path, "toy").document == expected
    _storage.write(tmp_path, "toy", TENSORS, {})
    assert_holds(tmp_path, TENSORS, {})


WRITER = """
import itertools, sys, torch
from pathlib import Path
from weightdecomp import _storage
for n in itertools.count():
    _storage.write(Path(sys.argv[1]), "toy", {"n": torch.full((50_000,), float(n))}, {"n": n})
    print(n, flush=True)
"""


def test_a_process_killed_while_it_writes_leaves_a_whole_artefact(tmp_path: Path):
    draw = random.Random(0)
    for round_ in range(4):
        directory = tmp_path / str(round_)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(directory)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(draw.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        reported = writer.communicate()[0].split()

        tensors, document = _storage.read(directory, "toy")

        # Killed between the commit and its report, the writer is one ahead.
        assert document["n"] in (
            int(reported[-1]) if reported else 0,
            int(reported[-1] if reported else 0) + 1,
        )
        assert_close(tensors["n"], torch.full((50_000,), float(document["n"])), rtol=0, atol=0)
        _storage.write(directory, "toy", TENSORS, DOCUMENT)
        assert_holds(directory, TENSORS, DOCUMENT)


# ------------------------------------------------------------------------------------------ digests


def test_a_digest_ignores_order_and_layout():
    matrix = torch.arange(6.0).view(2, 3)

    first = _storage.digest({"a": matrix.T, "b": torch.ones(1)})

    assert first == _storage.digest({"b": torch.ones(1), "a": matrix.T.contiguous()})


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
        {"a": torch.tensor([[0, 0, 0], [0, 0, 1e-30]])},
        {},
    ],
    ids=["name", "shape", "dtype", "more", "value", "none"],
)
def test_a_digest_tells_models_apart(other: dict[str, Tensor]):
    assert _storage.digest({"a": torch.zeros(2, 3)}) != _storage.digest(other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_the_empty_tensor_have_a_digest(dtype: torch.dtype):
    digest = _storage.digest({"a": torch.ones(3, dtype=dtype), "b": torch.ones((), dtype=dtype), "c": torch.ones(0)})

    assert len(digest) == 64
