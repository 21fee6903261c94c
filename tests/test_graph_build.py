"""Graphs account for values, agree with interventions, and add up over inputs (G2, G3, G4)."""

from collections.abc import Callable
from inspect import unwrap  # past the checks of types that run in tests alone

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphs
from graphs._build import _numbers
from tests.graph_models import NETS, Attention, attention, decomposed_exactly
from tests.models import Calls, drawn, ids, seeded, sparse
from weightdecomp import Decomposition, NumericalWarning
from weightdecomp._forward import replaced

PIECEWISE_LINEAR = ["linear chain", "relu", "recurrent", "convolution"]


def example(name: str, **options) -> tuple[Decomposition, Tensor]:
    make, data = NETS[name]
    x = data()
    return decomposed_exactly(make(), x, **{"closed": 0.3, "kept": 0.7, **options}), x


def gaps(graph: nx.DiGraph) -> dict[str, float]:
    """What is unaccounted of every target, relative to the largest term of its account."""
    found = {}
    for node, data in graph.nodes(data=True):
        if "unaccounted" in data:
            terms = [abs(edge["weight"]) for _, _, edge in graph.in_edges(node, data=True)]
            found[node] = abs(data["unaccounted"]) / max([abs(data["activation"]), *terms, 1e-300])
    return found


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_incoming_edges_account_for_every_value(name: str, collapse: bool):
    decomposition, x = example(name, rank=1 if name == "convolution" else 2)

    graph = graphs.circuit_graph(decomposition, x, collapse=collapse, edges=None)

    found = gaps(graph)
    assert len(found) >= 5
    # A few roundings of float64, of a sum over at most 12 inputs and 12 edges.
    assert max(found.values()) < 1e-13


@pytest.mark.parametrize("name", [*PIECEWISE_LINEAR, "bilinear", "nn.Bilinear"])
def test_path_effects_account_for_every_value_of_bilinear_models_too(name: str):
    decomposition, x = example(name)

    graph = graphs.circuit_graph(decomposition, x, effects="path", steps=2)

    assert max(gaps(graph).values()) < 1e-13


@pytest.mark.parametrize("name", ["bilinear", "nn.Bilinear"])
def test_each_factor_of_a_bilinear_model_accounts_for_the_whole_value(name: str):
    decomposition, x = example(name)
    factors, meeting_site = (("w", "v"), "d") if name == "bilinear" else (("a", "b"), "meet")

    graph = graphs.circuit_graph(decomposition, x)

    for node, data in graph.nodes(data=True):
        if data["site"] == meeting_site and data["kind"] == "component":
            for factor in factors:
                edges = graph.in_edges(node, data="weight")
                total = sum(weight for source, _, weight in edges if graph.nodes[source]["site"] == factor)
                assert total == pytest.approx(data["activation"], rel=1e-11)


def test_a_path_through_a_norm_of_nothing_but_sources_warns():
    """The norm of a growing vector is the same all the way, so that its gradients sum to nothing."""
    model = seeded(Calls(lambda m, x: m.b(F.layer_norm(m.a(x), (4,))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))).double()
    decomposition = decomposed_exactly(model, drawn(8, 4))

    with pytest.warns(NumericalWarning, match=r"miss \d+% of the change from nothing, most of it at 'b': a norm jumps"):
        graphs.circuit_graph(decomposition, drawn(8, 4), effects="path")


