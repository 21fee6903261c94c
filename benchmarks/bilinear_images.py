"""Bilinear image classifiers: accuracy and certificates against the components kept, by metric and regularisation."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.bilinear_tables import image_tables
from benchmarks.images import Classifier, Images, Training, accuracy, images, trained
from benchmarks.report import provenance, spread, write, write_json
from bilinear import (
    Layer,
    Metric,
    Truncation,
    adversarial_directions,
    centred,
    cosine,
    data_metric,
    diagnosis,
    eigen,
    plot_spectra,
    plot_vectors,
    shared_squares,
    softmax_variance,
    truncate,
    without_common,
)

KEPT = (1, 2, 3, 5, 8, 10, 12, 15, 20, 30)
SETTINGS = {"none": (0.0, 0.0), "decay": (0.0, 1.0), "noise": (0.4, 0.0), "noise and decay": (0.4, 1.0)}
SEEDS = (0, 1)
_REPEATED = ("none", "noise and decay")  # settings that are trained with every seed
_CERTIFIED = (15, 30)
_STRENGTHS = (0.1, 0.2, 0.3)  # standard deviation of a mask's pixels
_METRIC_IMAGES = 20_000  # training images that the second moment is taken from
_FLOOR = 0.5  # of the metrics for certificates, chosen on held-out training images
_DECIDED = (8, 10, 15, 30)  # kept for decisions
_BARS = {"accuracy lost at 10": 0.001, "certified at 30": 0.95, "64 shared squares": 0.002}


def run(folder: Path | None, out: Path, smoke: bool) -> str:
    """Train and measure every setting; returns the tables."""
    names = ["digits"] if folder is None or smoke else ["mnist", "fashion_mnist"]
    result: dict[str, Any] = {"bars": _BARS, "kept": KEPT, "seeds": SEEDS}
    texts = []
    for name in names:
        where = provenance()
        result[name] = _data_set(images(name, folder), out, smoke) | {"provenance": where}
        texts.append(image_tables(name, result[name], KEPT))
        # After every data set, since a long run may be cut short.
        write_json(out / "images.json", result)
        write(out / "images.md", "\n\n".join(texts))
    return "\n\n".join(texts)


def _data_set(data: Images, out: Path, smoke: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setting, (noise, decay) in SETTINGS.items():
        layers, records = [], []
        for seed in SEEDS if setting in _REPEATED or smoke else SEEDS[:1]:
            how = Training(noise, decay, seed, d=32, epochs=4, batch=256) if smoke else Training(noise, decay, seed)
            how = how if data.side > 8 or smoke else how._replace(epochs=60, batch=256, d=64)
            start = time.process_time()
            model = trained(data, how)
            seconds = time.process_time() - start
            layers.append(model.layer())
            records.append({"seed": seed, "training_cpu_seconds": seconds} | _measured(data, model, smoke, seed == 0))
        if setting in _REPEATED:
            records[0]["masks"] = _masks(data, layers[0])
        found[setting] = {"runs": records} | ({"seed_agreement": _agreement(layers)} if len(layers) > 1 else {})
        if setting == "noise and decay":
            _figures(data, layers[0], records[0], out)
    found["untrained_seed_agreement"] = _agreement([_untrained(data, seed) for seed in (0, 1)])
    return found


def _untrained(data: Images, seed: int) -> Layer:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return Classifier(data.train.shape[1], 256 if data.side > 8 else 32).layer()


def _metrics(data: Images, layer: Layer) -> dict[str, Metric | None]:
    x = data.train[:_METRIC_IMAGES].double()
    return {"input": None, "data": data_metric(layer, x), "data, floored": data_metric(layer, x, floor=_FLOOR)}


def _measured(data: Images, model: Classifier, smoke: bool, thorough: bool) -> dict[str, Any]:
    layer, x = model.layer(), data.test.double()
    full = accuracy(layer(x), data.test_labels)
    record: dict[str, Any] = {"accuracy": full, "accuracy_by_kept": {"embedding": _embedding_curve(data, model)}}
    kept = [k for k in KEPT if k <= layer.d_in]
    record["certified"], record["effective_rank"] = {}, {}
    for name, metric in _metrics(data, layer).items():
        pairs = eigen(layer, centred(layer), metric=metric)
        record["effective_rank"][name] = float(pairs.effective_rank().mean())
        record["accuracy_by_kept"][name] = [accuracy(pairs.top(k).squares()(x), data.test_labels) for k in kept]
        cuts = {k: truncate(layer, k, centred(layer), metric=metric) for k in _CERTIFIED}
        record["certified"][name] = {str(k): cut.certified(x).share for k, cut in cuts.items()}
    decided = _decisions(data, layer)
    record["accuracy_by_kept"]["data, decisions"] = [
        accuracy(decided[k](x), data.test_labels) if k in decided else None for k in kept
    ]
    record["certified"]["data, decisions"] = {str(k): decided[k].certified(x).share for k in _CERTIFIED}
    changed = decided[10](x).argmax(1) != layer(x).argmax(1)
    record["changed_at_10"] = float(changed.double().mean())
    found = diagnosis(layer, k=5, inputs=data.train.double())
    record["pixel_count"] = float(found.pixel_count.mean())
    record["outlier_share"] = float(found.outlier_share.mean())
    if thorough:
        record["shared"] = _shared(data, layer, full, smoke)
    return record


def _decisions(data: Images, layer: Layer) -> dict[int, Truncation]:
    """Components for the arg-max: free of what all classes share, largest where the classifier is undecided."""
    metric = data_metric(layer, data.train[:_METRIC_IMAGES].double(), floor=_FLOOR, weight=softmax_variance)
    free = {k: without_common(layer, k, metric=metric) for k in _DECIDED if k <= layer.d_in}
    return {k: truncate(one, k, metric=metric) for k, one in free.items()}


def _embedding_curve(data: Images, model: Classifier) -> list[float]:
    """Accuracy by components taken in the embedding's basis, as published."""
    mlp = Layer(*(one.weight.detach().double() for one in (model.mlp.w, model.mlp.v, model.mlp.d)))
    layer = mlp.with_head(model.head.weight.detach().double())
    x = data.test.double() @ model.embed.weight.detach().double().T
    pairs = eigen(layer, centred(layer))
    return [accuracy(pairs.top(k).squares()(x), data.test_labels) for k in KEPT if k <= layer.d_in]


