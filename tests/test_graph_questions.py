"""Pruning, scores, modules, paths, diffs and edits of circuit graphs, each against a slow or closed-form answer."""

import json
from dataclasses import replace
from inspect import unwrap  # past the checks of types that run in tests alone
from itertools import pairwise
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

import graphs
from bilinear import BilinearMLP, Layer, Norm, read
from graphs._influence import influences
from graphs._modules import rand_index, shuffled, undirected
from tests.graph_models import NETS, bilinear_net, decomposed_exactly
from tests.models import drawn
from weightdecomp import Decomposition


def example(name: str = "relu", **options) -> tuple[Decomposition, Tensor, nx.DiGraph]:
    make, data = NETS[name]
    x = data()
    decomposition = decomposed_exactly(make(), x, **{"closed": 0.3, "kept": 0.7, **options})
    return decomposition, x, graphs.circuit_graph(decomposition, x, edges=None)


def random_dag(n: int, seed: int = 0, layers: int = 5) -> nx.DiGraph:
    """A layered graph with random signed weights."""
    rng = np.random.default_rng(seed)
    graph = nx.DiGraph()
    for i in range(n):
        layer = i * layers // n
        kind = {0: "input", layers - 1: "output"}.get(layer, "component")
        graph.add_node(f"n/{i}", kind=kind, site=f"s{layer}", index=i, layer=layer, order=layer, activation=1.0)
    nodes = list(graph.nodes(data="layer"))
    for target, deep in nodes:
        for source, shallow in nodes:
            if shallow < deep and rng.random() < 0.3:
                graph.add_edge(source, target, weight=float(rng.normal()))
    return graph


# ---------------------------------------------------------------- influence and pruning


def test_influence_is_the_sum_over_all_ways_to_the_outputs():
    graph = random_dag(20)
    totals = {node: sum(abs(w) for *_, w in graph.in_edges(node, data="weight")) for node in graph}
    outputs = [node for node, kind in graph.nodes(data="kind") if kind == "output"]

    found = influences(graph)

    for node in graph:
        ways = 0.0
        for output in outputs:
            if node == output:
                ways += 1 / len(outputs)
            for way in nx.all_simple_paths(graph, node, output) if node != output else ():
                shares = [abs(graph.edges[edge]["weight"]) / totals[edge[1]] for edge in pairwise(way)]
                ways += float(np.prod(shares)) / len(outputs)
        assert found[node] == pytest.approx(ways, rel=1e-9, abs=1e-15)


def test_a_cycle_is_refused_naming_the_closing_edge():
    graph = random_dag(20)
    source, target = list(graph.edges)[7]
    graph.add_edge(target, source, weight=1.0)

    with pytest.raises(
        ValueError, match=r"closed by the edge 'n/\d+' -> 'n/\d+'; influence and pruning need"
    ) as caught:
        graphs.prune(graph, influence=0.8)

    named = [word for word in str(caught.value).split("'") if word.startswith("n/")]
    assert graph.has_edge(*named)


def test_pruning_by_influence_keeps_the_fewest_nodes_that_reach_the_share():
    _, _, graph = example()

    pruned = graphs.prune(graph, influence=0.8)

    able = {n: data["influence"] for n, data in graph.nodes(data=True) if data["kind"] not in ("input", "output")}
    kept = [able[node] for node in pruned if node in able]
    assert sum(sorted(able.values())[-len(kept) - 1 :]) >= 0.8 * sum(able.values())
    assert 0 < pruned.number_of_nodes() < graph.number_of_nodes()
    recipe = pruned.graph["pruning"][0]
    assert (recipe["by"], recipe["influence"], recipe["nodes"]) == ("influence", 0.8, len(pruned))
    assert graph.graph["pruning"] == []


def test_pruning_everything_or_nothing():
    _, _, graph = example()

    whole = graphs.prune(graph, influence=1.0, edge_influence=1.0)
    empty = graphs.prune(graph, edges=0)

    flowing = {node for node, data in graph.nodes(data=True) if data["influence"] > 0 and graph.out_degree(node)}
    assert flowing <= set(whole)
    assert set(nx.get_node_attributes(empty, "kind").values()) == {"output"}