@pytest.mark.parametrize("name", ["attention", "recurrent"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_path_sums_to_the_change_from_nothing_and_says_so_where_steps_are_too_few(name: str, rank: int):
    decomposition, x = example(name, rank=rank)

    graphs.circuit_graph(decomposition, x, effects="path")
    if name == "attention":
        with pytest.warns(NumericalWarning, match="or steps= are too few"):
            graphs.circuit_graph(decomposition, x, effects="path", steps=1)


def removed(decomposition: Decomposition, x: Tensor, source: dict, target: dict) -> float:
    """A target's activation less the same with one contribution taken out, by hooks, all other sites held."""
    model, sites = decomposition.target, decomposition.sites
    pieces = {path: parts.pieces for path, parts in decomposition.parts.items()}
    held, found = {}, []

    def run(ablate: bool) -> float:
        value = []

        def forward(site, call, operands):
            own = pieces[site.path]
            inner = site.read(operands, own.v)
            if (site.path, call) == (target["site"], target.get("call", 0)):
                value.append(own.activations(inner)[..., target["index"]].sum())
            rows = held.setdefault((site.path, call), site.read(operands, site.matrix()))
            if ablate and (site.path, call) == (source["site"], source.get("call", 0)):
                mask = torch.zeros(own.n, dtype=rows.dtype)
                mask[source["index"]] = 1
                # What it read in the target's own run, which comes first.
                rows = rows - own.contract(found[0], mask)
            elif (site.path, call) == (source["site"], source.get("call", 0)):
                found.append(inner)
            return site.write(rows, operands)

        with torch.no_grad(), replaced(sites, forward):
            output = model(x)
        if target["kind"] == "output":
            return float(output.reshape(len(x), -1, output.shape[-1])[..., target["index"]].sum())
        return float(value[0])

    return run(False) - run(True)


@pytest.mark.parametrize("name", ["linear chain", "bilinear", "nn.Bilinear"])
def test_an_edge_is_what_taking_the_source_away_does(name: str):
    decomposition, x = example(name, closed=0.0)
    graph = graphs.circuit_graph(decomposition, x[:1])

    compared = 0
    for source, target, edge in graph.edges(data=True):
        if graph.nodes[source]["kind"] == "component":
            effect = removed(decomposition, x[:1], graph.nodes[source], graph.nodes[target])
            assert edge["weight"] == pytest.approx(effect, rel=1e-10, abs=1e-13)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", ["relu", "recurrent", "attention"])
def test_removal_edges_are_interventions_on_any_model(name: str):
    decomposition, x = example(name, closed=0.0, rank=1)
    graph = graphs.circuit_graph(decomposition, x[:1], effects="removal", positions=False)

    pairs = []
    for source, target, edge in graph.edges(data=True):
        if graph.nodes[source]["kind"] == "component":
            effect = removed(decomposition, x[:1], graph.nodes[source], graph.nodes[target])
            pairs.append((edge["weight"], effect))
    weights, effects = torch.tensor(pairs, dtype=torch.float64).T
    # Output nodes sum over positions here, as the intervention does.
    assert len(pairs) > 10
    torch.testing.assert_close(weights, effects, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "recurrent", "convolution", "attention"])
def test_gradient_edges_agree_with_interventions(name: str):
    """Not exact where a ReLU flips or a softmax bends; the stated tolerance is a correlation of 0.9."""
    decomposition, x = example(name, closed=0.0)

    first = graphs.circuit_graph(decomposition, x, edges=None)
    real = graphs.circuit_graph(decomposition, x, effects="removal", edges=None)

    pairs = [
        (weight, real.edges[edge]["weight"] if real.has_edge(*edge) else 0.0)
        for *edge, weight in first.edges(data="weight")
        if first.nodes[edge[0]]["kind"] == "component"
    ]
    weights = torch.tensor(pairs, dtype=torch.float64).T
    assert float(torch.corrcoef(weights)[0, 1]) > 0.9


def numbers(graph: nx.DiGraph) -> tuple[dict, dict]:
    names = ("activation", "std", "importance", "frequency", "influence", "unaccounted")
    nodes = {(node, name): data[name] for node, data in graph.nodes(data=True) for name in names if name in data}
    edges = {
        (*edge, name): data[name]
        for *edge, data in graph.edges(data=True)
        for name in ("weight", "error", "magnitude", "share")
        # What is rounding in one order of summation need not be in another.
        if data["share"] > 1e-12
    }
    return nodes, edges


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_graphs_of_single_inputs_add_up_to_the_graph_of_all(name: str, collapse: bool):
    decomposition, x = example(name)
    options = {"collapse": collapse, "edges": None}

    whole = graphs.circuit_graph(decomposition, x, **options)
    single = (
        [graphs.circuit_graph(decomposition, one, **options, output_positions=range(5)) for one in x.split(1)]
        if (name == "attention")
        else [graphs.circuit_graph(decomposition, one, **options) for one in x.split(1)]
    )
    total = graphs.aggregate(single, edges=None)

    # Nothing that cancels over positions is left as an edge of rounding.
    assert set(total.edges) == set(whole.edges)
    for one, other in zip(numbers(total), numbers(whole), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value == pytest.approx(other[key], rel=1e-9, abs=1e-11), key


def of_words() -> tuple[Decomposition, Tensor]:
    """A transformer with more outputs than are shown, and 12 inputs of 5 positions; its logits differ in level."""
    model, x = seeded(Attention(80)).double(), ids(80, 12, 5)
    return decomposed_exactly(model, x), x


def outputs_of(graph: nx.DiGraph) -> dict[int, float]:
    return {data["index"]: data["importance"] for _, data in graph.nodes(data=True) if data["kind"] == "output"}


def test_outputs_are_the_likeliest_over_all_batches_and_positions_and_count_by_it():
    decomposition, x = of_words()
    likely = decomposition.target(x).detach().softmax(-1).mean((0, 1))

    found = outputs_of(graphs.circuit_graph(decomposition, list(x.split(5))))

    top = likely.topk(10)
    assert set(found) == set(top.indices.tolist())
    for index, importance in found.items():
        assert importance == pytest.approx(float(likely[index] / top.values.sum()), rel=1e-9)


def test_outputs_of_one_input_are_the_likeliest_at_its_last_position():
    decomposition, x = of_words()
    likely = decomposition.target(x[:1]).detach()[0, -1].softmax(-1)

    found = outputs_of(graphs.circuit_graph(decomposition, x[:1], output_positions=[-1]))

    top = likely.topk(10)
    assert set(found) == set(top.indices.tolist())
    for index, importance in found.items():
        assert importance == pytest.approx(float(likely[index] / top.values.sum()), rel=1e-9)


@pytest.mark.parametrize("positions", [False, True])
def test_outputs_count_alike_in_a_sum_of_graphs_of_single_inputs(positions: bool):
    """Of each input another share of the probability is shown."""
    decomposition, x = of_words()
    shown = {"outputs": [3, 50], "output_positions": [1, 3, 4], "edges": None}

    whole = graphs.circuit_graph(decomposition, x, positions=positions, **shown)
    single = [graphs.circuit_graph(decomposition, one, **shown) for one in x.split(1)]
    total = graphs.aggregate(single, positions=positions, edges=None)

    (of_whole, _), (of_total, _) = numbers(whole), numbers(total)
    assert of_total == pytest.approx(of_whole, rel=1e-9, abs=1e-11)
    assert total.graph["outputs"]["size"] == pytest.approx(whole.graph["outputs"]["size"], rel=1e-9)


def test_positions_are_kept_for_one_input_and_in_the_id():
    decomposition, x = example("attention")

    graph = graphs.circuit_graph(decomposition, x[:1])

    positions = {data.get("position") for _, data in graph.nodes(data=True) if data["site"] == "up"}
    assert positions <= set(range(5))
    assert len(positions) > 1
    node = next(node for node, data in graph.nodes(data=True) if data["site"] == "up" and data["kind"] == "component")
    data = graph.nodes[node]
    assert node == f"up/{data['index']}@{data['position']}"


def test_attention_carries_edges_across_positions_and_other_layers_do_not():
    decomposition, x = example("attention", closed=0.0)

    graph = graphs.circuit_graph(decomposition, x[:1])

    across = {
        (graph.nodes[source]["site"], graph.nodes[target]["site"])
        for source, target in graph.edges
        if graph.nodes[source].get("position") != graph.nodes[target].get("position")
    }
    assert ("v", "o") in across
    assert all(target == "o" for _, target in across)


def test_every_call_of_a_module_has_nodes_of_its_own():
    decomposition, x = example("recurrent")

    graph = graphs.circuit_graph(decomposition, x)

    calls = {data["call"] for _, data in graph.nodes(data=True) if data["site"] == "mix"}
    assert calls == {0, 1, 2}
    assert nx.is_directed_acyclic_graph(graph)
    assert all("@" in node for node, data in graph.nodes(data=True) if data["site"] == "mix")


def test_the_order_is_the_one_of_the_calls_and_not_of_the_names():
    model = seeded(Calls(lambda m, x: m.a(torch.relu(m.z(x))), a=nn.Linear(4, 2), z=nn.Linear(4, 4))).double()
    decomposition = decomposed_exactly(model, drawn(8, 4))

    graph = graphs.circuit_graph(decomposition, drawn(8, 4))

    layers = {data["site"]: data["layer"] for _, data in graph.nodes(data=True)}
    assert (layers["input"], layers["z"], layers["a"], layers["output"]) == (0, 1, 2, 3)
    assert not any(graph.nodes[target]["site"] == "z" for source, target in graph.edges if source.startswith("a/"))


def test_parallel_sites_have_one_depth():
    decomposition, x = example("attention")

    graph = graphs.circuit_graph(decomposition, x[:1])

    layers = {data["site"]: data["layer"] for _, data in graph.nodes(data=True)}
    assert layers["q"] == layers["k"] == layers["v"] == 2
    assert layers["o"] == 3
    assert layers["up"] == 4


def test_lookups_that_are_no_sites_enter_as_tokens():
    model, x = attention(), ids(7, 6, 5)
    decomposition = decomposed_exactly(model, x, sites=["q", "k", "v", "o", "up", "down"])

    graph = graphs.circuit_graph(decomposition, x[:1])

    tokens = {data["index"] for _, data in graph.nodes(data=True) if data["kind"] == "input"}
    assert tokens == set(x[0].tolist())


def test_attributes_are_plain_python():
    decomposition, x = example("recurrent")

    graph = graphs.circuit_graph(decomposition, x)

    for _, data in [*graph.nodes(data=True), *((None, data) for *_, data in graph.edges(data=True))]:
        assert {type(value) for value in data.values()} <= {int, float, str}
    assert type(graph) is nx.DiGraph


def test_shares_and_influence_sum_to_one():
    decomposition, x = example("relu")

    graph = graphs.circuit_graph(decomposition, x, edges=None)

    for node in graph:
        shares = [share for _, _, share in graph.in_edges(node, data="share")]
        assert not shares or sum(shares) == pytest.approx(1, rel=1e-9)
    ends = [node for node in graph if not graph.in_degree(node)]
    assert sum(graph.nodes[node]["influence"] for node in ends) == pytest.approx(1, rel=1e-9)


def test_the_gauge_does_not_change_the_graph():
    """G1: u times s and v by 1/s."""
    decomposition, x = example("relu", rank=2)
    before = graphs.circuit_graph(decomposition, x)
    for path, parts in decomposition.parts.items():
        own = parts.pieces._replace(u=parts.pieces.u * 3, v=parts.pieces.v / 3)
        decomposition.parts[path] = parts.__class__(own, parts.thresholds, parts.frequencies, parts.start)

    after = graphs.circuit_graph(decomposition, x)

    for *edge, weight in before.edges(data="weight"):
        assert after.edges[edge]["weight"] == pytest.approx(weight, rel=1e-9, abs=1e-13)


def test_the_target_is_as_before():
    decomposition, x = example("attention")
    model = decomposition.target
    state = torch.get_rng_state()

    graphs.circuit_graph(decomposition, x)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_edge_budget_keeps_the_largest_shares_and_says_what_is_hidden():
    decomposition, x = example("relu")
    whole = graphs.circuit_graph(decomposition, x, edges=None)

    graph = graphs.circuit_graph(decomposition, x, edges=20)

    assert graph.number_of_edges() == 20
    assert graph.graph["hidden_edges"] == whole.number_of_edges() - 20
    least = min(share for *_, share in graph.edges(data="share"))
    assert sum(share > least for *_, share in whole.edges(data="share")) < 20


class _Square(torch.autograd.Function):
    """A square whose gradient leaves torch on the way, as a user's own operation may."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.from_numpy(2 * grad.numpy() * ctx.saved_tensors[0].numpy())


def test_operations_without_batches_of_gradients_give_the_same_graph():
    built = []
    for square in (_Square.apply, torch.square):
        model = seeded(Calls(lambda m, x, s=square: m.b(s(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))).double()
        built.append(graphs.circuit_graph(decomposed_exactly(model, drawn(8, 4)), drawn(8, 4)))

    own, plain = ({(s, t): w for s, t, w in one.edges(data="weight")} for one in built)
    assert own == pytest.approx(plain, rel=1e-12)


def test_a_real_run_accounts_for_its_values(decomposed: Decomposition):
    graph = graphs.circuit_graph(decomposed, sparse(64, 5), edges=None)

    # Float32: a few thousand roundings of 6e-8 at most.
    assert max(gaps(graph).values()) < 1e-4
    assert {data["kind"] for _, data in graph.nodes(data=True)} >= {"input", "component", "output"}


def without_gradient() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    return seeded(Model()).double()


def detached() -> nn.Module:
    return seeded(Calls(lambda m, x: m.b(m.a(x).detach().relu()), a=nn.Linear(4, 4), b=nn.Linear(4, 2))).double()


@pytest.mark.parametrize("make", [detached, without_gradient])
def test_a_model_whose_order_cannot_be_traced_is_refused(make: Callable[[], nn.Module]):
    decomposition = decomposed_exactly(make(), drawn(8, 4))

    with pytest.raises(ValueError, match="order of the model cannot be traced: 'a' changes the input of 'b'"):
        graphs.circuit_graph(decomposition, drawn(8, 4))


@pytest.mark.parametrize("outputs", [[3], [-4], [0, 17], [True]])
def test_an_output_index_out_of_range_is_refused(outputs: list):
    decomposition, x = example("relu")

    with pytest.raises(ValueError, match=r"outputs: .* is out of range; the model has 3, numbered 0 to 2"):
        graphs.circuit_graph(decomposition, x, outputs=outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": -1}, "edges must be at least 0 or None, got -1"),
        ({"outputs": []}, "outputs is empty; name one at least"),
        ({"effects": "magic"}, "effects must be one of"),
        ({"components": "some"}, "components must be 'open' or 'all'"),
        ({"effects": "path", "steps": 0}, "steps must be at least 1"),
    ],
)
def test_unknown_choices_are_refused(options: dict, message: str):
    decomposition, x = example("relu")

    with pytest.raises(ValueError, match=message):
        graphs.circuit_graph(decomposition, x, **options)


def test_integers_of_numpy_and_torch_name_outputs_and_others_are_refused():
    decomposition, x = example("relu")

    graph = graphs.circuit_graph(decomposition, x, outputs=[np.int64(2), torch.tensor(0)])

    assert {node for node, kind in graph.nodes(data="kind") if kind == "output"} == {"output/0", "output/2"}
    for outputs in (1, [1.0], "1"):
        with pytest.raises(TypeError, match="outputs must be a list of integers, got"):
            unwrap(_numbers)("outputs", outputs, 3)


def test_what_is_no_decomposition_is_refused():
    decomposition, x = example("relu")

    with pytest.raises(TypeError, match="expected a Decomposition, got Sequential; weightdecomp.decompose"):
        unwrap(graphs.circuit_graph)(decomposition.target, x)


def test_a_model_that_changes_what_gradients_need_is_refused():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x).relu_()
        h += m.b(h)
        return m.c(h)

    layers = {name: nn.Linear(4, 4) for name in "abc"}
    decomposition = decomposed_exactly(seeded(Calls(forward, **layers)).double(), drawn(8, 4))

    with pytest.raises(ValueError, match=r"order of the model cannot be traced: .* in place .* x = x \+ y for x \+= y"):
        graphs.circuit_graph(decomposition, drawn(8, 4))


def test_only_graphs_of_one_input_and_one_decomposition_add_up():
    one, x = example("relu")
    other, _ = example("relu", kept=0.5)

    with pytest.raises(ValueError, match=r"graphs\[1\] has another decomposition"):
        graphs.aggregate([graphs.circuit_graph(d, x[:1]) for d in (one, other)])
    with pytest.raises(ValueError, match=r"graphs\[0\] is of 12 inputs"):
        graphs.aggregate([graphs.circuit_graph(one, x)])
    with pytest.raises(ValueError, match=r"graphs\[1\] has another outputs .* name outputs="):
        graphs.aggregate([graphs.circuit_graph(one, x[i : i + 1], edges=None, outputs=[i]) for i in range(2)])
    whole = graphs.circuit_graph(one, x[:1], edges=None)
    with pytest.raises(ValueError, match=r"graphs\[0\] has been pruned"):
        graphs.aggregate([graphs.prune(whole, influence=0.5)])
    with pytest.raises(ValueError, match="no graphs"):
        graphs.aggregate([])


def test_inputs_that_are_named_have_ids_of_their_own():
    model = seeded(Calls(lambda m, x, y: m.a(x) * m.b(y), a=nn.Linear(3, 2), b=nn.Linear(4, 2))).double()
    batch = {"x": drawn(8, 3), "y": drawn(8, 4)}
    decomposition = decomposed_exactly(model, batch)

    graph = graphs.circuit_graph(decomposition, batch)

    assert {"input.x/2", "input.y/3"} <= set(graph)


def test_titles_name_inputs_and_outputs():
    decomposition, x = example("relu")

    graph = graphs.circuit_graph(decomposition, x, input_titles=["height", "width"], output_titles={1: "cat"})

    assert graph.nodes["input/1"]["title"] == "width"
    assert graph.nodes["input/4"]["title"] == "input/4"
    assert graph.nodes["output/1"]["title"] == "cat"


def test_several_batches_are_one_data_set():
    decomposition, x = example("relu")

    whole = graphs.circuit_graph(decomposition, x)
    apart = graphs.circuit_graph(decomposition, list(x.split(5)))

    for one, other in zip(numbers(apart), numbers(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
