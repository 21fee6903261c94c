"""Build: the circuit graph of a decomposition on one input or on a data set.

1. The target runs once, cut at its sites (`_trace`).
2. Open components, remainders, biases, inputs and outputs become columns (`_columns`).
3. Effects of columns on activations come by gradient, along a path, or by taking columns away (`_edges`).
4. Sums over inputs become means with standard errors, shares and influences (`_tally`, `_influence`).

A component that is not shown belongs to its site's remainder, so nothing is left out of an account.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import index
from typing import Any, SupportsIndex

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from graphs import _edges
from graphs._card import cards
from graphs._edges import Block
from graphs._influence import add_influence
from graphs._removal import by_removal
from graphs._scene import Choice, Scene, readers, staged
from graphs._tally import Tally
from graphs._trace import Trace, by_position, check_order, parents, traced
from graphs._units import component_gates, digest_of, of_components, of_method, unit_gates
from weightdecomp import Decomposition
from weightdecomp.baselines import Fitted
from weightdecomp.engine import (
    Batch,
    batch_digest,
    call,
    output_tensor,
    package_version,
    select,
    size,
    tensor_digest,
    tensors,
    unreadable_named,
)

SCHEMA_VERSION = 1
EFFECTS = ("gradient", "path", "removal")
_MOST_OUTPUTS = 64  # shown unless asked for
_TOP_OUTPUTS = 10  # of more than those
_AT_ONCE = 1 << 22  # numbers in the rows of one batch

Titles = Mapping[int, str] | Sequence[str]


def circuit_graph(
    decomposition: Decomposition,
    inputs: Any,
    *,
    components: str = "open",
    collapse: bool = False,
    units: Fitted | None = None,
    effects: str = "gradient",
    steps: int = 8,
    positions: bool | None = None,
    outputs: Sequence[SupportsIndex] | None = None,
    output_positions: Sequence[SupportsIndex] | None = None,
    edges: int | None = 100_000,
    input_titles: Titles | None = None,
    output_titles: Titles | None = None,
) -> nx.DiGraph:
    """The circuit graph of a decomposition: which component drives which, on one input or on a data set.

    Edges lead from a source to the next component on the way (or to an output), never past one. The weight is the
    effect of the source's contribution on the target's activation, before its gate, with every other site's output
    held. Graphs of single inputs add up to the graph of all of them; see `aggregate`.

    Args:
        decomposition: The result of a run; values are those of its target, nothing is masked.
        inputs: A batch as the model takes it, or a list of such batches.
        components: "open" shows a component where its gate is open and counts it to the remainder elsewhere;
            "all" shows every component everywhere.
        collapse: One node for all components of a circuit at a site.
        units: Another method's units in place of the components, as `weightdecomp.baselines` fits them on the
            decomposition's target and sites; gates are what the method says.
        effects: "gradient" (gradient times contribution; exact where the way to the target is linear in the source),
            "path" (averaged while all sources grow from nothing to what they are, so that they sum to the value; not
            through a norm of its input, which jumps at nothing: there it warns) or
            "removal" (an intervention for every source: a pass of the model each).
        steps: Points of the path.
        positions: Keep positions apart; None does so for a single input only.
        outputs: Output indices to show; None takes all up to 64, else the 10 that are likeliest (KL) or largest on
            average over inputs and positions, of positions kept apart at the last one.
        output_positions: Positions of the output to show; None takes all, or the last one where that is over 64 nodes.
        edges: Largest number of edges kept, those with the largest share; None keeps all.
        input_titles: Names of features or tokens, by index.
        output_titles: Names of outputs, by index.

    Returns:
        A directed graph without cycles. SPEC.md lists all attributes.

    Raises:
        ValueError: For bad inputs, an output index out of range, or a model whose order cannot be traced.
        TypeError: For what is no decomposition.

    Source:
        Attribution with everything else held: param-decomp (2026) and circuit-tracer (Ameisen et al. 2025); the
        cut at sites, the account and the statistics are ours.
    """
    if not isinstance(decomposition, Decomposition):
        kind = type(decomposition).__name__
        raise TypeError(f"expected a Decomposition, got {kind}; weightdecomp.decompose makes one of a model")
    if effects not in EFFECTS:
        raise ValueError(f"effects must be one of {list(EFFECTS)}, got {effects!r}")
    if components not in ("open", "all"):
        raise ValueError(f"components must be 'open' or 'all', got {components!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if edges is not None and edges < 0:
        raise ValueError(f"edges must be at least 0 or None, got {edges}")
    if collapse and units is not None:
        raise ValueError("collapse joins components of circuits, which units of another method have not; leave one out")
    batches = decomposition.read(inputs if isinstance(inputs, list) else [inputs])
    n_inputs = sum(size(batch) for batch in batches)
    apart = n_inputs == 1 if positions is None else positions
    model, sites = decomposition.target, decomposition.sites
    cast = of_components(decomposition, collapse) if units is None else of_method(decomposition, units)
    circuits = {path: own.circuits for path, own in cast.items() if own.circuits is not None}
    first = select(batches[0], torch.arange(1, device=tensors(batches[0])[0].device))
    with unreadable_named(model, batches, "inputs"):
        check_order(model, sites, readers(cast), first)
        probe = traced(model, sites, readers(cast), first)
        sizes = _sizes(decomposition, batches) / n_inputs
    names = _free("input", decomposition), _free("output", decomposition)
    shown_outputs, at = _outputs(sizes, outputs, output_positions, apart)
    tally = Tally(n_inputs, circuits)
    for batch in _chunks(batches, probe):
        trace = traced(model, sites, readers(cast), batch)
        importances = component_gates(decomposition, cast, trace, batch) if units is None else unit_gates(cast, trace)
        if components == "all":
            importances = {path: [torch.ones_like(x) for x in calls] for path, calls in importances.items()}
        choice = Choice(
            shown={path: [gate > 0 for gate in calls] for path, calls in importances.items()},
            kind="unit" if units is not None else "circuit" if collapse else "component",
            outputs=shown_outputs,
            positions=apart,
            output_positions=at,
            input_name=names[0],
            output_name=names[1],
        )
        scene = staged(model, sites, cast, batch, trace, choice)
        tally.nodes(scene, importances)
        for block in _METHODS[effects](scene, steps):
            tally.edges(block)
    graph = tally.graph(edges, _evidence(effects, n_inputs))
    _add_layers(graph, probe, decomposition)
    cards(graph, decomposition, input_titles, output_titles)
    graph.graph.update(_about(decomposition, batches, n_inputs, apart, effects, components, collapse))
    graph.graph["outputs"] = {"indices": shown_outputs} | ({} if at is None else {"positions": at})
    if units is not None:
        graph.graph |= {"decomposition": digest_of(units), "method": f"{units.name}, {units.setting}"}
    add_influence(graph, _of_outputs(graph, sizes, at))
    return graph


_METHODS: Mapping[str, Callable[[Scene, int], Iterator[Block]]] = {
    "gradient": lambda scene, steps: _edges.by_gradient(scene),
    "path": _edges.by_path,
    "removal": lambda scene, steps: by_removal(scene),
}


def _evidence(effects: str, n_inputs: int) -> str:
    """An intervention is known on its inputs; gradients and paths estimate it, and so does a mean."""
    return "exact" if effects == "removal" and n_inputs == 1 else "estimate"


def _chunks(batches: Sequence[Batch], probe: Trace) -> Iterator[Batch]:
    """Batches small enough for memory; one input at a time where some site's rows belong to no single input."""
    numbers = sum(event.rows.numel() + event.inner.numel() for event in probe.events)
    most = max(1, _AT_ONCE // max(1, numbers))
    if any(len(event.rows) != 1 for event in probe.events):
        most = 1
    for batch in batches:
        rows = torch.arange(size(batch), device=tensors(batch)[0].device)
        for part in rows.split(most):
            yield batch if len(part) == len(rows) else select(batch, part)


def _free(name: str, decomposition: Decomposition) -> str:
    """A name that no site has."""
    while any(site.path == name or site.path.startswith(f"{name}.") for site in decomposition.sites):
        name += "_"
    return name


@torch.no_grad()
def _sizes(decomposition: Decomposition, batches: Sequence[Batch]) -> Float[Tensor, "position output"]:
    """How much every output counts, summed over inputs: logits by probability, measured numbers by size."""
    found = []
    for batch in batches:
        rows = by_position(output_tensor(call(decomposition.target, batch)), size(batch))
        likely = rows.softmax(-1) if decomposition.divergence.name == "kl" else rows.abs()
        found.append(likely.sum(0, dtype=torch.float64))
    # Batches of text may differ in length.
    return torch.nn.utils.rnn.pad_sequence(found).sum(1)


def _outputs(
    sizes: Float[Tensor, "position output"],
    outputs: Sequence[SupportsIndex] | None,
    positions: Sequence[SupportsIndex] | None,
    apart: bool,
) -> tuple[list[int], list[int] | None]:
    """Output indices and positions to show."""
    n_positions, width = sizes.shape
    at = None if positions is None else _numbers("output_positions", positions, n_positions)
    if outputs is not None:
        chosen = _numbers("outputs", outputs, width)
    elif width <= _MOST_OUTPUTS:
        chosen = list(range(width))
    else:
        rows = sizes[at] if at is not None else sizes[-1:] if apart else sizes
        chosen = sorted(rows.sum(0).topk(_TOP_OUTPUTS).indices.tolist())
    if at is None and n_positions * len(chosen) > _MOST_OUTPUTS and n_positions > 1 and apart:
        at = [n_positions - 1]
    return chosen, at


def _of_outputs(graph: nx.DiGraph, sizes: Float[Tensor, "position output"], at: list[int] | None) -> dict[str, float]:
    """The size of every output node, at its position or summed over those that are shown."""
    summed = (sizes if at is None else sizes[at]).sum(0)
    outputs = {node: data for node, data in graph.nodes(data=True) if data["kind"] == "output"}
    return {
        node: float((sizes[data["position"]] if "position" in data else summed)[data["index"]])
        for node, data in outputs.items()
    }


def _numbers(name: str, given: Sequence[SupportsIndex], limit: int) -> list[int]:
    """Numbers below a limit, each once; negative ones count from the end.

    Raises:
        ValueError: For none, or one that is out of range.
        TypeError: For what is no list of integers.
    """
    try:
        found = [index(one) for one in given]
    except TypeError as error:
        raise TypeError(f"{name} must be a list of integers, got {given!r}") from error
    if not found:
        raise ValueError(f"{name} is empty; name one at least, or leave it out")
    for one, own in zip(given, found, strict=True):
        if isinstance(one, bool) or not -limit <= own < limit:
            raise ValueError(f"{name}: {one!r} is out of range; the model has {limit}, numbered 0 to {limit - 1}")
    return sorted({one % limit for one in found})


def _add_layers(graph: nx.DiGraph, probe: Trace, decomposition: Decomposition) -> None:
    """Depth in the traced order: inputs 0, a call one more than the deepest call that it depends on."""
    depth: list[int] = []
    found = parents(probe)
    for number in range(len(probe.events)):
        depth.append(1 + max((depth[i] for i in found[number] if i >= 0), default=0))
    last = 1 + max(depth, default=0)
    place = {(event.site.path, event.call): (depth[number], number + 1) for number, event in enumerate(probe.events)}
    for _, data in graph.nodes(data=True):
        at = {"input": (0, 0), "output": (last, len(depth) + 1)}.get(data["kind"])
        data["layer"], data["order"] = at or place[data["site"], data.get("call", 0)]


def _about(
    decomposition: Decomposition,
    batches: Sequence[Batch],
    n_inputs: int,
    positions: bool,
    effects: str,
    components: str,
    collapse: bool,
) -> dict[str, Any]:
    """The graph's own attributes."""
    tokens = [x for x in tensors(batches[0]) if not x.is_floating_point()]
    single = {"tokens": tokens[0].flatten().tolist()} if n_inputs == 1 and tokens else {}
    return {
        "schema": "weightdecomp.graph",
        "schema_version": SCHEMA_VERSION,
        "package_version": package_version(),
        "model": tensor_digest(decomposition.target.state_dict()),
        "decomposition": fingerprint(decomposition),
        "inputs": {"n": n_inputs, "sha256": batch_digest(batches), "positions": positions, **single},
        "divergence": decomposition.divergence.name,
        "effects": effects,
        "components": components,
        "collapsed": collapse,
        "sites": [site.path for site in decomposition.sites],
        "pruning": [],
        "scores": [],
    }


def fingerprint(decomposition: Decomposition) -> str:
    """The sha256 of all components and gates."""
    found = {}
    for path, parts in decomposition.parts.items():
        found |= {f"{path}|{name}": x for name, x in zip(("v", "u", "owner"), parts.pieces, strict=True)}
        found[f"{path}|thresholds"] = parts.thresholds
    return tensor_digest(found)