def _shared(data: Images, layer: Layer, full: float, smoke: bool) -> dict[str, Any]:
    """Squares that all classes share, by metric; two starts, so that their agreement can be told."""
    record = {}
    head = layer.with_head(centred(layer))
    for name, metric in list(_metrics(data, head).items())[:2]:
        for n in (8,) if smoke else (32, 64):
            start = time.process_time()
            found = shared_squares(head, n, metric=metric, starts=2, steps=20 if smoke else 300)
            record[f"{name} {n}"] = {
                "accuracy_lost": full - accuracy(found.squares(data.test.double()), data.test_labels),
                "relative_error": found.error,
                "agreement": found.agreement if found.as_good > 1 else None,
                "cancellation": found.cancellation,
                "cpu_seconds": time.process_time() - start,
            }
    return record


def _masks(data: Images, layer: Layer) -> list[dict[str, Any]]:
    """What adding a mask made of eigenvectors does, against the same mask with its pixels permuted."""
    pairs, x, rng = eigen(layer), data.test.double(), torch.Generator().manual_seed(0)
    found = []
    for specific in (True, False):
        for strength in _STRENGTHS:
            rows: dict[str, list[float]] = {name: [] for name in ("mask", "random", "hit", "random_hit")}
            for digit in range(10):
                mask = adversarial_directions(pairs, digit, k=10, n=3, specific=specific).mean(0)
                mask = mask * strength / mask.std()
                permuted = mask[torch.randperm(len(mask), generator=rng)]
                for name, hit, one in (("mask", "hit", mask), ("random", "random_hit", permuted)):
                    answers = layer(x + one).argmax(1)
                    rows[name].append(float((answers == data.test_labels).double().mean()))
                    others = data.test_labels != digit
                    rows[hit].append(float((answers[others] == digit).double().mean()))
            means = {name: sum(values) / len(values) for name, values in rows.items()}
            found.append({"vectors": "pseudo-inverse" if specific else "eigenvectors", "strength": strength} | means)
    return found


def _agreement(layers: Sequence[Layer], k: int = 5) -> dict[str, Any]:
    """|cosine| of the k largest positive eigenvectors of every class between seeds, in order; and of the tensors."""
    tops = [_positive(layer, k) for layer in layers]
    pairs = [(a, b) for i, a in enumerate(tops) for b in tops[i + 1 :]]
    cosines = torch.stack([(a * b).sum(1).abs().mean(0) for a, b in pairs])
    tensors = [cosine(a, b) for i, a in enumerate(layers) for b in layers[i + 1 :]]
    return {"top_positive": cosines.mean(0).tolist(), "tensor_cosine": spread(tensors)._asdict(), "pairs": len(pairs)}


def _positive(layer: Layer, k: int) -> Float[Tensor, "direction coordinate k"]:
    pairs = eigen(layer)
    order = pairs.values.argsort(1, descending=True)[:, :k]
    return pairs.vectors.gather(2, order[:, None].expand(-1, layer.d_in, -1))


def _figures(data: Images, layer: Layer, record: dict[str, Any], out: Path) -> None:
    """Vector images, spectra and accuracy by components kept."""
    out.mkdir(parents=True, exist_ok=True)
    pairs = eigen(layer, centred(layer))
    image = plot_vectors(pairs, (data.side, data.side), k=3, labels=data.classes)
    image.savefig(out / f"{data.name}_vectors.png", dpi=80)
    plot_spectra(pairs.top(min(40, pairs.k)), labels=data.classes).savefig(out / f"{data.name}_spectra.svg")
    curves(data.name, record).savefig(out / f"{data.name}_accuracy.png", dpi=110)


def curves(name: str, record: dict[str, Any]) -> Any:
    """A matplotlib figure of the accuracy that a record's run lost, by components kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for metric, values in record["accuracy_by_kept"].items():
        points = [(k, 100 * (record["accuracy"] - a)) for k, a in zip(KEPT, values, strict=False) if a is not None]
        axis.plot(*zip(*points, strict=True), marker=".", label=metric)
    axis.axhline(100 * _BARS["accuracy lost at 10"], color="grey", linewidth=0.8, linestyle="--", label="0.1 points")
    axis.set_xscale("log")
    axis.set_xticks(KEPT, [str(k) for k in KEPT])
    axis.minorticks_off()
    # Linear near 0, where losses are both rare and of either sign.
    axis.set_yscale("symlog", linthresh=0.2)
    axis.set_yticks([-0.1, 0, 0.1, 1, 10, 50], ["-0.1", "0", "0.1", "1", "10", "50"])
    axis.set_ylim(-0.15, 90)
    axis.set(xlabel="components kept per class", ylabel="points of test accuracy lost", title=name)
    axis.legend(title="metric", fontsize="small")
    return figure
