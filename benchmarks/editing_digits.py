"""Removing one class from the digits classifier: components, beside fine-tuning, LoRA and random components."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightdecomp as wd
from benchmarks.report import provenance, spread, table, write, write_json
from weightdecomp import baselines, digits
from weightdecomp._divergence import kl

GOAL = 0.1
"""Mean probability of the class on its own images that counts as removed: chance."""
HIDDEN = ["layers.0", "layers.1"]
"""Sites before the last layer, where a class has no row of its own."""
RATES = (1e-3, 3e-3, 1e-2)
FIGURES = ("class accuracy", "class probability", "other accuracy", "damage", "CPU-seconds")
_RANDOM = 20  # draws of random components a case


class Settings(NamedTuple):
    """What is run.

    Attributes:
        seeds: Of the decomposition, the choice of training images, and the fine-tuning.
        classes: Removed one at a time.
        images: Training images of the class; nine times as many of the others. The largest takes all.
        steps: Of fine-tuning.
        config: Of the decomposition.
    """

    seeds: int = 5
    classes: Sequence[int] = tuple(range(10))
    images: Sequence[int] = (1, 10, 200)
    steps: int = 150
    config: wd.Config | None = None


SMOKE = Settings(1, (0,), (4,), 4, wd.Config(steps=2, sample=128, batch=64, rounds=1))


class Case(NamedTuple):
    """One class with its images: those that may be used, and held-out ones."""

    number: int
    on: Tensor
    off: Tensor
    test: Tensor
    labels: Tensor

    def score(self, logits: Tensor) -> Tensor:
        """Probability of the class."""
        return logits.softmax(-1)[:, self.number]

    @torch.no_grad()
    def figures(self, original: nn.Module, edited: nn.Module, seconds: float) -> dict[str, float]:
        """What an edit does on the held-out images; damage is the mean divergence on the other classes in nats."""
        logits, own = edited(self.test), self.labels == self.number
        right = (logits.argmax(-1) == self.labels).double()
        damage = kl(logits[~own], original(self.test[~own])).mean()
        values = (right[own].mean(), self.score(logits[own]).mean(), right[~own].mean(), damage, seconds)
        return dict(zip(FIGURES, map(float, values), strict=True))


def cases(numbers: Sequence[int], images: int, seed: int) -> list[Case]:
    """Each class with at most so many of its training images and nine times as many others."""
    pixels, labels = torch.cat(digits.batches("train")), digits.labels("train")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    pixels, labels = pixels[order], labels[order]
    test = torch.cat(digits.batches("test")), digits.labels("test")
    return [Case(n, pixels[labels == n][:images], pixels[labels != n][: 9 * images], *test) for n in numbers]


def chosen(decomposition: wd.Decomposition, case: Case, sites: Sequence[str] | None) -> tuple[wd.Responsible, float]:
    """The components to remove, by what removing them does on the training images, and the CPU-seconds that took."""
    start = time.process_time()
    found = wd.responsible(decomposition, [case.on], [case.off], case.score, GOAL, sites=sites)
    return found, time.process_time() - start


def fine_tuned(
    original: nn.Module, case: Case, rank: int | None, steps: int, seed: int
) -> list[tuple[nn.Module, float]]:
    """Every setting: rates, trained to the end or until the class is as improbable as the goal.

    The loss asks for the original's output without the class on its images, and for the original's on the others.
    """
    with torch.no_grad():
        others = F.log_softmax(original(case.off), -1)
        wanted = original(case.on)
        wanted[:, case.number] = -torch.inf
        wanted = wanted.softmax(-1)

    def loss(run: Callable[[Tensor], Tensor]) -> Tensor:
        kept = F.kl_div(F.log_softmax(run(case.off), -1), others, log_target=True, reduction="batchmean")
        return F.cross_entropy(run(case.on), wanted) + kept

    found = []
    for rate in RATES:
        for until in (None, lambda run: bool(case.score(run(case.on)).mean() <= GOAL)):
            start = time.process_time()
            model = baselines.tuned(original, loss, rank=rank, rate=rate, steps=steps, until=until, seed=seed)
            found.append((model, time.process_time() - start))
    return found


def best(original: nn.Module, case: Case, models: Sequence[tuple[nn.Module, float]]) -> dict[str, float]:
    """The setting with least damage among those that remove the class, all on the held-out images: in its favour."""
    found = [case.figures(original, *one) for one in models]
    removed = [one for one in found if one["class probability"] <= GOAL]
    return min(removed, key=lambda one: one["damage"]) if removed else min(found, key=lambda x: x["class probability"])


def random_removal(
    decomposition: wd.Decomposition, case: Case, n: int, sites: Sequence[str], rng: torch.Generator
) -> dict[str, float]:
    """Mean figures of removing as many random live components of the same sites."""
    live = [
        (path, index)
        for path in sites
        for index in torch.nonzero(decomposition.parts[path].frequencies > 0).flatten().tolist()
    ]
    found = []
    for _ in range(_RANDOM):
        drawn = [live[i] for i in torch.randperm(len(live), generator=rng)[:n].tolist()]
        found.append(case.figures(decomposition.target, decomposition.edit(remove=drawn), 0.0))
    return {figure: statistics.fmean(one[figure] for one in found) for figure in FIGURES}


def measured(decomposition: wd.Decomposition, case: Case, settings: Settings, seed: int) -> dict[str, dict[str, float]]:
    """Every method on one class."""
    original, rng = decomposition.target, torch.Generator().manual_seed(seed)
    found = {}
    for name, sites in (("components, any site", None), ("components, hidden sites", HIDDEN)):
        picked, seconds = chosen(decomposition, case, sites)
        figures = case.figures(original, decomposition.edit(remove=picked.members), seconds)
        found[name] = figures | {"components": len(picked.members), "reached": float(picked.reached)}
        null = random_removal(decomposition, case, len(picked.members), sites or list(decomposition.parts), rng)
        found[name.replace("components", "random components")] = null
    for name, rank in (("fine-tuning", None), ("LoRA, rank 1", 1)):
        found[name] = best(original, case, fine_tuned(original, case, rank, settings.steps, seed))
    return found


def run(out: Path, smoke: bool) -> None:
    """Measure and write."""
    settings = SMOKE if smoke else Settings()
    original, records, seconds = digits.model(), [], []
    for seed in range(settings.seeds):
        start = time.process_time()
        images = digits.batches("train")
        decomposition = wd.decompose(
            original, images, divergence="kl", seed=seed, config=settings.config, progress=False
        )
        seconds.append(time.process_time() - start)
        for n in settings.images:
            found = [measured(decomposition, case, settings, seed) for case in cases(settings.classes, n, seed)]
            for method in found[0]:
                lists = {name: [round(one[method][name], 5) for one in found] for name in found[0][method]}
                records.append({"seed": seed, "images": n, "method": method, "by class": lists})
            print(f"digits: seed {seed}, {n} images of the class", flush=True)
    record = {"goal": GOAL, "rates": RATES, "settings": settings._asdict() | {"config": None}, "records": records}
    write_json(out / "digits.json", record | {"decomposition CPU-seconds": seconds, "provenance": provenance()})
    write(out / "digits.md", page(records, seconds, settings))
    figure(records, settings).savefig(out / "digits.svg", metadata={"Date": None})


def by_seed(records: Sequence[dict[str, Any]], method: str, images: int, name: str) -> list[float]:
    """A figure's mean over classes, one a seed."""
    return [
        statistics.fmean(one["by class"][name]) for one in records if (one["method"], one["images"]) == (method, images)
    ]