@pytest.mark.parametrize("budget", [0, 5, 12, 30, 1000])
def test_the_edge_budget_is_used_up_by_those_that_carry_most(budget: int):
    """As a slow reference finds them: one edge more at a time, as long as those that do not dangle are few enough."""
    _, _, graph = example()
    carried = {edge: graph.edges[edge]["share"] * graph.nodes[edge[1]]["influence"] for edge in graph.edges}
    ranked = sorted(carried, key=lambda edge: -carried[edge])

    pruned = graphs.prune(graph, edges=budget)

    lasting: set = set()
    for n in range(len(ranked) + 1):
        more = not_dangling(graph, set(ranked[:n]))
        if len(more) > budget:
            break
        lasting = more
    assert set(pruned.edges) == lasting
    assert min(budget, len(carried)) - 5 <= pruned.number_of_edges() <= budget
    recipe = pruned.graph["pruning"][0]
    assert (recipe["limit"], recipe["edges"]) == (budget, pruned.number_of_edges())


def not_dangling(graph: nx.DiGraph, edges: set) -> set:
    """Those of some edges that lead on to an output, and come from where the graph begins."""
    while True:
        left, entered = {edge[0] for edge in edges}, {edge[1] for edge in edges}
        kept = {
            (source, target)
            for source, target in edges
            if (graph.nodes[target]["kind"] == "output" or target in left)
            and (source in entered or not graph.in_degree(source))
        }
        if kept == edges:
            return kept
        edges = kept


def test_accounts_of_a_pruned_graph_say_what_was_cut():
    _, _, graph = example()

    pruned = graphs.prune(graph, edges=12)

    for node, data in pruned.nodes(data=True):
        if "unaccounted" in data:
            explained = sum(weight for *_, weight in pruned.in_edges(node, data="weight"))
            assert data["unaccounted"] == pytest.approx(data["activation"] - explained, abs=1e-12)


@pytest.mark.parametrize("regime", ["zero", "stochastic", "adversarial"])
def test_pruning_until_a_damage_is_met_and_one_node_less_is_too_few(regime: str):
    decomposition, x, _ = example(closed=0.0, kept=1.0)
    graph = graphs.circuit_graph(decomposition, x)
    options = {"decomposition": decomposition, "inputs": x, "regime": regime, "steps": 5}

    pruned = graphs.prune(graph, damage=0.3, **options)

    recipe = pruned.graph["pruning"][0]
    assert recipe["damage"] <= 0.3
    assert recipe["regime"] == regime
    again = graphs.score(pruned, decomposition, x, regimes=[regime], steps=5, minimality=False).graph["scores"][0]
    assert again["damage"] == pytest.approx(recipe["damage"], rel=1e-9)
    assert pruned.number_of_nodes() < graph.number_of_nodes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of influence, edges and damage, got none"),
        ({"influence": 0.5, "edges": 3}, r"got \['influence', 'edges'\]"),
        ({"influence": 1.5}, "influence must be between 0 and 1, got 1.5"),
        ({"edges": -1}, "edges must be at least 0"),
        ({"damage": 0.1}, "pass decomposition= and inputs="),
    ],
)
def test_bad_criteria_are_refused(options: dict, message: str):
    _, _, graph = example()

    with pytest.raises(ValueError, match=message):
        graphs.prune(graph, **options)


def test_a_damage_that_the_whole_graph_exceeds_is_refused():
    decomposition, x, graph = example()
    graph = graphs.prune(graph, edges=10)

    with pytest.raises(ValueError, match="the whole graph of .* nodes does damage .* more than the limit"):
        graphs.prune(graph, damage=1e-9, decomposition=decomposition, inputs=x, regime="zero")


# ---------------------------------------------------------------- scores


