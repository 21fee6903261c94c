"""Graphs of other methods' units: the same account and the same interventions as graphs of components."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import graphs
from tests.graph_models import NETS, attention, decomposed_exactly, relu_net
from tests.models import drawn, ids
from weightdecomp import Decomposition, baselines
from weightdecomp.baselines import Fitted, Training
from weightdecomp.baselines._ours import as_fitted

_STEPS = {"cross-layer transcoder", "crosscoder", "k-means", "polytopes"}  # no edges, or edges from several sites
ONE_SITE = [method for method in baselines.ALL if method.name not in _STEPS]


def example(name: str = "relu") -> tuple[Decomposition, Tensor]:
    make, _ = NETS[name]
    x = ids(7, 64, 5) if name == "attention" else drawn(64, 5).abs()
    return decomposed_exactly(make(), x, closed=0.3), x


def fitted(decomposition: Decomposition, x: Tensor, method: baselines.Method) -> Fitted:
    one = decomposition
    data = baselines.Data(one.target, [x], one.sites, one.divergence, one.tolerance)
    if hasattr(method, "training"):
        method = replace(method, training=Training(steps=5, batch=16))  # type: ignore[type-var]
    return method.fit(data)


@pytest.mark.parametrize("name", ["relu", "attention"])
@pytest.mark.parametrize("effects", ["gradient", "path", "removal"])
def test_components_as_units_give_the_graph_of_the_decomposition(name: str, effects: str):
    decomposition, x = example(name)

    x = x[:1] if effects == "removal" else x[:4]
    expected = graphs.circuit_graph(decomposition, x, effects=effects, edges=None)
    graph = graphs.circuit_graph(decomposition, x, effects=effects, edges=None, units=as_fitted(decomposition))

    assert graph.edges.keys() == expected.edges.keys()
    for edge in expected.edges:
        assert graph.edges[edge]["weight"] == pytest.approx(expected.edges[edge]["weight"], rel=1e-12, abs=1e-15)
    for node, data in expected.nodes(data=True):
        for name in ("activation", "frequency", "importance", "influence"):
            assert graph.nodes[node].get(name, 0.0) == pytest.approx(data.get(name, 0.0), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("method", ONE_SITE, ids=lambda one: one.name)
def test_edges_into_the_outputs_account_for_them(method: baselines.Method):
    """On a ReLU network units, remainders and constants together are what the sites write."""
    decomposition, x = example()

    graph = graphs.circuit_graph(decomposition, x[:8], edges=None, units=fitted(decomposition, x, method))

    units = [data for _, data in graph.nodes(data=True) if data["kind"] == "unit"]
    outputs = [data for _, data in graph.nodes(data=True) if data["kind"] == "output"]
    assert units
    assert len(outputs) == 3
    for data in outputs:
        assert abs(data["unaccounted"]) < 1e-11 * max(1, abs(data["activation"]))


@pytest.mark.parametrize("method", [baselines.PCA(), baselines.Transcoder(skip=True)], ids=lambda one: one.name)
def test_an_edge_is_what_taking_the_unit_away_does_where_that_is_linear(method: baselines.Method):
    """From the last site to the outputs everything is linear, whatever the encoder."""
    decomposition, x = example()
    units = fitted(decomposition, x, method)

    graph = graphs.circuit_graph(decomposition, x[:4], edges=None, units=units)

    last = len(units.banks) - 1
    site = units.banks[last].reads[0]
    on = baselines.protocols.trial(decomposition.target, x[:4], decomposition.sites, decomposition.divergence)
    own = [node for node, data in graph.nodes(data=True) if data["kind"] == "unit" and data["site"] == site]
    assert own
    # Skip units follow the latents of the same site.
    before = sum(bank.n for bank in units.banks[:last] if bank.reads == (site,))
    for node in own:
        index = graph.nodes[node]["index"] - before
        if index < 0:
            continue
        whole = baselines.protocols.ablated_output(on, units, {})
        without = baselines.protocols.ablated_output(on, units, {last: [index]})
        for o in range(3):
            weight = graph.edges[node, f"output/{o}"]["weight"] if graph.has_edge(node, f"output/{o}") else 0.0
            assert weight == pytest.approx(float((whole - without)[:, o].mean()), abs=1e-12)


def test_a_unit_that_writes_at_several_sites_is_one_node_with_one_edge_a_target():
    x = drawn(64, 6)
    layers = [torch.nn.Linear(6, 6) for _ in range(4)]
    model = torch.nn.Sequential(*layers).double()
    decomposition = decomposed_exactly(model, x)
    units = fitted(decomposition, x, baselines.CrossLayerTranscoder())

    graph = graphs.circuit_graph(decomposition, x[:8], edges=None, units=units)

    assert {data["site"] for _, data in graph.nodes(data=True) if data["kind"] == "unit"} == {"0", "2"}
    for data in (graph.nodes[f"output/{o}"] for o in range(6)):
        assert abs(data["unaccounted"]) < 1e-11 * max(1, abs(data["activation"]))
    for _, _, edge in graph.edges(data=True):
        assert abs(edge["weight"]) <= edge["magnitude"] * (1 + 1e-12)
    with pytest.raises(ValueError, match="some of these write at several"):
        graphs.circuit_graph(decomposition, x[:8], units=units, effects="removal")


@pytest.mark.parametrize("method", [baselines.KMeans(), baselines.Crosscoder()], ids=lambda one: one.name)
def test_units_that_have_no_edges_are_refused_with_the_reason(method: baselines.Method):
    decomposition, x = example()

    with pytest.raises(ValueError, match=r"chosen by a step.*no gradient|read 3 sites at once.*no place"):
        graphs.circuit_graph(decomposition, x, units=fitted(decomposition, x, method))


def test_units_of_another_model_are_refused_and_their_graphs_are_no_decomposition():
    decomposition, x = example()
    other = decomposed_exactly(relu_net(), x)
    units = fitted(other, x, baselines.PCA())

    with pytest.raises(ValueError, match="units of 'pca' were fitted on other sites"):
        graphs.circuit_graph(decomposition, x, units=units)
    with pytest.raises(ValueError, match="collapse joins components"):
        graphs.circuit_graph(other, x, units=units, collapse=True)

    graph = graphs.circuit_graph(other, x, units=units)

    assert graph.graph["method"] == "pca, 0.5 of the components"
    with pytest.raises(ValueError, match="of another decomposition"):
        graphs.score(graph, other, x)


def test_a_graph_of_units_is_written_and_read(tmp_path):
    x = ids(7, 64, 5)
    decomposition = decomposed_exactly(attention(), x)
    graph = graphs.circuit_graph(decomposition, x[:1], units=fitted(decomposition, x, baselines.PCA()))

    for suffix in (".json", ".graphml", ".ct.json"):
        graphs.write(graph, tmp_path / f"units{suffix}")

    assert set(graphs.read(tmp_path / "units.json")) == set(graph)
    graphs.validate(tmp_path / "units.graphml")
    graphs.write(graph, tmp_path / "units.html")
