"""Train the checkpoint that ships with the package: `python -m benchmarks.train_digits`, seconds on a CPU.

`--check` trains again and compares with the shipped file instead of writing it.
"""

import argparse
import sys

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weightdecomp._weights import read_weights
from weightdecomp.digits import WEIGHTS, DigitClassifier, batches, labels

SEED = 0
_EPOCHS = 80
_BATCH = 144
_LEARNING_RATE = 0.01
_WEIGHT_DECAY = 0.01
_NOISE = 0.2  # standard deviation of the noise on pixels, in their range [0, 1], drawn anew at every step


def trained(seed: int = SEED) -> DigitClassifier:
    """A classifier trained on the train split, the same at every call with the same seed.

    Trained in float64 and rounded to float32 at the end, so that the order in which a machine sums hardly
    shows.
    """
    rng = torch.Generator().manual_seed(seed)
    pixels, digits = torch.cat(batches("train")).double(), labels("train")
    classifier = initialised(rng)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _EPOCHS * len(pixels) // _BATCH)
    for _ in range(_EPOCHS):
        for members in torch.randperm(len(pixels), generator=rng).split(_BATCH):
            clean = pixels[members]
            noisy = clean + _NOISE * torch.randn(clean.shape, generator=rng, dtype=clean.dtype)
            optimiser.zero_grad()
            nn.functional.cross_entropy(classifier(noisy), digits[members]).backward()
            optimiser.step()
            schedule.step()
    return classifier.float().eval()


def accuracy(classifier: nn.Module, inputs: list[Float[Tensor, "_ 64"]], digits: Int[Tensor, " image"]) -> float:
    """The share of images whose largest logit is that of their digit."""
    with torch.no_grad():
        answers = torch.cat([classifier(pixels) for pixels in inputs]).argmax(-1)
    return (answers == digits).double().mean().item()


def initialised(rng: torch.Generator) -> DigitClassifier:
    """A float64 classifier with He-uniform weights and zero biases, all from one generator."""
    with torch.device("meta"):
        classifier = DigitClassifier(dtype=torch.float64)
    classifier.to_empty(device="cpu")
    for layer in classifier.layers:
        assert isinstance(layer, nn.Linear)
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=rng)
        nn.init.zeros_(layer.bias)
    return classifier


def _largest_difference(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max((weights[name] - others[name]).abs().max().item() for name in others)


def main() -> int:
    """Train, then write the checkpoint or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the shipped weights, write nothing")
    arguments = parser.parse_args()

    classifier = trained()
    scores = {split: accuracy(classifier, batches(split), labels(split)) for split in ("train", "test")}
    print(f"accuracy: train {scores['train']:.4f}, test {scores['test']:.4f}")
    if arguments.check:
        difference = _largest_difference(classifier.state_dict(), read_weights(WEIGHTS))
        print(f"largest difference from {WEIGHTS.name}: {difference:.1e}")
        return int(difference > 1e-5)
    metadata = {
        "train_accuracy": f"{scores['train']:.4f}",
        "test_accuracy": f"{scores['test']:.4f}",
        "seed": str(SEED),
        "command": "python -m benchmarks.train_digits",
    }
    safetensors.torch.save_file(classifier.state_dict(), WEIGHTS, metadata=metadata)
    print(f"wrote {WEIGHTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
