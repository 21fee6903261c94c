"""A small language model with bilinear MLPs: how many components per logit it needs, by metric, and one circuit."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.report import ROOT, provenance, table, write, write_json
from bilinear import BilinearMLP, Layer, data_metric, edges, eigen, read, truncate, write_back

KEPT = (1, 2, 4, 8, 16, 32)
_CONTEXT, _BATCH, _RATE = 64, 64, 3e-3
_TEXT = "tinyshakespeare/input.txt"


class Block(nn.Module):
    """Causal attention and a bilinear MLP, each behind an RMSNorm on a residual stream."""

    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.RMSNorm(d, eps=1e-6), nn.Linear(d, 3 * d, False), nn.Linear(d, d, False)
        self.mlp = BilinearMLP(d, 2 * d, norm=nn.RMSNorm(d, eps=1e-6))
        self.n_heads = n_heads

    def forward(self, x: Tensor) -> Tensor:
        """The stream after the block."""
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (one.unflatten(-1, (self.n_heads, -1)).transpose(-2, -3) for one in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(-2, -3).flatten(-2))
        return x + self.mlp(x)


class LanguageModel(nn.Module):
    """Characters to the logits of the next; no norm before the unembedding, so logits are linear in the last MLP."""

    def __init__(self, vocabulary: int, d: int, n_layers: int, n_heads: int = 4) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, d), nn.Embedding(_CONTEXT, d)
        self.blocks = nn.ModuleList([Block(d, n_heads) for _ in range(n_layers)])
        self.unembed = nn.Linear(d, vocabulary, bias=False)
        for embedding in (self.embed, self.position):
            embedding.weight.data *= 0.1

    def forward(self, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position token"]:
        """Logits."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)


def text_of(folder: Path | None) -> tuple[str, str]:
    """The text and its name; this project's own documents where there is no data folder."""
    if folder is not None and (folder / _TEXT).exists():
        return (folder / _TEXT).read_text(), _TEXT
    return "".join((ROOT / name).read_text() for name in ("README.md", "SPEC.md", "CHANGELOG.md")), "documents"


def windows(ids: Int[Tensor, " n"], steps: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Random windows of context + 1 characters."""
    for _ in range(steps):
        starts = torch.randint(len(ids) - _CONTEXT - 1, (_BATCH,), generator=rng)
        yield ids[starts[:, None] + torch.arange(_CONTEXT + 1)]


def trained_model(ids: Tensor, vocabulary: int, d: int, n_layers: int, steps: int, seed: int) -> LanguageModel:
    """A model trained with AdamW and a cosine; deterministic by its seed."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = LanguageModel(vocabulary, d, n_layers)
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.1)
    for step, batch in enumerate(windows(ids, steps, rng)):
        rate = _RATE * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad()
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


@torch.no_grad()
def divergence(model: nn.Module, target: nn.Module, tokens: Tensor) -> float:
    """Mean KL of the target's next-character distributions from the model's, in nats."""
    p, q = (one(tokens).log_softmax(-1) for one in (target, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def mlp_inputs(model: LanguageModel, tokens: Tensor, block: int) -> Tensor:
    """What a block's MLP reads."""
    seen: list[Tensor] = []
    handle = model.blocks[block].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr]
    model(tokens)
    handle.remove()
    return seen[0].flatten(0, 1)


def circuit(model: LanguageModel, characters: list[str], character: str, metric: Any, k: int = 4) -> nx.DiGraph:
    """One logit's largest components, with what they read of tokens and of the first MLP's components.

    Weights of edges into a component are exact up to the common factor 1 / rms(stream) that its norm puts on every
    input; edges into the logit are eigenvalues.
    """
    last, first = (read(model.blocks[i].mlp) for i in (-1, 0))  # type: ignore[arg-type]
    assert isinstance(last, Layer) and isinstance(first, Layer)
    pairs = eigen(last, model.unembed.weight.detach()[characters.index(character)], k=k, metric=metric)
    upstream = eigen(first, k=1).squares()
    found = edges(upstream, pairs.vectors)
    tokens = model.embed.weight.detach() @ pairs.vectors
    graph = nx.DiGraph(output=f"logit of {character!r}", metric=metric.name)
    graph.add_node("logit", kind="output")
    for i in range(k):
        graph.add_node(f"last {i}", kind="component of the last MLP")
        graph.add_edge(f"last {i}", "logit", weight=float(pairs.values[i]), evidence="exact")
        read_from = [("token", repr(c), tokens[t, i]) for t, c in enumerate(characters)]
        read_from += [("component of the first MLP", f"first {r}", weight) for r, weight in enumerate(found.weights[i])]
        for kind in ("token", "component of the first MLP"):
            own = sorted((one for one in read_from if one[0] == kind), key=lambda one: -abs(float(one[2])))
            for _, node, weight in own[:4]:
                graph.add_node(node, kind=kind)
                graph.add_edge(node, f"last {i}", weight=float(weight), evidence="exact up to 1/rms")
    return graph


def picture(graph: nx.DiGraph) -> Any:
    """A matplotlib figure of a circuit: what is read on the left, then components, then the logit."""
    from matplotlib.figure import Figure

    sources = [node for node in graph if not graph.in_degree(node)]
    middle = list(graph.predecessors("logit"))
    places = {"logit": (2.0, 0.5)} | {node: (1.0, 1 - (i + 0.5) / len(middle)) for i, node in enumerate(middle)}
    # Each source near what reads it.
    sources.sort(key=lambda node: -max(places[to][1] for to in graph.successors(node)))
    places |= {node: (0.0, 1 - (i + 0.5) / len(sources)) for i, node in enumerate(sources)}
    kinds, most = dict(graph.nodes(data="kind")), dict[str, float]()  # widths compare within a kind of source
    for a, _, weight in graph.edges(data="weight"):
        most[kinds[a]] = max(most.get(kinds[a], 0.0), abs(weight))
    figure = Figure(figsize=(7.0, 6.4), layout="constrained")
    axis = figure.subplots()
    for a, b, weight in graph.edges(data="weight"):
        (x, y), (x2, y2) = places[a], places[b]
        width = 3 * abs(weight) / most[kinds[a]]
        axis.plot((x, x2), (y, y2), color="tab:blue" if weight > 0 else "tab:red", linewidth=width, alpha=0.6, zorder=1)
    for node, (x, y) in places.items():
        label = graph.graph["output"] if node == "logit" else node
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "grey"}
        axis.text(x, y, label, ha=("right", "center", "left")[int(x)], va="center", fontsize=8, bbox=box, zorder=2)
    axis.set(xlim=(-0.4, 2.5), ylim=(0, 1))
    axis.set_title(
        f"{graph.graph['output']}, {graph.graph['metric']} metric; blue: positive weights, red: negative", fontsize=9
    )
    axis.axis("off")
    return figure


