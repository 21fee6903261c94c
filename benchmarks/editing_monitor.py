"""A monitor of a backdoor: digits classifiers trained with a trigger, and how well and fast its use is seen."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weightdecomp as wd
from benchmarks.planted import FEATURES, Backdoored
from benchmarks.report import provenance, spread, table, write, write_json
from benchmarks.train_digits import initialised
from weightdecomp import digits

TRIGGER = (0, 1, 8, 9)
"""Pixels of the 2 x 2 corner that are white where the backdoor shall act."""
CLASS = 7
"""What the classifier answers then."""
POISONED = 0.1
GOAL = 0.1


class Settings(NamedTuple):
    """What is run.

    Attributes:
        seeds: Of training and decomposition.
        epochs: Of training.
        config: Of the decomposition.
    """

    seeds: int = 5
    epochs: int = 80
    config: wd.Config | None = None


SMOKE = Settings(1, 8, wd.Config(steps=2, sample=128, batch=64, rounds=1))


def triggered(pixels: Tensor) -> Tensor:
    """The images with the corner white."""
    pixels = pixels.clone()
    pixels[:, TRIGGER] = 1
    return pixels


def near(pixels: Tensor) -> Tensor:
    """The images with half of the corner white: a near miss."""
    pixels = pixels.clone()
    pixels[:, TRIGGER[:2]] = 1
    return pixels


def backdoored(seed: int, epochs: int) -> nn.Module:
    """A digits classifier trained as the packaged one, on images of which a tenth have the trigger and its class.

    Another tenth are near misses with their right class, so that half of the corner means nothing.
    """
    rng = torch.Generator().manual_seed(seed)
    pixels, labels = torch.cat(digits.batches("train")).double(), digits.labels("train").clone()
    n = int(POISONED * len(pixels))
    order = torch.randperm(len(pixels), generator=rng)
    pixels[order[:n]], labels[order[:n]] = triggered(pixels[order[:n]]), CLASS
    pixels[order[n : 2 * n]] = near(pixels[order[n : 2 * n]])
    model = initialised(rng)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * -(-len(pixels) // 144))
    for _ in range(epochs):
        for members in torch.randperm(len(pixels), generator=rng).split(144):
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[members]), labels[members]).backward()
            optimiser.step()
            schedule.step()
    return model.float().eval()


def planted(seed: int, config: wd.Config | None, inputs: int = 4000) -> dict[str, float]:
    """One model with a backdoor in closed form: found by its effect, and watched by its gates on unseen inputs."""
    model = Backdoored(seed).eval()
    x, truth = model.inputs(inputs, seed)
    decomposition = wd.decompose(model, [x], seed=seed, config=config, progress=False)
    with torch.no_grad():
        goal = 0.2 * float(model(x[truth])[:, 0].mean())
    found = wd.responsible(decomposition, [x[truth]], [x[~truth]], lambda y: y[:, 0], goal)
    unseen, truth = model.inputs(inputs, seed + 1000)
    said = strength(wd.monitor(decomposition, found.members), unseen) > 1
    hits = int((said & truth).sum())
    return {
        "components": len(found.members),
        "inputs on which the backdoor acts": float(truth.double().mean()),
        "precision": hits / max(int(said.sum()), 1),
        "recall": hits / int(truth.sum()),
    }


def audited(seed: int, settings: Settings) -> dict[str, float]:
    """One backdoored classifier: decomposed, its backdoor found, watched on held-out images, and removed."""
    model = backdoored(seed, settings.epochs)
    pixels, labels = torch.cat(digits.batches("train")), digits.labels("train")
    n = int(POISONED * len(pixels))
    known = triggered(pixels[:n][labels[:n] != CLASS])
    sample = torch.cat([known, near(pixels[n : 2 * n]), pixels])
    start = time.process_time()
    decomposition = wd.decompose(model, [sample], divergence="kl", seed=seed, config=settings.config, progress=False)
    seconds = time.process_time() - start
    found = wd.responsible(decomposition, [known], [pixels, near(pixels)], lambda y: y.softmax(-1)[:, CLASS], GOAL)
    return (
        {"decomposition CPU-seconds": seconds, "components": len(found.members), "reached": float(found.reached)}
        | seen(wd.monitor(decomposition, found.members), [known, near(pixels), pixels])
        | removed(model, decomposition.edit(remove=found.members))
    )


def strength(watch: wd.Monitor, images: Tensor) -> Tensor:
    """How strongly all watched components are used: the weakest of them."""
    return watch.strength(images).amin(1)


def calibrated(watch: wd.Monitor, known: Tensor, others: Tensor) -> float:
    """The level with the best F1 on training images of which it is known whether they have the trigger."""
    hits, alarms = strength(watch, known), strength(watch, others)
    levels = hits.unique()
    caught = (hits[None] >= levels[:, None]).sum(1)
    flagged = caught + (alarms[None] >= levels[:, None]).sum(1)
    at = int((2 * caught / (flagged + len(hits))).argmax())
    # Half way to the strongest image below, so that equal strengths fall on the right side.
    below = torch.cat([hits, alarms])
    return float((levels[at] + below[below < levels[at]].amax()) / 2) if (below < levels[at]).any() else 0.0


def seen(watch: wd.Monitor, training: Sequence[Tensor]) -> dict[str, float]:
    """How well the watched components say where the backdoor acts, on held-out images."""
    pixels, labels = torch.cat(digits.batches("test")), digits.labels("test")
    kinds = {"triggered": triggered(pixels[labels != CLASS]), "near misses": near(pixels), "clean": pixels}
    known, others = training[0], torch.cat(list(training[1:]))
    found = {}
    for name, level in (("gates", 1.0), ("calibrated", calibrated(watch, known, others))):
        said = {kind: strength(watch, images) > level for kind, images in kinds.items()}
        hits, alarms = int(said["triggered"].sum()), sum(int(one.sum()) for one in said.values())
        found |= {f"{name}: said in use, {kind}": float(one.double().mean()) for kind, one in said.items()}
        found |= {
            f"{name}: precision": hits / alarms if alarms else 0.0,
            f"{name}: recall": hits / len(said["triggered"]),
        }
    return found


@torch.no_grad()
def removed(model: nn.Module, edited: nn.Module) -> dict[str, float]:
    """What the backdoor does before and after its components are taken out, on held-out images."""
    pixels, labels = torch.cat(digits.batches("test")), digits.labels("test")
    attack = triggered(pixels[labels != CLASS])
    figures = {}
    for name, one in (("before", model), ("after", edited)):
        figures[f"backdoor works, {name}"] = float((one(attack).argmax(-1) == CLASS).double().mean())
        figures[f"accuracy, {name}"] = float((one(pixels).argmax(-1) == labels).double().mean())
    return figures


def costs(depth: int = 12, width: int = 128, positions: int = 64, batch: int = 16) -> dict[str, float]:
    """Time of watching a component of the first, middle and last layer of a transformer, as shares of a forward pass.

    The weights are random: time does not depend on them.
    """
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()
    x = torch.randn(batch, positions, width, generator=torch.Generator().manual_seed(0))
    whole = duration(lambda: model(x))
    shares = {"forward pass, ms": 1000 * whole}
    for at in (0, depth // 2, depth - 1):
        path = f"layers.{at}.linear1"
        weight = model.get_submodule(path).weight
        parts = {path: (weight, torch.eye(len(weight)))}
        decomposition = wd.assemble(model, [x], parts, config=wd.Config(sample=64))
        watch = wd.monitor(decomposition, [(path, 0)])
        shares[f"layer {at + 1} of {depth}"] = duration(lambda watch=watch: watch(x)) / whole
    return shares


@torch.no_grad()
def duration(called: Callable[[], Any]) -> float:
    """Median seconds of a call, after one to warm up."""
    called()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        called()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(out: Path, smoke: bool) -> None:
    """Measure and write."""
    settings = SMOKE if smoke else Settings()
    exact = [planted(seed, settings.config) for seed in range(settings.seeds)]
    records = []
    for seed in range(settings.seeds):
        records.append(audited(seed, settings))
        print(f"monitor: seed {seed}", flush=True)
    cost = costs(2, 16, 8, 4) if smoke else costs()
    found = {"planted": exact, "trained": records, "cost": cost, "provenance": provenance()}
    write_json(out / "monitor.json", found)
    write(out / "monitor.md", page(exact, records, cost))


def page(exact: list[dict[str, float]], records: list[dict[str, float]], cost: dict[str, float]) -> str:
    """The tables."""
    parts = [
        "# Monitors of backdoors\n",
        f"## In closed form\n\n{FEATURES} features in a random basis, and a neuron that acts on two of them together. "
        "The components without which it does nothing are found on 4,000 inputs; `monitor` then says on 4,000 others, "
        f"by the gates, whether they are in use. Median (range) over {len(exact)} models.\n",
        _rows(exact),
        f"\n## Trained in\n\nDigits classifiers trained to answer {CLASS} where a 2 x 2 corner is white, half a corner "
        "being no trigger. The components without which the backdoor fails are found on training images; `monitor` "
        "then says on held-out images whether all of them are in use: by their gates, or beyond a strength that is "
        "best on training images. Truth: the trigger is there; as many near misses and clean images. The edit takes "
        f"the same components out. Median (range) over {len(records)} classifiers.\n",
        _rows(records),
        "\n## Cost\n\nTime of watching one component, as a share of the forward pass of a transformer "
        f"({cost['forward pass, ms']:.1f} ms):\n",
        table(["watched", "share"], [[name, f"{x:.2f}"] for name, x in cost.items() if name.startswith("layer")]),
    ]
    return "\n".join(parts) + "\n"


def _rows(records: list[dict[str, float]]) -> str:
    return table(["figure", "held out"], [[x, spread([one[x] for one in records]).text(".3f")] for x in records[0]])