def test_scores_of_the_whole_graph_are_zero_and_of_an_empty_one_are_one():
    decomposition, x, _ = example(closed=0.0)
    graph = graphs.circuit_graph(decomposition, x)
    bare = nx.DiGraph(graph)
    bare.remove_nodes_from([n for n, kind in graph.nodes(data="kind") if kind in ("component", "remainder")])

    whole = graphs.score(graph, decomposition, x, steps=5).graph["scores"]
    nothing = graphs.score(bare, decomposition, x, regimes=["zero"], minimality=False).graph["scores"]

    assert {one["regime"] for one in whole if one["figure"] == "damage"} == {
        "zero",
        "mean",
        "resample",
        "stochastic",
        "adversarial",
    }
    assert all(abs(one["damage"]) < 1e-12 for one in whole if one["figure"] == "damage")
    assert [one["damage"] for one in whole if one["figure"] == "completeness"] == [pytest.approx(1)]
    assert nothing[0]["damage"] == pytest.approx(1)
    assert nothing[1]["damage"] == pytest.approx(0, abs=1e-12)


def test_zero_ablation_is_what_the_decomposition_itself_ablates():
    decomposition, x, graph = example(kept=1.0)
    pruned = graphs.prune(graph, influence=0.6)
    keep = {path: torch.zeros(parts.pieces.n) for path, parts in decomposition.parts.items()}
    for _, data in pruned.nodes(data=True):
        if data["kind"] == "component":
            keep[data["site"]][data["index"]] = 1

    record = graphs.score(pruned, decomposition, x, regimes=["zero"], minimality=False).graph["scores"][0]

    off = {path: torch.zeros(parts.pieces.n) for path, parts in decomposition.parts.items()}
    target = decomposition.target(x).detach()
    damages = [(decomposition.ablate(x, keep=one).detach() - target).square().mean() for one in (keep, off)]
    assert record["divergence"] == pytest.approx(float(damages[0]), rel=1e-9)
    assert record["damage"] == pytest.approx(float(damages[0] / damages[1]), rel=1e-9)


def test_mean_ablation_of_everything_is_the_mean_input_on_a_linear_model():
    decomposition, x, graph = example("linear chain", closed=0.0)
    bare = nx.DiGraph(graph)
    bare.remove_nodes_from([n for n, kind in graph.nodes(data="kind") if kind in ("component", "remainder")])

    record = graphs.score(bare, decomposition, x, regimes=["mean"], minimality=False).graph["scores"][0]

    target = decomposition.target(x).detach()
    expected = (decomposition.target(x.mean(0, keepdim=True)) - target).square().mean()
    assert record["divergence"] == pytest.approx(float(expected.detach()), rel=1e-9)


def test_an_attack_does_at_least_the_damage_of_zero_ablation():
    decomposition, x, graph = example(kept=1.0)
    pruned = graphs.prune(graph, influence=0.7)

    records = graphs.score(pruned, decomposition, x, steps=40, minimality=False).graph["scores"]

    by_regime = {one["regime"]: one for one in records if one["figure"] == "damage"}
    assert by_regime["adversarial"]["damage"] >= 0.99 * by_regime["zero"]["damage"]
    assert by_regime["adversarial"]["evidence"] == "counterexample"
    assert by_regime["adversarial"]["budget"] == "40 steps x 3 restarts"
    assert by_regime["stochastic"]["error"] > 0
    # Whose values stand in is part of the recipe.
    assert [regime for regime, one in by_regime.items() if "reference" in one] == ["mean", "resample"]


def test_scores_are_the_same_for_the_same_seed():
    decomposition, x, graph = example()

    one, other = (graphs.score(graph, decomposition, x, steps=4, seed=3).graph["scores"] for _ in range(2))

    assert one == other


def test_minimality_is_the_damage_that_one_node_adds():
    decomposition, x, graph = example(kept=1.0, closed=0.0)
    pruned = graphs.prune(graph, influence=0.8)
    scored = graphs.score(pruned, decomposition, x, regimes=["zero"])
    node = next(n for n, kind in pruned.nodes(data="kind") if kind == "component")

    without = nx.DiGraph(pruned)
    without.remove_node(node)
    less = graphs.score(without, decomposition, x, regimes=["zero"], minimality=False)

    added = less.graph["scores"][0]["damage"] - scored.graph["scores"][0]["damage"]
    assert scored.nodes[node]["minimality"] == pytest.approx(added, abs=1e-12)
    every = nx.get_node_attributes(scored, "minimality").values()
    record = scored.graph["scores"][-1]
    assert (record["figure"], record["least"], record["most"]) == ("minimality", min(every), max(every))


