"""Positions that an `attention_mask` leaves out count nowhere."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import graphs
import weightdecomp as wd
from tests.models import QUICK, ids

pytest.importorskip("transformers")

from tests.hf_models import VOCABULARY, saved

pytestmark = pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")

LENGTH, PADDING = 3, 4
SITE = "transformer.h.0.mlp.c_fc"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> wd.Pretrained:
    folder: Path = tmp_path_factory.mktemp("gpt2")
    saved("gpt2", folder)
    return wd.load_hf(folder)


def short(n: int) -> dict[str, Tensor]:
    """Inputs of one length."""
    return {"input_ids": ids(VOCABULARY, n, LENGTH), "attention_mask": torch.ones(n, LENGTH, dtype=torch.long)}


def padded(n: int, fill: int) -> dict[str, Tensor]:
    """The same inputs, filled up with one token."""
    own = short(n)
    return {
        "input_ids": torch.cat([own["input_ids"], torch.full((n, PADDING), fill)], 1),
        "attention_mask": torch.cat([own["attention_mask"], torch.zeros(n, PADDING, dtype=torch.long)], 1),
    }


def decomposed(model: wd.Pretrained, batch: dict[str, Tensor]) -> wd.Decomposition:
    return wd.decompose(model, [batch], sites=[SITE], config=QUICK, progress=False)


@pytest.fixture(scope="module")
def decomposition(model: wd.Pretrained) -> wd.Decomposition:
    return decomposed(model, short(64))


def test_the_output_at_padding_is_nothing(model: wd.Pretrained):
    output = model(**padded(4, fill=7))

    assert not output[:, LENGTH:].any()
    assert_close(output[:, :LENGTH], model(**short(4)), rtol=1e-5, atol=1e-6)


def test_a_decomposition_does_not_depend_on_what_stands_at_padding(quick: None, model: wd.Pretrained):
    one, other = (decomposed(model, padded(64, fill)) for fill in (0, 9))

    assert_close(one.parts[SITE].pieces, other.parts[SITE].pieces, rtol=1e-4, atol=1e-5)
    assert_close(one.parts[SITE].thresholds, other.parts[SITE].thresholds, rtol=1e-4, atol=1e-5)
    assert torch.equal(one.parts[SITE].frequencies, other.parts[SITE].frequencies)
    # Padded positions are rows on which nothing is open.
    assert one.parts[SITE].frequencies.max() <= LENGTH / (LENGTH + PADDING)


def test_gates_are_closed_at_padding(decomposition: wd.Decomposition):
    found = decomposition.importances(padded(16, fill=9))[SITE]

    assert not found[:, LENGTH:].any()
    assert torch.equal(found[:, :LENGTH], decomposition.importances(short(16))[SITE])
    assert found.any()


def test_the_inputs_that_drive_a_component_are_those_without_padding(decomposition: wd.Decomposition):
    without, filled = (decomposition.top_inputs(SITE, 0, [batch]) for batch in (short(16), padded(16, fill=9)))

    assert [i for i, _ in without] == [i for i, _ in filled]
    assert_close([x for _, x in without], [x for _, x in filled], rtol=1e-5, atol=1e-6)


def test_a_monitor_looks_at_tokens_alone(decomposition: wd.Decomposition):
    watch = wd.monitor(decomposition, [(SITE, i) for i in range(decomposition.parts[SITE].pieces.n)])

    assert_close(watch.strength(short(16)), watch.strength(padded(16, fill=9)), rtol=1e-4, atol=1e-5)


def test_an_edit_is_reported_as_without_padding(decomposition: wd.Decomposition):
    edited = decomposition.edit(remove=[(SITE, 0), (SITE, 1)])

    without, filled = (
        wd.edit_report(decomposition.target, edited, [batch], [batch]) for batch in (short(16), padded(16, fill=9))
    )

    assert without.rows[0].on_target.mean > 0
    for name in ("mean", "worst", "flipped"):
        one, other = (getattr(report.rows[0].on_target, name) for report in (without, filled))
        assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_circuit_graph_has_no_components_at_padding(decomposition: wd.Decomposition):
    graph = graphs.circuit_graph(decomposition, padded(1, fill=9), positions=True)

    found = {data["position"] for _, data in graph.nodes(data=True) if data["kind"] == "component"}
    assert found
    assert max(found) < LENGTH
