"""Removing words from a language model of 260,000 parameters: components, beside fine-tuning, LoRA and random ones."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

import weightdecomp as wd
from benchmarks.report import provenance, table, write, write_json
from weightdecomp import baselines

SITES = [f"inner.model.layers.{layer}.mlp.down_proj" for layer in range(5)]
WORDS = {"Lily": (317,), "she, She, her": (358, 338, 311)}
"""What is removed, by token ids."""
SHARE = 0.25
"""Of a word's mean probability where it is the next token, what may be left."""
FACTORS = (0.75, 0.5, 0.25, 0.0)
"""What the components are multiplied by; 0 removes them."""
RATES = (3e-4, 1e-3, 3e-3)
RANKS = {"fine-tuning": None, "LoRA, rank 1": 1}
LENGTH, TRAINING = 64, 96  # tokens of a sequence, sequences that may be used; the others are held out
_POSITIONS = 48  # of a sequence, on which nothing should change
_DRAWS = 10  # of random components


class Settings(NamedTuple):
    """What is run.

    Attributes:
        config: Of the decomposition.
        sites: That are decomposed.
        words: That are removed one at a time.
        on: Occurrences of the word to choose components on, and to fine-tune on.
        off: Sequences likewise on which nothing should change.
        steps: Of fine-tuning.
    """

    config: wd.Config = wd.Config(steps=60, batch=16, sample=2048, rounds=2)
    sites: Sequence[str] = tuple(SITES)
    words: Sequence[str] = tuple(WORDS)
    on: int = 24
    off: int = 12
    steps: int = 60


SMOKE = Settings(wd.Config(steps=1, batch=2, sample=64, rounds=1), SITES[4:], ("Lily",), 3, 2, 2)


