"""Removing words from a 260,000-parameter language model: components beside fine-tuning, LoRA and random components."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

import weightdecomp as wd
from benchmarks.report import provenance, table, write, write_json
from weightdecomp import baselines

SITES = [f"inner.model.layers.{layer}.mlp.down_proj" for layer in range(5)]
FAMILIES = {"Lily": (317,), "she, She, her": (358, 338, 311)}
"""Words to remove, by their token ids."""
SHARE = 0.25
"""Of a word's mean probability where it is the next token, what may be left."""
RATES = (3e-4, 1e-3)
_LENGTH, _TRAINING = 128, 96  # tokens of a sequence, sequences that may be used
_POSITIONS = 64  # of a sequence, on which nothing should change


class Settings(NamedTuple):
    """What is run.

    Attributes:
        config: Of the decomposition.
        sites: That are decomposed.
        on: Occurrences of the word to choose components on, and to fine-tune on.
        off: Sequences likewise on which nothing should change.
        steps: Of fine-tuning.
    """

    config: wd.Config = wd.Config(steps=20, batch=8, sample=2048)
    sites: Sequence[str] = tuple(SITES)
    on: int = 24
    off: int = 12
    steps: int = 40


SMOKE = Settings(wd.Config(steps=1, batch=2, sample=64, rounds=1), SITES[4:], 3, 2, 2)


class At(nn.Module):
    """A language model's logits at chosen positions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, tokens: Int[Tensor, "sequence token"], positions: Int[Tensor, "sequence position"]
    ) -> Float[Tensor, "sequence position vocabulary"]:
        """Logits for the tokens after the given positions."""
        logits = self.inner(tokens).logits
        return logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


class Case(NamedTuple):
    """A word with the inputs that it is next on, and others, as the model takes them."""

    family: tuple[int, ...]
    on: tuple[Tensor, Tensor]
    off: tuple[Tensor, Tensor]

    def score(self, logits: Tensor) -> Tensor:
        """Probability of the word."""
        return logits.softmax(-1)[:, 0, list(self.family)].sum(-1)


def case(family: tuple[int, ...], tokens: Tensor, on: int, off: int) -> Case:
    """The first occurrences of a word, and the first sequences at positions before other words."""
    following = torch.isin(tokens[:, 1:], torch.tensor(family))
    sequence, position = torch.nonzero(following)[:on].T
    # A stable sort puts the positions before other words first, in their order.
    others = following.int().sort(dim=1, stable=True).indices[:off, :_POSITIONS].sort(dim=1).values
    return Case(family, (tokens[sequence], position[:, None]), (tokens[:off], others))


def fine_tuned(
    original: nn.Module, one: Case, rank: int | None, goal: float, steps: int
) -> list[tuple[nn.Module, float]]:
    """Every setting: rates, each trained until the word is as improbable as the goal, or to the end."""
    with torch.no_grad():
        others = F.log_softmax(original(*one.off), -1).flatten(0, 1)
        wanted = original(*one.on)[:, 0]
        wanted[:, list(one.family)] = -torch.inf
        wanted = wanted.softmax(-1)

    def loss(run: Callable[[Any], Tensor]) -> Tensor:
        kept = F.log_softmax(run(one.off), -1).flatten(0, 1)
        return F.cross_entropy(run(one.on)[:, 0], wanted) + F.kl_div(
            kept, others, log_target=True, reduction="batchmean"
        )

    def until(run: Callable[[Any], Tensor]) -> bool:
        return bool(one.score(run(one.on)).mean() <= goal)

    found = []
    for rate in RATES:
        for end in (until, None):
            start = time.process_time()
            model = baselines.tuned(original, loss, rank=rank, rate=rate, steps=steps, until=end)
            found.append((model, time.process_time() - start))
    return found


def figures(original: nn.Module, held: Case, models: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
    """What is left of the word, and the damage elsewhere, on held-out sequences."""
    report = wd.edit_report(original, models, [held.on], [held.off], "kl")
    found = {}
    for name, model in models.items():
        with torch.no_grad():
            left = float(held.score(model(*held.on)).mean())
        off = report.row(name).off_target
        found[name] = {
            "probability": left,
            "damage": off.mean,
            "error": off.error or 0.0,
            "flipped": off.flipped or 0.0,
        }
    return found


def measured(
    decomposition: wd.Decomposition, tokens: Tensor, family: tuple[int, ...], settings: Settings
) -> dict[str, Any]:
    """Every method on one word."""
    original = decomposition.target
    one = case(family, tokens[:_TRAINING], settings.on, settings.off)
    held = case(family, tokens[_TRAINING:], 200, len(tokens) - _TRAINING)
    with torch.no_grad():
        before = float(one.score(original(*one.on)).mean())
    start = time.process_time()
    picked = wd.responsible(decomposition, [one.on], [one.off], one.score, SHARE * before)
    seconds = time.process_time() - start
    edited = {"components": decomposition.edit(remove=picked.members)}
    found = figures(original, held, {"original": original} | edited)
    found["components"] |= {"CPU-seconds": seconds}
    found["random components"] = random_removal(decomposition, held, picked.members)
    for name, rank in (("fine-tuning", None), ("LoRA, rank 1", 1)):
        tuned = fine_tuned(original, one, rank, max(picked.after, 1e-9), settings.steps)
        scores = figures(original, held, {str(i): model for i, (model, _) in enumerate(tuned)})
        found[name] = best(list(scores.values()), found["components"]["probability"])
        found[name]["CPU-seconds"] = statistics.median(seconds for _, seconds in tuned)
    return {
        "members": picked.members,
        "reached": picked.reached,
        "on": len(held.on[0]),
        "off": len(held.off[0]),
        "methods": found,
    }


def best(scores: Sequence[dict[str, float]], probability: float) -> dict[str, float]:
    """Least damage among settings that leave as little of the word as the edit does, held out: in their favour."""
    enough = [one for one in scores if one["probability"] <= probability]
    return min(enough, key=lambda one: one["damage"]) if enough else min(scores, key=lambda one: one["probability"])


def random_removal(decomposition: wd.Decomposition, held: Case, members: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Mean figures over ten draws of other components, as many at each site."""
    rng, found = torch.Generator().manual_seed(0), []
    for _ in range(10):
        drawn: set[tuple[str, int]] = set()
        for path, _ in members:
            left = [(path, i) for i in range(decomposition.parts[path].pieces.n) if (path, i) not in {*members, *drawn}]
            drawn.add(left[int(torch.randint(len(left), (), generator=rng))])
        edited = {"random": decomposition.edit(remove=sorted(drawn))}
        found.append(figures(decomposition.target, held, edited)["random"])
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