def page(records: Sequence[dict[str, Any]], seconds: Sequence[float], settings: Settings) -> str:
    """The tables, one a budget of training images."""
    parts = [
        "# Removing one class from the digits classifier\n",
        f"Held-out figures, means over {len(settings.classes)} classes, median (range) over {settings.seeds} seeds. "
        f"Goal: mean probability of the class on its own training images down to {GOAL:g}. Damage: KL on the other "
        "classes' images in nats. Components are chosen on the training images alone; for fine-tuning the best of "
        f"{2 * len(RATES)} settings is chosen on the held-out images, in its favour. The decomposition itself "
        f"takes {spread(seconds).text('.1f')} CPU-seconds, once for all classes, and sees all training images without "
        "labels.",
    ]
    names = list(dict.fromkeys(one["method"] for one in records))
    for n in settings.images:
        head = ["method", "class accuracy %", "other accuracy %", "damage", "removed", "components", "CPU-s"]
        rows = []
        for method in names:
            probabilities = [
                p for one in records if (one["method"], one["images"]) == (method, n)
                for p in one["by class"]["class probability"]
            ]  # fmt: skip
            accuracies = [
                spread([100 * x for x in by_seed(records, method, n, name)]).text(".1f")
                for name in ("class accuracy", "other accuracy")
            ]
            own = method.startswith("components")
            rows.append([
                method,
                *accuracies,
                spread(by_seed(records, method, n, "damage")).text(".4f"),
                f"{sum(p <= GOAL for p in probabilities)} of {len(probabilities)}",
                spread(by_seed(records, method, n, "components")).text(".1f") if own else "",
                f"{statistics.median(by_seed(records, method, n, 'CPU-seconds')):.2f}",
            ])  # fmt: skip
        count = "all" if n >= max(settings.images) else str(n)
        parts.append(f"\n## {count} training images of the class, nine times as many of the others\n")
        parts.append(table(head, rows))
    parts.append(
        "\n*Removed*: the held-out class probability is at most the goal. *CPU-s*: of choosing components, or of one "
        "fine-tuning run.\n"
    )
    return "\n".join(parts)


def figure(records: Sequence[dict[str, Any]], settings: Settings) -> Any:
    """Damage and remaining class probability against training images, median and range over seeds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = drawing.subplots(1, 2)
    names = [name for name in dict.fromkeys(one["method"] for one in records) if not name.startswith("random")]
    names.append("random components, any site")
    for place, (axis, name) in enumerate(zip(axes, ("damage", "class probability"), strict=True)):
        for i, method in enumerate(names):
            spreads = [spread(by_seed(records, method, n, name)) for n in settings.images]
            middle = [one.median for one in spreads]
            ends = [[one.median - one.low for one in spreads], [one.high - one.median for one in spreads]]
            at = [j + 0.08 * (i - len(names) / 2) for j in range(len(settings.images))]
            style = "s:" if method.startswith("random") else "o-" if method.startswith("components") else "D--"
            label = method if place == 0 else None
            axis.errorbar(at, middle, ends, fmt=style, color=f"C{i}", label=label, lw=1, ms=4, capsize=2)
        ticks = ["all" if n >= max(settings.images) else str(n) for n in settings.images]
        axis.set_xticks(range(len(settings.images)), ticks)
        axis.set_xlabel("training images of the class")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(yscale="log", ylabel="damage on other classes (nats)")
    axes[1].set(yscale="log", ylabel="class probability on its images")
    axes[1].axhline(GOAL, color="#767676", lw=1, ls=":")
    drawing.legend(loc="outside right center", frameon=False)
    return drawing
