"""Every format brings a graph back exactly as `sanitise` makes it; nothing is half-written (S2, G5)."""

import gc
import json
import os
import stat
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphs
from graphs._circuit_tracer import cantor, trimmed
from tests.graph_models import NETS, decomposed_exactly

EXACT = [".json", ".graphml", ".gexf", ".cyjs", ".dot"]
HOSTILE = [
    "</script><script>alert(1)</script>",
    "quote \" and ' and \\ backslash",
    "colon:port:x",
    "\u202eright to left \u05d0\u05d1",
    "emoji \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "control \x00\x01\x07\x1b\x7f tab\t newline\n return\r",
    "<!-- comment --> & &amp; ]]>",
    "-> [label=x]; } //",
    "  spaces  ",
    "\ud800 lone surrogate \ufffe",
    "NaN",
    "1.5",
    "true",
    "\u0085\u2028\u2029 separators",
    "{}",
    "%3Cscript%3E",
]


def same(one: nx.DiGraph, other: nx.DiGraph) -> bool:
    """Whether ids, attributes, their types and their values agree."""
    return repr(_content(one)) == repr(_content(other))


def _content(graph: nx.DiGraph) -> list:
    nodes = sorted((node, sorted(data.items())) for node, data in graph.nodes(data=True))
    edges = sorted((a, b, sorted(data.items())) for a, b, data in graph.edges(data=True))
    return [nodes, edges, sorted(graph.graph.items())]


@pytest.fixture(scope="module")
def circuit() -> nx.DiGraph:
    make, data = NETS["relu"]
    x = data()
    decomposition = decomposed_exactly(make(), x, closed=0.3, kept=0.7)
    return graphs.circuit_graph(decomposition, x, output_titles=HOSTILE[:3])


@pytest.mark.parametrize("suffix", [*EXACT, ".ct.json"])
def test_a_circuit_comes_back_exactly(suffix: str, circuit: nx.DiGraph, tmp_path: Path):
    path = tmp_path / f"circuit{suffix}"

    graphs.write(circuit, path)

    expected = trimmed(graphs.sanitise(circuit)) if suffix == ".ct.json" else graphs.sanitise(circuit)
    assert same(graphs.read(path), expected)
    assert expected.number_of_nodes() > 10


def test_a_circuit_is_sanitised_already(circuit: nx.DiGraph):
    assert same(graphs.sanitise(circuit), circuit)


@pytest.mark.parametrize("suffix", EXACT)
def test_hostile_strings_come_back_sanitised(suffix: str, tmp_path: Path):
    graph = nx.DiGraph()
    for i, label in enumerate(HOSTILE):
        graph.add_node(label, kind="component", title=label, label=label, id=i, **{label: label})
    for one, two in zip(HOSTILE, HOSTILE[1:], strict=False):
        graph.add_edge(one, two, weight=0.5, **{two: one})

    graphs.write(graph, tmp_path / f"hostile{suffix}")

    assert same(graphs.read(tmp_path / f"hostile{suffix}"), graphs.sanitise(graph))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False, allow_infinity=False), max_size=2),
)
NAMES = st.one_of(st.sampled_from(["id", "label", "weight", "key", "source", "value", "x"]), st.text(min_size=1))


@st.composite
def any_graph(draw: st.DrawFn) -> nx.DiGraph:
    """Graphs with any ids and attributes; one kind of value for each attribute name."""
    numbers = st.floats(allow_nan=False, allow_infinity=False)
    ids = draw(st.lists(st.text(min_size=1, max_size=6), max_size=5, unique_by=lambda one: graphs_text(one)))
    names = draw(st.lists(NAMES, max_size=3, unique_by=lambda one: graphs_text(one).rstrip("_")))
    kinds = {name: draw(st.sampled_from([st.booleans(), st.integers(), numbers, st.text()])) for name in names}
    graph = nx.DiGraph(**draw(st.dictionaries(st.sampled_from(["schema", "note", "name", "mode"]), VALUES, max_size=2)))
    for one in ids:
        graph.add_node(one, **{name: draw(kinds[name]) for name in names if draw(st.booleans())})
    pairs = [(a, b) for a in ids for b in ids]
    for a, b in draw(st.lists(st.sampled_from(pairs), max_size=4, unique=True)) if pairs else []:
        graph.add_edge(a, b, weight=draw(numbers), **{n: draw(kinds[n]) for n in names if n != "weight"})
    return graph


def graphs_text(value: str) -> str:
    from graphs._sanitise import text

    return text(value)