def run(out: Path, data: Path, smoke: bool) -> None:
    """Measure and write."""
    from transformers import LlamaForCausalLM

    settings = SMOKE if smoke else Settings()
    folder = data / "stories260k"
    model = At(LlamaForCausalLM.from_pretrained(folder)).eval()
    tokens = torch.from_numpy(np.load(folder / "self_sampled_tokens_T1.npy").astype("int64"))[:, :_LENGTH]
    sample = tokens[:_TRAINING], torch.arange(_LENGTH).expand(_TRAINING, -1)
    start = time.process_time()
    with warnings.catch_warnings(action="ignore", category=wd.NumericalWarning):
        decomposition = wd.decompose(
            model, [sample], divergence="kl", sites=settings.sites, config=settings.config, progress=False
        )
    seconds = time.process_time() - start
    print(decomposition, flush=True)
    words = {}
    for name, family in FAMILIES.items():
        words[name] = measured(decomposition, tokens, family, settings)
        print(f"language: {name}", flush=True)
    record = {
        "decomposition": {
            "CPU-seconds": seconds,
            "damage": decomposition.outcome.damage,
            "converged": decomposition.converged,
            "live": sum(int((parts.frequencies > 0).sum()) for parts in decomposition.parts.values()),
        },
        "words": words,
        "settings": settings._asdict() | {"config": settings.config.to_dict()},
        "provenance": provenance(),
    }
    write_json(out / "language.json", record)
    write(out / "language.md", page(record))


def page(record: dict[str, Any]) -> str:
    """The tables."""
    settings, own = record["settings"], record["decomposition"]
    parts = [
        "# Removing words from a language model\n",
        f"The 260K-parameter story model, {len(settings['sites'])} MLP matrices decomposed on its own samples in "
        f"{own['CPU-seconds']:.0f} CPU-seconds ({own['live']} live components, damage {own['damage']:.3f}). Components "
        f"are chosen on {settings['on']} occurrences of the word and {settings['off']} sequences, on which fine-tuning "
        f"and LoRA are trained too; of their {2 * len(RATES)} settings the best on held-out sequences is shown, in "
        "their favour. One seed; damage is the mean KL before other words in nats, +- its "
        "standard error over sequences.",
    ]
    for name, one in record["words"].items():
        parts.append(
            f"\n## {name}\n\n{len(one['members'])} components, goal {'' if one['reached'] else 'not '}reached; held "
            f"out: {one['on']} occurrences, {one['off']} sequences.\n"
        )
        rows = [
            [
                method,
                f"{found['probability']:.3f}",
                f"{found['damage']:.4f} +- {found['error']:.4f}",
                f"{100 * found['flipped']:.1f}",
                f"{found['CPU-seconds']:.0f}" if "CPU-seconds" in found else "",
            ]
            for method, found in one["methods"].items()
        ]
        parts.append(table(["method", "probability", "damage", "other top tokens changed %", "CPU-s"], rows))
    return "\n".join(parts) + "\n"
