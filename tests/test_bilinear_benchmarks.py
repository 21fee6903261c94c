import gzip
import json
import struct
from functools import partial
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch

from benchmarks import bilinear as benchmark
from benchmarks import bilinear_images
from benchmarks.images import DATA_VARIABLE, Training, data_folder, images, read_idx, trained
from bilinear import centred, eigen, without_common


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("bilinear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bilinear_images, "without_common", partial(without_common, sweeps=5))
        assert benchmark.main(["--smoke", "--out", str(out)]) == 0
    return out


def test_the_whole_benchmark_runs_without_data(results: Path):
    made = {path.name for path in results.iterdir()}

    assert {"images.json", "images.md", "speed.json", "speed.md", "language.json", "language.md"} <= made
    assert {"digits_vectors.png", "digits_spectra.svg", "digits_accuracy.png"} <= made
    assert {"language_circuit.json", "language_circuit.png"} <= made


def test_records_hold_seeds_nulls_spread_and_provenance(results: Path):
    found = json.loads((results / "images.json").read_text())

    digits = found["digits"]
    assert {"none", "decay", "noise", "noise and decay", "untrained_seed_agreement", "provenance"} == set(digits)
    assert {"commit", "torch", "machine", "date"} <= set(digits["provenance"])
    run = digits["none"]["runs"][0]
    assert {"random", "random_hit"} <= set(run["masks"][0])
    assert len(run["accuracy_by_kept"]["data"]) == len(run["accuracy_by_kept"]["input"])
    assert set(run["certified"]["data"]) == {"15", "30"}
    speed = json.loads((results / "speed.json").read_text())
    assert all(case["value_error"] < 1e-5 and case["times_faster_than_eigh"] > 0 for case in speed["cases"])
    language = json.loads((results / "language.json").read_text())
    assert language["kl"]["data"][-1] < 1e-4 < language["kl_without_the_mlp"]


def test_the_circuit_is_a_graph_that_networkx_reads(results: Path):
    graph = nx.node_link_graph(json.loads((results / "language_circuit.json").read_text()), edges="edges")

    assert graph.in_degree("logit") == 4
    assert {kind for _, kind in graph.nodes(data="kind")} > {"output", "token"}
    assert all("weight" in data and "evidence" in data for _, _, data in graph.edges(data=True))


def test_smoke_runs_do_not_replace_results(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        benchmark.main(["--smoke"])

    assert "--smoke would replace real results" in capsys.readouterr().err


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def test_idx_files_are_read_back(tmp_path: Path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 5), ("t10k", 3)):
        arrays[split] = rng.integers(0, 256, (n, 4, 4))
        write_idx(tmp_path / "mnist" / f"{split}-images-idx3-ubyte.gz", arrays[split])
        write_idx(tmp_path / "mnist" / f"{split}-labels-idx1-ubyte.gz", np.arange(n))

    found = images("mnist", tmp_path)

    assert found.side == 4 and found.test_labels.tolist() == [0, 1, 2]
    assert torch.equal(found.train * 255, torch.tensor(arrays["train"]).flatten(1).float())


def test_files_that_are_no_idx_files_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="there is neither"):
        read_idx(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"PNG....")
    with pytest.raises(ValueError, match="is no idx file of unsigned bytes"):
        read_idx(tmp_path / "b")
    (tmp_path / "c").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 9) + b"1234")
    with pytest.raises(ValueError, match=r"holds 4 bytes, its header says \(9,\)"):
        read_idx(tmp_path / "c")
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"x" * 100)[:-9])
    with pytest.raises(ValueError, match="is no whole gzip file"):
        read_idx(tmp_path / "d")


def test_the_data_folder_is_given_or_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert data_folder() is None
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert data_folder() == tmp_path
    with pytest.raises(ValueError, match="there is no data folder"):
        data_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="mnist needs a data folder"):
        images("mnist", None)


def test_training_is_deterministic_and_leaves_the_global_random_state_alone():
    pytest.importorskip("sklearn")
    data, how = images("digits", None), Training(0.2, 0.1, 3, d=8, epochs=1, batch=128)
    before = torch.get_rng_state()

    one, two = trained(data, how), trained(data, how)

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    layer, x = one.layer(), data.test.double()
    assert torch.allclose(layer(x).float(), one(data.test), atol=1e-5)
    whole = eigen(layer, centred(layer)).squares()(x)
    assert torch.equal(whole.argmax(1), layer(x).argmax(1))


@pytest.mark.data
def test_mnist_has_its_images(shared_data: Path):
    found = images("mnist", shared_data)

    assert found.train.shape == (60_000, 784) and found.test.shape == (10_000, 784)
    assert found.train_labels.bincount().min() > 5000