@pytest.mark.parametrize("name", ["attention", "recurrent", "convolution"])
def test_positions_and_calls_are_ablated_apart(name: str):
    decomposition, x, _ = example(name, closed=0.0)
    graph = graphs.circuit_graph(decomposition, x[:1], positions=True, output_positions=None)

    whole = graphs.score(graph, decomposition, x[:1], regimes=["zero"], minimality=False)
    less = nx.DiGraph(graph)
    less.remove_node(next(n for n, data in graph.nodes(data=True) if data["kind"] == "component"))
    part = graphs.score(less, decomposition, x[:1], regimes=["zero"], minimality=False)

    # A node of some position, call and component: 1e-12 of rounding against what it does.
    assert abs(whole.graph["scores"][0]["damage"]) < 1e-12
    assert part.graph["scores"][0]["damage"] > 1e-9


def test_scores_need_the_right_decomposition_and_enough_inputs():
    decomposition, x, graph = example()
    other, _, _ = example(kept=0.5)

    with pytest.raises(ValueError, match="graph is of another decomposition"):
        graphs.score(graph, other, x)
    with pytest.raises(ValueError, match="unknown regime 'median'"):
        graphs.score(graph, decomposition, x, regimes=["median"])
    with pytest.raises(TypeError, match=r"got the string 'zero'; write \['zero'\]"):
        graphs.score(graph, decomposition, x, regimes="zero")
    with pytest.raises(TypeError, match="inputs must be one batch, got a list of 2"):
        graphs.score(graph, decomposition, [x, x])
    with pytest.raises(ValueError, match="restarts of the attack must be at least 1, got 0"):
        graphs.score(graph, decomposition, x, restarts=0)
    with pytest.raises(ValueError, match="take values from other inputs, got 1"):
        graphs.score(graph, decomposition, x[:1], regimes=["mean"])
    single = graphs.score(graph, decomposition, x[:1], steps=2, minimality=False).graph["scores"]
    assert "mean" not in {one["regime"] for one in single}


# ---------------------------------------------------------------- modules


def planted(seed: int = 0, groups: int = 3, inside: float = 4.0) -> nx.DiGraph:
    """Two layers in which edges inside a group are strong."""
    rng = np.random.default_rng(seed)
    graph = nx.DiGraph()
    for layer in range(3):
        for i in range(12):
            kind = ("input", "component", "output")[layer]
            graph.add_node(f"{layer}/{i}", kind=kind, layer=layer, order=layer, site=str(layer), activation=1.0)
    for layer in range(2):
        for i in range(12):
            for j in range(12):
                size = inside if i % groups == j % groups else 1.0
                sign = rng.choice([-1, 1])
                graph.add_edge(f"{layer}/{i}", f"{layer + 1}/{j}", weight=float(sign * size * rng.random()))
    return graph


def test_planted_modules_are_found_whatever_the_signs():
    found = graphs.modules(planted(inside=20.0))

    truth = [{f"{layer}/{i}" for layer in range(3) for i in range(12) if i % 3 == g} for g in range(3)]
    members: dict[int, set] = {}
    for node, module in found.nodes(data="module"):
        members.setdefault(module, set()).add(node)
    assert rand_index(truth, list(members.values()), list(found)) == pytest.approx(1)
    row = next(one for one in found.graph["modules"]["table"] if one["resolution"] == 1.0)
    assert row["stability"] == pytest.approx(1)
    assert row["q"] - row["q_null"] > 0.2


def test_without_modules_nothing_exceeds_the_null():
    row = graphs.modules(planted(inside=1.0)).graph["modules"]["table"][1]

    assert abs(row["q"] - row["q_null"]) < 0.06


