"""Image data sets from idx files, and the bilinear classifiers that are trained on them."""

import gzip
import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bilinear import BilinearMLP, Layer

DATA_VARIABLE = "WEIGHTDECOMP_DATA"
"""Environment variable that names the folder of data sets."""
_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")}
_FILES["test"] = tuple(name.replace("train", "t10k") for name in _FILES["train"])  # type: ignore[assignment]
_GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_DIGITS = tuple(str(i) for i in range(10))
_BYTES = 0x08  # the idx code of unsigned bytes


class Images(NamedTuple):
    """A data set of grey images and their classes.

    Attributes:
        name: Of the data set.
        side: Pixels per side; images are rows of side * side numbers in [0, 1].
        train: Images to train on.
        train_labels: Their classes, 0 to 9.
        test: Images to test on.
        test_labels: Their classes.
        classes: What the classes show.
    """

    name: str
    side: int
    train: Float[Tensor, "image pixel"]
    train_labels: Int[Tensor, " image"]
    test: Float[Tensor, "image pixel"]
    test_labels: Int[Tensor, " image"]
    classes: tuple[str, ...] = _DIGITS


def data_folder(given: str | Path | None = None) -> Path | None:
    """The folder of data sets: as given, or as the environment says, or None."""
    found = given or os.environ.get(DATA_VARIABLE)
    if not found:
        return None
    if not Path(found).is_dir():
        raise ValueError(f"there is no data folder {str(found)!r}; pass --data or set {DATA_VARIABLE}")
    return Path(found)


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes from an idx file, gzipped or not.

    Raises:
        ValueError: For a missing, truncated or other file.
    """
    zipped = path.with_name(path.name + ".gz")
    found = path if path.exists() else zipped
    if not found.exists():
        raise ValueError(f"there is neither {path} nor {zipped.name}")
    try:
        data = gzip.decompress(found.read_bytes()) if found == zipped else found.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{found} is no whole gzip file: {error}") from error
    if len(data) < 4 or data[:3] != bytes([0, 0, _BYTES]):
        raise ValueError(f"{found} is no idx file of unsigned bytes")
    shape = struct.unpack_from(f">{data[3]}I", data, 4) if len(data) >= 4 + 4 * data[3] else (-1,)
    start = 4 + 4 * data[3]
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{found} holds {len(data) - start} bytes, its header says {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def images(name: str, folder: Path | None) -> Images:
    """A data set: "mnist" or "fashion_mnist" from their folder, or "digits" (8 by 8, from scikit-learn)."""
    if name == "digits":
        return _digits()
    if folder is None:
        raise ValueError(f"{name} needs a data folder: pass --data or set {DATA_VARIABLE}")
    arrays = []
    for split in ("train", "test"):
        pixels, labels = (read_idx(folder / name / one) for one in _FILES[split])
        if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
            raise ValueError(f"{folder / name}: {pixels.shape} images and {labels.shape} labels do not belong together")
        arrays += [torch.tensor(pixels).flatten(1).float() / 255, torch.tensor(labels).long()]
    classes = _GARMENTS if name == "fashion_mnist" else _DIGITS
    return Images(name, round(arrays[0].shape[1] ** 0.5), *arrays, classes)


def _digits() -> Images:
    from weightdecomp import digits

    both = [(torch.cat(digits.batches(split)), digits.labels(split)) for split in ("train", "test")]
    return Images("digits", 8, *both[0], *both[1])


class Classifier(nn.Module):
    """embed, then a bilinear layer, then a head: no biases, as published."""

    def __init__(self, n_pixels: int, d: int, n_classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(n_pixels, d, bias=False)
        self.mlp = BilinearMLP(d, d)
        self.head = nn.Linear(d, n_classes, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.mlp(self.embed(pixels)))

    def layer(self) -> Layer:
        """The whole classifier as one bilinear layer from pixels to logits, in float64."""
        mlp = Layer(*(one.weight.detach().double() for one in (self.mlp.w, self.mlp.v, self.mlp.d)))
        return mlp.with_embedding(self.embed.weight.detach().double()).with_head(self.head.weight.detach().double())


class Training(NamedTuple):
    """How a classifier is trained.

    Attributes:
        noise: Standard deviation of Gaussian pixel noise, added to every image.
        decay: AdamW's weight decay.
        seed: Of weights, order and noise.
        d: Width of the embedding and of the bilinear layer.
        epochs: Passes over the data.
        rate: AdamW's largest step size; it falls to 0 as a cosine.
        batch: Images a step.
    """

    noise: float = 0.4
    decay: float = 1.0
    seed: int = 0
    d: int = 256
    epochs: int = 20
    rate: float = 1e-3
    batch: int = 2048


def trained(data: Images, how: Training) -> Classifier:
    """A classifier trained as told; the same settings give the same weights on the same machine.

    Source:
        Pearce et al. (arXiv 2410.08417), table 1: input noise, weight decay, AdamW, batch 2048, cosine.
    """
    rng = torch.Generator().manual_seed(how.seed)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(how.seed)
        model = Classifier(data.train.shape[1], how.d)
    optimiser = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=how.decay)
    batch = min(how.batch, len(data.train))
    steps = how.epochs * (len(data.train) // batch)
    for step in range(steps):
        if step % (len(data.train) // batch) == 0:
            order = torch.randperm(len(data.train), generator=rng)
        start = step % (len(data.train) // batch) * batch
        index = order[start : start + batch]  # type: ignore[possibly-undefined]
        x = data.train[index]
        x = x + how.noise * torch.randn(x.shape, generator=rng) if how.noise else x
        for group in optimiser.param_groups:
            group["lr"] = how.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        F.cross_entropy(model(x), data.train_labels[index]).backward()
        optimiser.step()
    return model.eval()


def accuracy(logits: Tensor, labels: Int[Tensor, " image"]) -> float:
    """Share of right arg-maxes."""
    return float((logits.argmax(-1) == labels).double().mean())