class At(nn.Module):
    """A language model's logits at chosen positions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, tokens: Int[Tensor, "sequence token"], positions: Int[Tensor, "sequence position"]
    ) -> Float[Tensor, "sequence position vocabulary"]:
        """Logits for the tokens after the given positions."""
        logits = self.inner(tokens)
        return logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


class Case(NamedTuple):
    """A word with the inputs that it is next on, and others, as the model takes them."""

    word: tuple[int, ...]
    on: tuple[Tensor, Tensor]
    off: tuple[Tensor, Tensor]

    def score(self, logits: Tensor) -> Tensor:
        """Probability of the word."""
        return logits.softmax(-1)[:, 0, list(self.word)].sum(-1)


def case(word: tuple[int, ...], tokens: Tensor, on: int, off: int) -> Case:
    """The first occurrences of a word, and the first sequences at positions before other words."""
    following = torch.isin(tokens[:, 1:], torch.tensor(word))
    sequence, position = torch.nonzero(following)[:on].T
    # A stable sort puts the positions before other words first, in their order.
    others = following.int().sort(dim=1, stable=True).indices[:off, :_POSITIONS].sort(dim=1).values
    return Case(word, (tokens[sequence], position[:, None]), (tokens[:off], others))


def fine_tuned(
    original: nn.Module, one: Case, rank: int | None, goal: float, steps: int
) -> list[tuple[nn.Module, float]]:
    """Every setting with its CPU-seconds: rates, each trained until the word is as improbable as the goal, or on."""
    with torch.no_grad():
        others = F.log_softmax(original(*one.off), -1).flatten(0, 1)
        wanted = original(*one.on)[:, 0]
        wanted[:, list(one.word)] = -torch.inf
        wanted = wanted.softmax(-1)

    def loss(run: Callable[[Any], Tensor]) -> Tensor:
        kept = F.log_softmax(run(one.off), -1).flatten(0, 1)
        return F.cross_entropy(run(one.on)[:, 0], wanted) + F.kl_div(
            kept, others, log_target=True, reduction="batchmean"
        )

    def reached(run: Callable[[Any], Tensor]) -> bool:
        return bool(one.score(run(one.on)).mean() <= goal)

    found = []
    for rate in RATES:
        for until in (reached, None):
            start = time.process_time()
            model = baselines.tuned(original, loss, rank=rank, rate=rate, steps=steps, until=until)
            found.append((model, time.process_time() - start))
    return found


def figures(original: nn.Module, held: Case, model: nn.Module, seconds: float = 0.0) -> dict[str, float]:
    """What is left of the word, and the damage elsewhere in nats, on held-out sequences."""
    off = wd.edit_report(original, model, [held.on], [held.off], "kl").rows[0].off_target
    with torch.no_grad():
        left = float(held.score(model(*held.on)).mean())
    found = {"probability": left, "damage": off.mean, "error": off.error or 0.0, "flipped": off.flipped or 0.0}
    return found | {"CPU-seconds": seconds}


def measured(
    decomposition: wd.Decomposition, tokens: Tensor, word: tuple[int, ...], settings: Settings
) -> dict[str, Any]:
    """Every method on one word."""
    original = decomposition.target
    one = case(word, tokens[:TRAINING], settings.on, settings.off)
    held = case(word, tokens[TRAINING:], 200, len(tokens) - TRAINING)
    with torch.no_grad():
        goal = SHARE * float(one.score(original(*one.on)).mean())
    start = time.process_time()
    picked = wd.responsible(decomposition, [one.on], [one.off], one.score, goal)
    seconds = time.process_time() - start
    scaled = [decomposition.edit(scale=dict.fromkeys(picked.members, factor)) for factor in FACTORS]
    found = {
        "original": [figures(original, held, original)],
        "components": [figures(original, held, model, seconds) for model in scaled],
        "random components": random_removal(decomposition, held, picked.members),
    }
    for name, rank in RANKS.items():
        # In equal measure: fine-tuning that stops does so where the components got to.
        models = fine_tuned(original, one, rank, max(picked.after, 1e-6), settings.steps)
        found[name] = [figures(original, held, *model) for model in models]
    return {
        "members": picked.members,
        "reached": picked.reached,
        "occurrences": len(held.on[0]),
        "sequences": len(held.off[0]),
        "methods": found,
    }


def random_removal(
    decomposition: wd.Decomposition, held: Case, members: Sequence[tuple[str, int]]
) -> list[dict[str, float]]:
    """Figures of taking out other live components, as many at each site."""
    rng, found = torch.Generator().manual_seed(0), []
    for _ in range(_DRAWS):
        drawn: list[tuple[str, int]] = []
        for path, _ in members:
            live = torch.nonzero(decomposition.parts[path].frequencies > 0).flatten().tolist()
            left = [(path, i) for i in live if (path, i) not in {*members, *drawn}]
            drawn.append(left[int(torch.randint(len(left), (), generator=rng))])
        found.append(figures(decomposition.target, held, decomposition.edit(remove=drawn)))
    return found


def run(out: Path, data: Path, smoke: bool) -> None:
    """Measure and write."""
    settings = SMOKE if smoke else Settings()
    folder = data / "stories260k"
    inner = wd.load_hf(folder)
    model = At(inner).eval()
    tokens = torch.cat(wd.token_batches(inner, folder / "self_sampled_tokens_T1.npy"))[:, :LENGTH]
    sample = tokens[:TRAINING], torch.arange(LENGTH).expand(TRAINING, -1)
    start = time.process_time()
    with warnings.catch_warnings(action="ignore", category=wd.NumericalWarning):
        decomposition = wd.decompose(
            model, [sample], divergence="kl", sites=settings.sites, config=settings.config, progress=False
        )
    seconds = time.process_time() - start
    print(decomposition, flush=True)
    words = {}
    for word in settings.words:
        words[word] = measured(decomposition, tokens, WORDS[word], settings)
        print(f"language: {word}", flush=True)
    record = {
        "decomposition": {
            "CPU-seconds": seconds,
            "outcome": decomposition.outcome.reason,
            "verdict": decomposition.outcome.verdict,
            "live": sum(int((parts.frequencies > 0).sum()) for parts in decomposition.parts.values()),
        },
        "words": words,
        "settings": settings._asdict() | {"config": settings.config.to_dict(), "rates": RATES, "factors": FACTORS},
        "provenance": provenance(),
    }
    write_json(out / "language.json", record)
    write(out / "language.md", page(record))
    figure(record).savefig(out / "language.svg", metadata={"Date": None})


def shown(one: dict[str, Any]) -> dict[str, dict[str, float]]:
    """One line a method: components taken out, mean of random draws, the best setting of fine-tuning and LoRA."""
    found = one["methods"]
    rows = {"original": found["original"][0], "components": found["components"][-1]}
    draws = found["random components"]
    rows["random components"] = {name: statistics.fmean(draw[name] for draw in draws) for name in draws[0]}
    goal = rows["components"]["probability"]
    return rows | {name: best(found[name], goal) for name in RANKS}


def best(scores: Sequence[dict[str, float]], probability: float) -> dict[str, float]:
    """Least damage among settings that leave as little of the word as the edit does, held out: in their favour."""
    enough = [one for one in scores if one["probability"] <= probability]
    return min(enough, key=lambda one: one["damage"]) if enough else min(scores, key=lambda one: one["probability"])


def page(record: dict[str, Any]) -> str:
    """The tables."""
    settings, own = record["settings"], record["decomposition"]
    parts = [
        "# Removing words from a language model\n",
        f"The 260K-parameter story model; {len(settings['sites'])} MLP matrices (down_proj) decomposed on {TRAINING} "
        f"of its own samples, {LENGTH} tokens each, in {own['CPU-seconds']:.0f} CPU-seconds: {own['live']} live "
        f"components, damage {own['outcome']}. Goal: {SHARE:.0%} of the word's mean probability where it comes next. "
        f"Components are chosen on {settings['on']} such places and {settings['off']} sequences, on which fine-tuning "
        f"and LoRA are trained too; of their {2 * len(RATES)} settings the best on the held-out sequences is shown, in "
        "their favour. Damage: mean KL before other words in nats +- its standard error over sequences. One seed.",
    ]
    for name, one in record["words"].items():
        names = ", ".join(f"{index} of {site.split('.', 1)[1]}" for site, index in one["members"])
        told = "" if one["reached"] else "not "
        parts.append(
            f"\n## {name}\n\n{len(one['members'])} components, goal {told}reached: {names}. "
            f"Held out: {one['occurrences']} places, {one['sequences']} sequences.\n"
        )
        rows = [
            [
                method,
                f"{found['probability']:.3f}",
                f"{found['damage']:.4f} +- {found['error']:.4f}",
                f"{100 * found['flipped']:.1f}",
                f"{found['CPU-seconds']:.1f}" if found["CPU-seconds"] else "",
            ]
            for method, found in shown(one).items()
        ]
        parts.append(table(["method", "probability", "damage", "other top tokens changed %", "CPU-s"], rows))
    return "\n".join(parts) + "\n"


def figure(record: dict[str, Any]) -> Any:
    """Damage elsewhere against what is left of the word: components by factor, every setting of the others."""
    from matplotlib.figure import Figure

    words = record["words"]
    drawing = Figure(figsize=(4.2 * len(words) + 1.6, 3.4), layout="constrained")
    panels = zip(drawing.subplots(1, len(words), squeeze=False)[0], words.items(), strict=True)
    for place, (axis, (name, one)) in enumerate(panels):
        for i, (method, style) in enumerate(_STYLES.items()):
            points = [(found["probability"], found["damage"]) for found in one["methods"][method]]
            axis.plot(*zip(*points, strict=True), style, color=f"C{i}", ms=4, lw=1, label=None if place else method)
        axis.axvline(one["methods"]["original"][0]["probability"], color="#767676", lw=1, ls=":")
        axis.set(yscale="log", title=name, xlabel="probability left where it comes next")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
    drawing.axes[0].set_ylabel("damage before other words (nats)")
    drawing.legend(loc="outside right center", frameon=False)
    return drawing


_STYLES = {"components": "o-", "fine-tuning": "D", "LoRA, rank 1": "^", "random components": "s"}