def test_the_null_keeps_layers_and_weights():
    graph = planted()

    null = shuffled(graph, 1)

    for layer in ("0", "1"):
        weights = [
            sorted(w for source, _, w in one.edges(data="weight") if source.startswith(f"{layer}/"))
            for one in (graph, null)
        ]
        assert weights[0] == weights[1]
    assert set(graph.edges) == set(null.edges)
    assert [w for *_, w in graph.edges(data="weight")] != [w for *_, w in null.edges(data="weight")]


def test_the_rand_index_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(5):
        labels = rng.integers(0, 4, size=(2, 30))
        parts = [[{str(i) for i in np.flatnonzero(one == c)} for c in set(one.tolist())] for one in labels]
        expected = metrics.adjusted_rand_score(*labels)
        assert rand_index(*parts, [str(i) for i in range(30)]) == pytest.approx(expected)


def test_complexity_counts_the_edges_that_carry_the_influence():
    graph = nx.DiGraph()
    for node, kind, layer in (("a", "input", 0), ("b", "input", 0), ("y", "output", 1)):
        graph.add_node(node, kind=kind, layer=layer, activation=1.0)
    graph.add_edge("a", "y", weight=-9.5)
    graph.add_edge("b", "y", weight=0.5)

    found = graphs.complexity(graph, seeds=2)

    assert (found.edges_90, found.edges_99) == (1, 2)


def test_remainders_and_biases_belong_to_no_module():
    _, _, graph = example()

    found = graphs.modules(graph, seeds=2, nulls=2)

    assert all(("module" in data) == (data["kind"] not in ("remainder", "bias")) for _, data in found.nodes(data=True))
    assert set(undirected(graph)) == {n for n, data in found.nodes(data=True) if "module" in data}


# ---------------------------------------------------------------- paths


def test_paths_are_the_best_of_all_that_there_are():
    graph = random_dag(20, seed=3)
    totals = {node: sum(abs(w) for *_, w in graph.in_edges(node, data="weight")) for node in graph}
    kinds = dict(graph.nodes(data="kind"))
    outputs = [node for node in graph if kinds[node] == "output"]
    every = {}
    for source in (node for node in graph if kinds[node] == "input"):
        for target in outputs:
            for way in nx.all_simple_paths(graph, source, target):
                shares = [abs(graph.edges[edge]["weight"]) / totals[edge[1]] for edge in pairwise(way)]
                every[tuple(way)] = float(np.prod(shares)) / len(outputs)

    found = graphs.paths(graph, 15)

    best = sorted(every.values(), reverse=True)[:15]
    assert [one.share for one in found] == pytest.approx(best, rel=1e-9)
    assert all(every[one.nodes] == pytest.approx(one.share, rel=1e-9) for one in found)


def test_effects_of_all_ways_add_up_to_the_outputs_of_a_linear_model():
    decomposition, x, _ = example("linear chain", closed=0.0)
    graph = graphs.circuit_graph(decomposition, x[:1], edges=None)
    ends = [node for node in graph if not graph.in_degree(node)]

    found = graphs.paths(graph, 100_000, sources=ends)

    output = decomposition.target(x[:1])[0].detach()
    total = sum(one.effect for one in found)
    assert total == pytest.approx(float(output.sum()), rel=1e-9)
    assert sum(one.share for one in found) == pytest.approx(1, rel=1e-9)


def test_paths_refuse_unknown_ends():
    _, _, graph = example()

    with pytest.raises(ValueError, match="no node 'input/9'; did you mean one of"):
        graphs.paths(graph, sources=["input/9"])
    with pytest.raises(TypeError, match="expected a list of node ids, got the string 'input/0'"):
        graphs.paths(graph, sources="input/0")
    with pytest.raises(ValueError, match="k must be at least 1"):
        graphs.paths(graph, 0)


# ---------------------------------------------------------------- attributes


def documented(table: str) -> set[str]:
    """Names in the first column of one of SPEC's tables."""
    lines = (Path(__file__).parents[1] / "SPEC.md").read_text().partition(f"| {table} |")[2].split("\n\n")[0]
    return {name for line in lines.splitlines()[2:] for name in line.split("|")[1].strip().split(", ")}