@settings(max_examples=40)
@given(graph=any_graph())
@pytest.mark.parametrize("suffix", EXACT)
def test_any_graph_comes_back_exactly(suffix: str, graph: nx.DiGraph, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"

    graphs.write(graph, path)

    assert same(graphs.read(path), graphs.sanitise(graph))
    assert same(graphs.sanitise(graphs.sanitise(graph)), graphs.sanitise(graph))


@pytest.mark.parametrize("suffix", EXACT)
def test_an_empty_graph_comes_back(suffix: str, tmp_path: Path):
    graphs.write(nx.DiGraph(), tmp_path / f"empty{suffix}")

    assert same(graphs.read(tmp_path / f"empty{suffix}"), nx.DiGraph())


SCALARS: list[tuple[Any, Any]] = [
    (np.float32(0.5), 0.5),
    (np.float64(0.1), 0.1),
    (np.int64(7), 7),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (torch.tensor(1.5), 1.5),
    (torch.tensor(2.0, dtype=torch.bfloat16), 2.0),
    (torch.tensor(3), 3),
    (torch.nn.Parameter(torch.tensor(0.25)), 0.25),
    (np.array(4.0), 4.0),
]


@pytest.mark.parametrize(("value", "plain"), SCALARS)
def test_scalars_become_plain_python(value: Any, plain: Any):
    graph = nx.DiGraph()
    graph.add_node("a", x=value)

    found = graphs.sanitise(graph).nodes["a"]["x"]

    assert found == plain
    assert type(found) is type(plain)


def test_lists_and_arrays_become_json_text():
    graph = nx.DiGraph()
    graph.add_node("a", x=[1, (2, None)], y=torch.eye(2), z={"k": np.float32(0.5)})

    data = graphs.sanitise(graph).nodes["a"]

    assert {name: json.loads(value) for name, value in data.items()} == {
        "x_json": [1, [2, None]],
        "y_json": [[1.0, 0.0], [0.0, 1.0]],
        "z_json": {"k": 0.5},
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor(float("nan")), np.float32("-inf")])
def test_nonfinite_numbers_are_refused_by_name_or_left_out_by_count(bad: Any):
    graph = nx.DiGraph()
    graph.add_node("a/1", x=bad, y=1.0)

    with pytest.raises(ValueError, match=r"'x' of node 'a/1' is .*nonfinite='omit'"):
        graphs.sanitise(graph)
    clean = graphs.sanitise(graph, nonfinite="omit")
    assert clean.nodes["a/1"] == {"y": 1.0}
    assert clean.graph["omitted"] == 1


def _graph(*nodes: Any, edges: Any = (), **attributes: Any) -> nx.DiGraph:
    graph = nx.DiGraph(**attributes)
    for node in nodes:
        graph.add_node(node[0], **node[1]) if isinstance(node, tuple) else graph.add_node(node)
    graph.add_edges_from(edges)
    return graph


