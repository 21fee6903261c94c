"""The embedded checkpoint: a small classifier of real handwritten digits, with its data.

`benchmarks/train_digits.py` trained it. The images are the 1,797 that scikit-learn bundles, 8 by 8 pixels,
in a fixed random split; the writers of the test images also wrote training images.
"""

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weightdecomp._weights import read_weights

WEIGHTS = Path(__file__).with_name("digits.safetensors")
Split = Literal["train", "test"]

_N_TRAIN = 1440
_BATCH = 144


class DigitClassifier(nn.Module):
    """Pixels to the logits of the ten digits: linear layers 64-32-32-10 with ReLU between them."""

    def __init__(self, d_hidden: int = 32, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        widths = [64, d_hidden, d_hidden, 10]
        layers = [nn.Linear(d_in, d_out, dtype=dtype) for d_in, d_out in zip(widths, widths[1:], strict=False)]
        self.layers = nn.ModuleList(layers)

    def forward(self, pixels: Float[Tensor, "*batch 64"]) -> Float[Tensor, "*batch 10"]:
        """Logits of the digits 0 to 9."""
        hidden = pixels
        for layer in self.layers[:-1]:
            hidden = layer(hidden).relu()
        return self.layers[-1](hidden)


def model() -> DigitClassifier:
    """The trained classifier, in eval mode."""
    # Weights made here would be drawn from the caller's random state, only to be replaced.
    with torch.device("meta"):
        classifier = DigitClassifier()
    classifier.load_state_dict(read_weights(WEIGHTS), assign=True)
    return classifier.eval()


def batches(split: Split = "train") -> list[Float[Tensor, "batch 64"]]:
    """The images of a split in batches of 144, the last one shorter on the test split.

    Args:
        split: "train" has 1,440 images, "test" the other 357.

    Returns:
        Pixels in [0, 1], float32, rows of the image one after the other.

    Raises:
        ModuleNotFoundError: If scikit-learn, which brings the images, is not installed.
        ValueError: If there is no such split.
    """
    pixels, _ = _digits()
    return list(pixels[_members(split)].split(_BATCH))


def labels(split: Split = "train") -> Int[Tensor, " image"]:
    """The digits drawn on a split's images, in the order of `batches`; errors as there."""
    _, classes = _digits()
    return classes[_members(split)]


@cache
def _digits() -> tuple[Float[Tensor, "image 64"], Int[Tensor, " image"]]:
    """All images and their digits, in scikit-learn's order."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed: pip install 'weightdecomp[demo]'"
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    # Sixteenths are exact in float32.
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes, dtype=torch.int64)


def _members(split: Split) -> Int[Tensor, " image"]:
    if split not in ("train", "test"):
        raise ValueError(f"there is no split {split!r}; choose 'train' or 'test'")
    _, classes = _digits()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    return order[:_N_TRAIN] if split == "train" else order[_N_TRAIN:]