def test_every_attribute_is_in_the_tables_and_plain():
    decomposition, x, graph = example()
    scored = graphs.modules(graphs.score(graph, decomposition, x, steps=1), seeds=1, nulls=1)
    some = [
        scored,
        graphs.circuit_graph(decomposition, x, collapse=True),
        graphs.circuit_graph(*example("attention")[:2], positions=True),
        graphs.circuit_graph(*example("recurrent")[:2]),
        graphs.diff(graph, graphs.prune(graph, edges=9)),
        graphs.bilinear_graph(LAYERS["biases"]()),
    ]

    for one in some:
        for name, data in [("node attribute", d) for _, d in one.nodes(data=True)] + [
            ("edge attribute", d) for *_, d in one.edges(data=True)
        ]:
            assert data.keys() <= documented(name)
            assert {type(value) for value in data.values()} <= {int, float, str}
        assert one.graph.keys() >= {"schema", "schema_version", "package_version"}
        json.dumps(one.graph, allow_nan=False)


# ---------------------------------------------------------------- diff, ablate, edit


def test_a_graph_does_not_differ_from_itself():
    _, _, graph = example()

    found = graphs.diff(graph, graph)

    assert found.graph["changes"] == {"nodes": {"same": len(graph)}, "edges": {"same": graph.number_of_edges()}}


def test_a_diff_of_two_inputs_has_all_edges_of_both():
    decomposition, x, _ = example()
    one, other = (graphs.circuit_graph(decomposition, x[i : i + 1]) for i in (0, 1))

    found = graphs.diff(one, other)

    assert set(found.edges) == set(one.edges) | set(other.edges)
    for source, target, data in found.edges(data=True):
        edge = source, target
        assert data["status"] != "added" or (edge not in one.edges and edge in other.edges)
        before = one.edges[edge]["weight"] if edge in one.edges else 0
        after = other.edges[edge]["weight"] if edge in other.edges else 0
        assert data["weight"] == pytest.approx(after - before)


def test_diffs_of_two_decompositions_need_a_matching():
    decomposition, x, graph = example()
    order = {
        path: torch.randperm(parts.pieces.n, generator=torch.Generator().manual_seed(1))
        for path, parts in (decomposition.parts.items())
    }
    other = decomposed_exactly(decomposition.target, x, closed=0.3, kept=0.7)
    for path, parts in other.parts.items():
        pieces = parts.pieces._replace(v=-parts.pieces.v[order[path]], u=parts.pieces.u[order[path]])
        kept = parts.thresholds.flip(0)[:, order[path]], parts.frequencies[order[path]]
        other.parts[path] = type(parts)(pieces, *kept, parts.start)
    # The other model reads every component with the opposite sign, so its remainder is not what it was.
    again = graphs.circuit_graph(other, x, edges=None)

    with pytest.raises(ValueError, match=r"of two decompositions .*pass matching=match"):
        graphs.diff(graph, again)
    with pytest.raises(ValueError, match="graph is of another decomposition"):
        graphs.match(graph, again, other, decomposition)
    pairs = graphs.match(graph, again, decomposition, other)

    for node, partner in pairs.items():
        data = graph.nodes[node]
        if data["kind"] == "component":
            assert int(order[data["site"]][again.nodes[partner]["index"]]) == data["index"]
    assert graphs.diff(graph, again, matching=pairs).number_of_nodes() >= len(graph)


def test_a_matching_of_unknown_nodes_is_refused():
    _, _, graph = example()

    with pytest.raises(ValueError, match="matching names 'nobody'"):
        graphs.diff(graph, graph, matching={"0/0": "nobody"})


def test_ablating_nodes_is_ablating_their_components():
    decomposition, x, graph = example(kept=1.0)
    keep = {path: torch.ones(parts.pieces.n) for path, parts in decomposition.parts.items()}
    keep["0"][1] = keep["2"][0] = 0

    found = graphs.ablate(graph, ["0/1", "2/0"], decomposition, x)

    torch.testing.assert_close(found, decomposition.ablate(x, keep=keep, remainder=True))


