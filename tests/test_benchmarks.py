"""The benchmarks run from end to end on tiny targets, and their arithmetic is right."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import graph_methods, graph_sizes, language, recall, recovery, report, speed
from benchmarks import graphs as graph_benchmark
from benchmarks.recovery import SMOKE, Job, judged, run, rungs
from weightdecomp import baselines


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    recovery.smoke(folder)
    return folder


def record(results: Path, job: Job) -> dict:
    return json.loads(job.path(results).read_text())


def test_a_record_holds_every_score_of_every_site(results: Path):
    found = record(results, Job("tms_5_2_id", 0))

    dense = {"kind", "components", "active", "true_rank", "pattern_errors"}
    per_feature = {
        *("kind", "components", "active", "true_components", "pattern_errors", "mmcs", "ml2r", "mmcs_nulls"),
        *("relative_error_median", "relative_error_max"),
        *("norm_ratio_median", "norm_ratio_within_5_percent"),
    }
    assert {path: set(one) for path, one in found["sites"].items()} == {
        "linear1": per_feature,
        "hidden": dense,
        "linear2": per_feature,
    }


def test_a_record_holds_cost_damage_oracle_nulls_and_provenance(results: Path):
    found = record(results, Job("tms_5_2_id", 0))

    assert found["cpu_seconds"] > 0 and found["wall_seconds"] > 0 and found["peak_bytes"] > 2**20
    assert len(found["verification"]["shared"]["damages"]) == len(rungs(SMOKE.attack))
    assert len(found["oracle"]["per_input"]["damages"]) == len(rungs(SMOKE.attack))
    assert found["verification"]["long"]["steps"] == rungs(SMOKE.long_attack)
    assert {"ours", "random directions", "SVD"} <= set(found["nulls"])
    assert {"commit", "torch", "machine", "date"} <= set(found["provenance"])
    assert found["settings"]["config"] == SMOKE.config.to_dict()


def test_an_untrained_network_is_recorded_with_its_verdict_alone(results: Path):
    found = record(results, Job("tms_5_2_id", 0, "untrained"))

    assert isinstance(found["outcome"]["compresses"], bool)
    assert "sites" not in found


def test_a_summary_counts_passes_and_quotes_medians(results: Path):
    found = json.loads((results / "recovery.json").read_text())["tasks"]["tms_5_2_id"]

    own = record(results, Job("tms_5_2_id", 0))
    assert found["passed"] == int(own["passed"])
    assert found["damage"] == {"median": own["damage"], "low": own["damage"], "high": own["damage"]}


def test_a_table_has_a_row_for_every_task_that_ran(results: Path):
    text = (results / "recovery.md").read_text()

    assert "| tms_5_2_id " in text and "tms_40_10" not in text


def test_a_job_that_has_a_record_is_not_run_again(results: Path, monkeypatch: pytest.MonkeyPatch):
    job = Job("tms_5_2_id", 0)
    monkeypatch.setattr(recovery, "jobs", lambda tasks: ([job], {"tms_5_2_id": 0}))
    before = job.path(results).stat().st_mtime_ns

    failures = recovery.run_all(["tms_5_2_id"], results, fresh=False)

    assert failures == 0
    assert job.path(results).stat().st_mtime_ns == before


def test_recovery_refuses_a_task_that_does_not_exist(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        recovery.main(["--only", "tms_6_3"])

    assert "no tasks ['tms_6_3']" in capsys.readouterr().err


def test_a_run_is_judged_at_320_steps_or_at_the_end_of_a_shorter_ladder():
    assert judged([20, 320, 1280]) == 1
    assert judged([20, 40]) == 1


def test_a_run_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()

    run("tms_5_2", 0, "untrained", SMOKE)

    assert torch.equal(torch.get_rng_state(), before)


def test_speed_compares_all_three_targets():
    found = speed.compared(smoke=True)

    assert len(found["cases"]) == 3
    assert all(one["multiple"]["median"] > 0 for one in found["cases"].values())
    assert all(one["memory_multiple"] > 1 for one in found["cases"].values())


def test_peak_of_a_call_is_what_it_holds_at_once():
    def call() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first, second

    assert speed.peak_of(call) == pytest.approx(8000, abs=256)


def test_a_spread_is_median_and_range():
    found = report.spread([3.0, 1.0, 2.0])

    assert found == (2.0, 1.0, 3.0)
    assert found.text(".1f") == "2.0 (1.0-3.0)"


def test_writing_json_refuses_what_json_cannot_hold(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        report.write_json(tmp_path / "a.json", {"x": float("nan")})

    assert list(tmp_path.iterdir()) == []


def test_a_table_pads_its_columns():
    found = report.table(("name", "x"), [("a", "1.5"), ("long name", "2")])

    assert found.splitlines()[2:] == ["| a         | 1.5 |", "| long name |   2 |"]


@pytest.mark.parametrize("part", ["sizes", "agreement", "digits"])
def test_graphs_measures_every_part(part: str, quick: None):
    found = graph_benchmark.measured(part, smoke=True)

    figures = found["figures"]
    if part == "sizes":
        (size,) = figures.values()
        assert size["nodes"]["median"] > 0
        assert {f"write {suffix} s" for suffix in graph_sizes.SUFFIXES} | {"peak MB"} <= size.keys()
    elif part == "agreement":
        # The two-layer toy is linear between its sites on any one input.
        assert figures["tms_5_2"]["gradient correlation"]["median"] > 0.99
        assert figures["tms_5_2"]["path unaccounted"]["median"] < 1e-5
    else:
        assert figures.keys() == {"weight decomposition", "random directions", *baselines.NAMES}
        assert "no gradient passes" in figures["k-means"]
        assert (
            figures["pca"]["edges_90"]["median"]
            < figures["pca"]["edges_99"]["median"]
            <= figures["pca"]["edges"]["high"]
        )
    assert found["cpu_seconds"] > 0 and found["peak_bytes"] > 2**20
    assert f"Seed {found['seeds'][0]} alone" in graph_benchmark.markdown({part: found})


@pytest.fixture
def a_part() -> dict:
    """A record of one part of the graph benchmark, with figures of the right form."""
    names = ["correlation", "mean error", "worst error", "unaccounted"]
    one = {f"{effects} {name}": 0.5 for effects in ("gradient", "path") for name in names}
    figures = {"toy": graph_methods.spreads([{**one, "edges": 3.0}])}
    where = {"commit": "abc", "uncommitted_changes": False, "machine": "m", "torch": "t", "date": "2026-01-01"}
    return {"figures": figures, "seeds": [0], "cpu_seconds": 1.0, "peak_bytes": 1, "provenance": where}


def test_a_part_that_is_measured_or_fails_leaves_the_other_results(
    a_part: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(graph_benchmark.PARTS, "other", graph_benchmark.PARTS["agreement"])
    report.write_json(tmp_path / "graphs.json", {"agreement": a_part})

    def measure(part: str) -> dict:
        if part == "sizes":
            raise MemoryError
        return {**a_part, "cpu_seconds": 2.0}

    failures = graph_benchmark.run(["sizes", "other"], tmp_path, measure)

    found = graph_benchmark.results(tmp_path / "graphs.json")
    assert failures == 1
    assert (found["agreement"], found["other"]["cpu_seconds"]) == (a_part, 2.0)
    assert (tmp_path / "graphs.md").read_text().count("| toy") == 4


def test_only_parts_of_another_commit_are_measured_again(a_part: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    report.write_json(tmp_path / "graphs.json", {"agreement": a_part})
    measured = []

    def measure(part: str) -> dict:
        measured.append(part)
        return a_part

    for commit, changed in (("abc", False), ("abc", True), ("abd", False)):
        here = {"commit": commit, "uncommitted_changes": changed}
        monkeypatch.setattr(graph_benchmark, "provenance", lambda here=here: here)
        graph_benchmark.run(["agreement"], tmp_path, measure)

    assert len(measured) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"sizes": {}}', '{"speed": {}}'])
def test_results_that_are_none_are_refused_and_stay(text: str, a_part: dict, tmp_path: Path):
    (tmp_path / "graphs.json").write_text(text)

    with pytest.raises(ValueError, match="move"):
        graph_benchmark.run(["agreement"], tmp_path, lambda part: a_part)

    assert (tmp_path / "graphs.json").read_text() == text


def test_the_page_of_graphs_has_the_figures_of_the_results():
    page = (report.ROOT / "docs" / "graphs.md").read_text()

    blocks = graph_benchmark.summary(graph_benchmark.results(report.RESULTS / "graphs.json"))

    assert blocks
    assert all(block in page for block in blocks)


def test_the_table_of_results_is_the_one_of_the_records():
    found = graph_benchmark.results(report.RESULTS / "graphs.json")

    assert (report.RESULTS / "graphs.md").read_text() == graph_benchmark.markdown(found)


def test_a_table_of_methods_has_medians_with_ranges_and_reasons_below():
    names = ["edges_90", "edges_99", "edges", "q", "q_null", "q_excess", "through remainders", "active"]
    runs = {
        "broken": [{**dict.fromkeys(names, 0.5), "damage": 0.9}],
        "many": [{**dict.fromkeys(names, 9.0), "damage": 0.0}],
        "few": [{**dict.fromkeys(names, x), "damage": 0.01} for x in (1.0, 2.0, 4.0)],
    }

    found = graph_methods.methods_table({**{m: graph_methods.spreads(r) for m, r in runs.items()}, "none": "no rows"})

    lines = found.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["few", "many", "broken *"]
    assert "2 (1 to 4)" in lines[2]
    assert lines[-1] == "- none: no rows"


def test_the_recall_model_is_the_same_for_the_same_seed():
    one, other = (recall.trained(0, steps=5)[0] for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_recall_model_learns():
    _, accuracy = recall.trained(0, steps=300)

    # Guessing among the five tokens of the sequence would be .2.
    assert accuracy > 0.35


@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_language_models_are_measured_beside_nulls_and_other_methods(tmp_path: Path, quick: None):
    """Without a data folder on this project's own documents; a second call finds the decompositions made."""
    call = ["--smoke", "--only", "characters", "--seeds", "1", "--out", str(tmp_path)]

    assert language.main(call) == 0
    made = (tmp_path / "cache" / "characters-0.json").stat().st_mtime_ns
    assert language.main(call) == 0

    found = json.loads((tmp_path / "characters.json").read_text())
    assert (tmp_path / "cache" / "characters-0.json").stat().st_mtime_ns == made
    (run,) = found["runs"]
    assert run["verification"]["unmasked"]["damage"] < 1e-4
    assert {one["name"] for one in run["verification"]["nulls"]} >= {"SVD", "random directions"}
    assert [row["method"] for row in found["beside"]["comparison"]["rows"]] == ["weight decomposition", "svd"]
    assert "adversarial" in (tmp_path / "characters.md").read_text()