REFUSED = {
    "ids that become one": (_graph("a\x01", "a\u2401"), ValueError, "have the same id"),
    "numbers as ids": (_graph(1, "1"), ValueError, "nodes 1 and '1' have the same id"),
    "empty id": (_graph(""), ValueError, "empty id"),
    "empty name": (_graph(("a", {"": 1})), ValueError, "empty name"),
    "mixed types": (_graph(("a", {"x": 1}), ("b", {"x": "1"})), ValueError, "int on node 'a', str on node 'b'"),
    "weight in words": (_graph(edges=[("a", "b", {"weight": "big"})]), ValueError, "one type of number"),
    "object": (_graph(("a", {"x": object()})), TypeError, "'x' of node 'a' is a object"),
    "names that become one": (_graph(("a", {"id": 1, "id_": 2})), ValueError, "are called 'id_'"),
    "huge integer": (_graph(("a", {"x": 10**400}), ("b", {"x": 0.5})), ValueError, "too large for a float"),
    "undirected": (nx.Graph(), TypeError, "expected a networkx.DiGraph, got Graph"),
    "parallel edges": (nx.MultiDiGraph(), TypeError, "got MultiDiGraph"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_files_cannot_hold_is_refused_by_name(name: str, tmp_path: Path):
    graph, kind, message = REFUSED[name]

    with pytest.raises(kind, match=message):
        graphs.sanitise(graph)
    assert not list(tmp_path.iterdir())


def test_integers_and_floats_of_one_attribute_become_floats():
    clean = graphs.sanitise(_graph(("a", {"x": 1}), ("b", {"x": 0.5})))

    assert [repr(clean.nodes[node]["x"]) for node in "ab"] == ["1.0", "0.5"]


UNWRITABLE = {
    "no suffix": ("circuit", ValueError, "no suffix that names a format; choose one of .ct.json, .json"),
    "unknown suffix": ("circuit.png", ValueError, "choose one of"),
    "no folder": ("nowhere/circuit.json", FileNotFoundError, "there is no folder"),
    "a folder": ("folder.json", IsADirectoryError, "it is a folder, expected a file"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_an_unwritable_path_is_named(name: str, circuit: nx.DiGraph, tmp_path: Path):
    (tmp_path / "folder.json").mkdir()
    path, kind, message = UNWRITABLE[name]

    with pytest.raises(kind, match=message):
        graphs.write(circuit, tmp_path / path)

    assert [one.name for one in tmp_path.iterdir()] == ["folder.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(circuit: nx.DiGraph, tmp_path: Path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)

    with pytest.raises(PermissionError, match="cannot write"):
        graphs.write(circuit, tmp_path / "circuit.json")


@pytest.mark.parametrize("suffix", [*EXACT, ".ct.json", ".html"])
def test_a_failed_write_leaves_the_earlier_file(
    suffix: str, circuit: nx.DiGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / f"circuit{suffix}"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)

    with pytest.raises(OSError, match=r"cannot write .*: No space left on device"):
        graphs.write(circuit, path)

    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    assert gc.isenabled()


DAMAGED = {
    "no such file": ("missing.json", None, "there is no file"),
    "page": ("page.html", "<html>", "cannot be read back"),
    "pickle": ("pickle.json", b"\x80\x04K\x01.", "nothing is ever unpickled"),
    "not json": ("x.json", "{", "is not JSON"),
    "a list": ("x.json", "[]", "expected an object"),
    "no nodes": ("x.json", '{"directed": true}', "no 'nodes'"),
    "undirected": ("x.json", '{"nodes": [], "edges": [], "directed": false}', "not directed"),
    "loose edge": (
        "x.json",
        '{"directed": true, "nodes": [{"id": "a"}], "edges": [{"source": "a", "target": "b"}]}',
        "'a' -> 'b', leads to no node 'b'",
    ),
    "same id twice": ("x.json", '{"directed": true, "nodes": [{"id": "a"}, {"id": "a"}], "edges": []}', "the id 'a'"),
    "node without id": ("x.json", '{"directed": true, "nodes": [{}], "edges": []}', "node number 0 has no 'id'"),
    "not xml": ("x.graphml", "graph", "is not XML"),
    "graphml edge": (
        "x.graphml",
        '<graphml><graph edgedefault="directed"><edge source="a" target="b"/></graph></graphml>',
        "leads to no node 'a'",
    ),
    "not gexf": ("x.gexf", "<gexf></gexf>", "no <graph> of a version of GEXF"),
    "dot value": ("x.dot", 'digraph { "a" ["x"]; }', "is not DOT at"),
    "not dot": ("x.dot", "graph {", "does not begin with 'digraph'"),
    "open dot": ("x.dot", 'digraph { "a" [', "ends before the closing brace"),
    "dot edge": ("x.dot", 'digraph { "a"; "a" -> "b"; }', "leads to no node 'b'"),
    "cytoscape edge": (
        "x.cyjs",
        '{"elements": {"nodes": [], "edges": [{"data": {"source": "a", "target": "b"}}]}}',
        "leads to no node 'a'",
    ),
    "tracer field": ("x.ct.json", '{"nodes": [{"node_id": "0_1_2"}], "links": []}', "node '0_1_2' has no 'layer'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_name(name: str, tmp_path: Path):
    file, content, message = DAMAGED[name]
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(ValueError, match=message):
        graphs.read(path)


def test_other_programs_read_our_files(circuit: nx.DiGraph, tmp_path: Path):
    for suffix in (".graphml", ".gexf", ".json"):
        graphs.write(circuit, tmp_path / f"circuit{suffix}")

    for back in (
        nx.read_graphml(tmp_path / "circuit.graphml"),
        nx.read_gexf(tmp_path / "circuit.gexf"),
        nx.node_link_graph(json.loads((tmp_path / "circuit.json").read_text()), edges="edges"),
    ):
        assert set(back.edges) == set(circuit.edges)
        edge = next(iter(circuit.edges))
        assert back.edges[edge]["weight"] == circuit.edges[edge]["weight"]


def test_links_of_older_node_link_files_are_read(tmp_path: Path):
    path = tmp_path / "old.json"
    path.write_text(
        '{"directed": true, "nodes": [{"id": "a"}, {"id": "b"}], "links": [{"source": "a", "target": "b"}]}'
    )

    assert list(graphs.read(path).edges) == [("a", "b")]


def test_validate_accepts_a_circuit(circuit: nx.DiGraph, tmp_path: Path):
    graphs.write(circuit, tmp_path / "circuit.gexf")

    graphs.validate(circuit)
    graphs.validate(tmp_path / "circuit.gexf")


def _without(graph: nx.DiGraph, change: Any) -> nx.DiGraph:
    copy = nx.DiGraph(graph)
    change(copy)
    return copy


INVALID = {
    "kind": (lambda g: g.nodes["0/0"].update(kind="neuron"), "node '0/0' has the kind 'neuron'"),
    "site": (lambda g: g.nodes["0/0"].pop("site"), "node '0/0' has no 'site'"),
    "importance": (lambda g: g.nodes["0/0"].update(importance=1.5), "node '0/0' has importance 1.5"),
    "into an input": (lambda g: g.add_edge("0/0", "input/0", weight=1.0), "node 'input/0' is of kind 'input'"),
    "out of an output": (lambda g: g.add_edge("output/0", "0/0", weight=1.0), "node 'output/0' is an output"),
    "no weight": (lambda g: g.edges["input/0", "0/0"].pop("weight"), "edge 'input/0' -> '0/0' has no 'weight'"),
    "cycle": (lambda g: g.add_edge("2/0", "0/0", weight=1.0), "has a cycle of 2 edges, closed by the edge"),
    "share": (lambda g: g.edges["input/0", "0/0"].update(share=2.0), "has share 2.0"),
    "schema": (lambda g: g.graph.pop("schema_version"), "has no attribute 'schema_version'"),
}


@pytest.mark.parametrize("name", INVALID)
def test_validate_names_what_is_wrong(name: str, circuit: nx.DiGraph, tmp_path: Path):
    change, message = INVALID[name]
    wrong = _without(nx.node_link_graph(nx.node_link_data(circuit, edges="edges"), edges="edges"), change)
    graphs.write(wrong, tmp_path / "wrong.json")

    with pytest.raises(ValueError, match=message):
        graphs.validate(tmp_path / "wrong.json")


def test_circuit_tracer_files_keep_to_its_schema_and_off_its_traps(circuit: nx.DiGraph, tmp_path: Path):
    graphs.write(circuit, tmp_path / "circuit.ct.json")

    document = json.loads((tmp_path / "circuit.ct.json").read_text())
    nodes, metadata = document["nodes"], document["metadata"]
    assert {"slug", "scan", "prompt_tokens", "prompt"} <= metadata.keys()
    assert set(document["qParams"]) == {"pinnedIds", "supernodes"}
    assert len({one["node_id"] for one in nodes}) == len(nodes)
    assert len({one["ctx_idx"] for one in nodes}) >= 2
    assert all(0 <= one["ctx_idx"] < len(metadata["prompt_tokens"]) for one in nodes)
    assert all("(p=" in one["clerp"] for one in nodes if one["feature_type"] == "logit")
    assert all(isinstance(one["influence"], float) for one in nodes)
    assert not any("<" in one["clerp"] for one in nodes)
    ends = {link["target"] for link in document["links"]}, {link["source"] for link in document["links"]}
    components = [one for one in nodes if one["feature_type"] == "cross layer transcoder"]
    assert components
    for one in components:
        assert one["node_id"] in ends[0] & ends[1]
        layer, index = (int(x) for x in one["node_id"].split("_")[:2])
        assert one["feature"] == cantor(layer, index)
        example = json.loads((tmp_path / metadata["scan"] / f"{one['feature']}.json").read_text())
        assert example["examples_quantiles"][0]["examples"]


def test_files_of_circuit_tracer_itself_are_read(tmp_path: Path):
    common = {"ctx_idx": 1, "jsNodeId": "x", "clerp": "a label"}
    nodes = [
        {"node_id": "E_17_1", "layer": "E", "feature_type": "embedding", **common},
        {"node_id": "0_5_1", "layer": "0", "feature_type": "cross layer transcoder", "activation": 2.5, **common},
        {"node_id": "1_17_1", "layer": 1, "feature_type": "logit", **common},
    ]
    links = [
        {"source": "E_17_1", "target": "0_5_1", "weight": 0.5},
        {"source": "0_5_1", "target": "1_17_1", "weight": -1},
    ]
    path = tmp_path / "theirs.ct.json"
    path.write_text(json.dumps({"metadata": {}, "qParams": {}, "nodes": nodes, "links": links}))

    graph = graphs.read(path)

    assert [graph.nodes[one["node_id"]]["kind"] for one in nodes] == ["input", "component", "output"]
    assert graph.edges["0_5_1", "1_17_1"]["weight"] == -1


def test_graphs_without_an_output_are_refused_for_circuit_tracer(tmp_path: Path):
    with pytest.raises(ValueError, match="no node of kind 'output'"):
        graphs.write(_graph("a"), tmp_path / "x.ct.json")
