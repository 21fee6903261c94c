"""Divergence: how far a masked output is from the target's, one number per input or position."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Divergence(NamedTuple):
    """A named divergence and why it was chosen.

    Attributes:
        name: "mse", "kl" or the name of the user's callable.
        reason: Why this one, for the printed summary.
        function: `function(output, target_output) -> Tensor` of non-negative numbers, one per input or position.
    """

    name: str
    reason: str
    function: Callable[[Any, Any], Tensor]

    def __call__(self, output: Any, target: Any) -> Float[Tensor, "*batch"]:
        """Divergence of an output from the target's output, in nats (kl) or squared output units (mse).

        Raises:
            ValueError: If the user's callable returns something else than one number per input.
        """
        found = self.function(output, target)
        if isinstance(found, Tensor) and found.ndim:
            return found
        came = "a single number" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"divergence {self.name!r} must return a tensor with one number per input, got {came}; "
            "average over the output's dimensions, not over the inputs"
        )


def mse(output: Float[Tensor, "*batch d_output"], target: Float[Tensor, "*batch d_output"]) -> Float[Tensor, "*batch"]:
    """Mean squared error over the last dimension."""
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    return (output.to(dtype) - target.to(dtype)).square().mean(-1)


def kl(output: Float[Tensor, "*batch token"], target: Float[Tensor, "*batch token"]) -> Float[Tensor, "*batch"]:
    """KL(target || output) of the distributions whose logits are in the last dimension, in nats."""
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    log_q = F.log_softmax(output.to(dtype), -1)
    log_p = F.log_softmax(target.to(dtype), -1)
    # Rounding can leave a tiny negative sum where the two are equal.
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)


def output_tensor(output: Any) -> Tensor:
    """The tensor to compare in what a model returns: itself, `.logits`, or the first of a tuple.

    One number per input becomes a last dimension of size 1.

    Raises:
        TypeError: For outputs that hold no such tensor, or one without an axis of inputs.
    """
    found = _held(output)
    if found is None:
        raise TypeError(
            f"the model returned {type(output).__name__}, from which no output tensor can be taken; "
            "wrap the model to return a tensor, an object with .logits, or a tuple that begins with a tensor"
        )
    if found.ndim == 0:
        raise TypeError(
            "the model returned a single number for the whole batch (a loss?), expected an output per input; "
            "wrap the model to return its output before the average"
        )
    return found if found.ndim > 1 else found[:, None]


def _held(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def _looks_like_classes(output: Any, tensor: Tensor, of_ids: bool) -> str | None:
    if not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor):
        return "the model returns .logits"
    if of_ids and tensor.ndim >= 2 and tensor.shape[-1] > 1:
        return "the inputs are token ids and the output has one number per class"
    return None


def choose(divergence: str | Callable[[Any, Any], Tensor], output: Any, of_ids: bool) -> Divergence:
    """The divergence named by the user, or the one that "auto" picks, with the reason.

    "auto" takes KL over the last dimension where the model returns `.logits` or maps token ids to scores (`of_ids`),
    and mean squared error otherwise, since real-valued outputs carry no sign of being logits.

    Raises:
        ValueError: For a name other than "auto", "mse" and "kl".
        TypeError: For an output without a tensor.
    """
    if callable(divergence):
        name = getattr(divergence, "__name__", "callable")
        return Divergence(name, "set in the call", divergence)
    if divergence not in ("auto", "mse", "kl"):
        raise ValueError(f"divergence must be 'auto', 'mse', 'kl' or a callable, got {divergence!r}")
    if divergence != "auto":
        return named(divergence, "set in the call")
    evidence = _looks_like_classes(output, output_tensor(output), of_ids)
    if evidence:
        return named("kl", evidence)
    return named("mse", "the output is real-valued and nothing marks it as logits; pass divergence='kl' if it is")


def named(name: str, reason: str, function: Callable[[Any, Any], Tensor] | None = None) -> Divergence:
    """A divergence by its saved name.

    Raises:
        ValueError: For a user's own divergence whose callable is not given.
    """
    if function is not None:
        return Divergence(name, reason, function)
    if name not in ("mse", "kl"):
        raise ValueError(f"the run used the divergence {name!r} of its own; pass it as divergence=")
    metric = kl if name == "kl" else mse
    return Divergence(name, reason, lambda output, target: metric(output_tensor(output), output_tensor(target)))
