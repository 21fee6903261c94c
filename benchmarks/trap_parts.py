"""What trap tasks are made of: a target with its exact answer, deletions from its weights, codes that share places."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

Effects = Float[Tensor, "mechanism input d_output"]


@dataclass(frozen=True, eq=False)
class Trap:
    """One built task.

    Attributes:
        model: The target.
        sites: Module paths that methods are asked about.
        sample: Draws inputs, with the exact answer: what deleting each mechanism takes from the output.
        parts: The mechanisms' shares of the weights, by site; empty where they are features of the data.
        most: Units that may make up one mechanism; None: any number.
        exclusive: Whether units beyond the mechanisms count against a method.
    """

    model: nn.Module
    sites: Sequence[str]
    sample: Callable[[int, torch.Generator], tuple[Tensor, Effects]]
    parts: Sequence[dict[str, Tensor]] = ()
    most: int | None = None
    exclusive: bool = False


def deletions(
    model: nn.Module, parts: Sequence[dict[str, Tensor]], inputs: Callable[[int, torch.Generator], Tensor]
) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Inputs, and the effects of taking each mechanism's share out of the weights: `f(x) - f(x; W - share)`."""

    def sample(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        x = inputs(count, draw)
        with torch.no_grad():
            whole = model(x)
            found = []
            for part in parts:
                changed = {f"{path}.weight": model.get_parameter(f"{path}.weight") - w for path, w in part.items()}
                found.append(whole - torch.func.functional_call(model, changed, x))
        return x, torch.stack(found)

    return sample


def weight_trap(
    model: nn.Module,
    parts: Sequence[dict[str, Tensor]],
    inputs: Callable[[int, torch.Generator], Tensor],
    *,
    most: int | None = None,
    exclusive: bool = False,
) -> Trap:
    """A trap whose answer is shares of the weights, asked about at the sites that have shares."""
    sites = list(dict.fromkeys(path for part in parts for path in part))
    return Trap(model, sites, deletions(model, parts, inputs), parts, most, exclusive)


def generator(seed: int) -> torch.Generator:
    """Of a task's own draws, apart from those of its inputs."""
    return torch.Generator().manual_seed(7_919 * (seed + 1))


def unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Rows of norm one."""
    return rows / rows.norm(dim=-1, keepdim=True)


def rotation(d: int, rng: torch.Generator) -> Float[Tensor, "d d"]:
    """A random orthogonal matrix, so that coordinates give no hint."""
    return torch.linalg.qr(torch.randn(d, d, generator=rng)).Q


def mlp(*layers: nn.Linear) -> nn.Sequential:
    """Linear layers with a ReLU between each two; the linear ones have even numbers."""
    modules = [module for layer in layers for module in (layer, nn.ReLU())]
    return nn.Sequential(*modules[:-1]).eval()


def rows_of(matrix: Float[Tensor, "row d"], owner: Tensor, n: int) -> list[Float[Tensor, "row d"]]:
    """The matrix once for each owner, with the rows of all others at zero."""
    return [matrix * (owner == i)[:, None] for i in range(n)]


def joined_linearly(values: Float[Tensor, " knot"], knots: Float[Tensor, " knot"]) -> tuple[Tensor, Tensor]:
    """Biases and output weights of the ReLUs of one variable that join values linearly, from zero at the first knot."""
    slopes = values.diff() / knots.diff()
    return -knots[:-1], torch.cat([slopes[:1], slopes.diff()])


def cyclic_code(places: int, base: Sequence[int]) -> Float[Tensor, "code place"]:
    """All shifts of a base block as indicators: every place in as many codes as the block is long.

    Two codes share at most one place where the differences inside the block are all distinct modulo `places`.
    """
    shifted = (torch.arange(places)[:, None] + torch.tensor(base)) % places
    return torch.zeros(places, places).scatter(1, shifted, 1.0)