def test_an_edit_removes_the_components_and_its_graph_shows_it():
    decomposition, x, graph = example(kept=1.0, closed=0.0)

    edited = graphs.edit(graph, decomposition, remove=["0/1"], scale={"2/0": 0.5})
    after = graphs.circuit_graph(edited.decomposition, x)

    torch.testing.assert_close(edited.model(x), decomposition.edit(scale={("0", 1): 0.0, ("2", 0): 0.5})(x))
    again = {node: node for node in graph if node in after}
    found = graphs.diff(graph, after, matching=again)
    assert after.nodes["2/0"]["unaccounted"] == pytest.approx(0, abs=1e-12)
    assert after.nodes["0/1"]["activation"] == pytest.approx(0, abs=1e-12)
    assert found.nodes["0/1"]["status"] == "changed"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["0/99"], "no node '0/99'; did you mean one of"),
        (["input/0"], "node 'input/0' is of kind 'input', which cannot be ablated"),
    ],
)
def test_nodes_that_cannot_be_ablated_are_refused(ids: list[str], message: str):
    decomposition, x, graph = example()

    with pytest.raises(ValueError, match=message):
        graphs.ablate(graph, ids, decomposition, x)
    with pytest.raises(ValueError, match="no node|only components can be edited"):
        graphs.edit(graph, decomposition, remove=ids)


# ---------------------------------------------------------------- bilinear layers


def layer_of(model: BilinearMLP, norm: Norm | None = None) -> Layer:
    """A module's layer in float64, behind a norm where one is given."""
    return replace(read(model).double(), norm=norm)


LAYERS = {
    "plain": lambda: layer_of(BilinearMLP(4, 5, 3)),
    "biases": lambda: layer_of(BilinearMLP(4, 5, 3, bias=True)),
    "residual": lambda: layer_of(BilinearMLP(4, 5, 4, bias=True)).with_skip(),
    "norm": lambda: layer_of(BilinearMLP(4, 5, 3, bias=True), Norm("rms", 1e-5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_tensor_entries_reproduce_the_bilinear_layer(name: str):
    torch.default_generator.manual_seed(0)
    layer, x = LAYERS[name](), drawn(5, 4)
    own = layer.coordinates(x)[..., int(layer.affine) :]

    graph = graphs.bilinear_graph(layer, edges=None)

    y = torch.zeros(5, layer.d_out, dtype=torch.float64)
    for pair, output, weight in graph.edges(data="weight"):
        if graph.nodes[output]["kind"] == "output":
            factors = [own[:, graph.nodes[pair][end]] for end in ("left", "right") if end in graph.nodes[pair]]
            y[:, graph.nodes[output]["index"]] += weight * torch.stack(
                [torch.ones(5, dtype=torch.float64), *factors]
            ).prod(0)
    torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-13)
    assert {data["evidence"] for *_, data in graph.edges(data=True)} == {"exact"}
    graphs.validate(graph)


def test_the_largest_tensor_entries_are_kept():
    model = bilinear_net()
    layer = Layer(*(getattr(model, name).weight.detach() for name in "wvd"))
    whole = graphs.bilinear_graph(layer, edges=None)

    few = graphs.bilinear_graph(layer, edges=7)

    sizes = sorted((abs(w) for _, t, w in whole.edges(data="weight") if t.startswith("output")), reverse=True)
    kept = sorted((abs(w) for _, t, w in few.edges(data="weight") if t.startswith("output")), reverse=True)
    assert kept == pytest.approx(sizes[:7])
    assert few.graph["hidden_edges"] == len(sizes) - 7


def test_what_has_no_tensor_is_refused():
    around = replace(LAYERS["norm"](), skip=torch.ones(3, 4, dtype=torch.float64))

    with pytest.raises(TypeError, match="expected a bilinear.Layer, got Tensor; see bilinear.read"):
        unwrap(graphs.bilinear_graph)(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"a skip path around a norm .*replace\(layer, skip=None\)"):
        graphs.bilinear_graph(around)
    with pytest.raises(ValueError, match="edges must be at least 0 or None"):
        graphs.bilinear_graph(LAYERS["plain"](), edges=-1)