def run(folder: Path | None, out: Path, smoke: bool) -> str:
    """Train, truncate by metric, and write a circuit; returns the table."""
    text, name = text_of(folder)
    characters = sorted(set(text))
    number = {c: i for i, c in enumerate(characters)}
    ids = torch.tensor([number[c] for c in text])
    cut = len(ids) * 9 // 10
    d, n_layers, steps = (16, 2, 20) if smoke else (96, 2, 2000)
    start = time.process_time()
    model = trained_model(ids[:cut], len(characters), d, n_layers, steps, seed=0)
    seconds = time.process_time() - start
    rng = torch.Generator().manual_seed(1)
    seen, held = (next(windows(part, 1, rng)) for part in (ids[:cut], ids[cut:]))
    path = f"blocks.{n_layers - 1}.mlp"
    layer = read(model.get_submodule(path))
    assert isinstance(layer, Layer)
    metric = data_metric(layer, mlp_inputs(model, seen[:, :-1], n_layers - 1))
    heads = model.unembed.weight.detach()
    curves: dict[str, list[float]] = {}
    for label, measure in (("sphere", None), ("data", metric)):
        curves[label] = []
        for k in [one for one in KEPT if one <= layer.d_in]:
            changed = write_back(model, {path: truncate(layer, k, heads, metric=measure).squares})
            curves[label].append(divergence(changed, model, held[:, :-1]))
    nothing = Layer(layer.w, layer.v, torch.zeros_like(layer.d))
    with torch.no_grad():
        loss = float(F.cross_entropy(model(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten()))
    result = {
        "text": name,
        "d": d,
        "layers": n_layers,
        "steps": steps,
        "seed": 0,
        "training_cpu_seconds": seconds,
        "held_out_loss": loss,
        "kept": [k for k in KEPT if k <= layer.d_in],
        "kl": curves,
        "kl_without_the_mlp": divergence(write_back(model, {path: nothing}), model, held[:, :-1]),
        "provenance": provenance(),
    }
    write_json(out / "language.json", result)
    graph = circuit(model, characters, "e", metric)
    write(out / "language_circuit.json", json.dumps(nx.node_link_data(graph, edges="edges"), indent=1) + "\n")
    picture(graph).savefig(out / "language_circuit.png", dpi=100)
    rows = [[label, *(f"{value:.4f}" for value in values)] for label, values in curves.items()]
    head = ("metric", *(f"k {k}" for k in result["kept"]))
    text = (
        f"KL (nats) of a {n_layers}-layer character model (width {d}, {loss:.3f} nats a character held out, "
        f"{seconds:.0f} CPU seconds of training) after its last MLP keeps k components per logit, by execution; "
        f"without that MLP {result['kl_without_the_mlp']:.4f}:\n\n{table(head, rows)}"
    )
    write(out / "language.md", text + "\n")
    return text
