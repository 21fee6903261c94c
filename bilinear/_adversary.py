"""Adversarial directions: inputs that a layer's eigenvectors say will push one output."""

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear._checks import check_count
from bilinear._eigen import Eigen


@torch.no_grad()
def adversarial_directions(
    found: Eigen, output: int, *, k: int = 10, n: int = 3, specific: bool = False
) -> Float[Tensor, "n d_in"]:
    """Input directions of length 1 that raise one output: the mean of them is a mask to add to inputs.

    Args:
        found: Eigenpairs of all outputs of interest (several directions), in the input metric.
        output: Whose logit to raise.
        k: Positive eigenvectors per output that are kept apart.
        n: Directions to return, largest eigenvalue first.
        specific: Take the rows of the pseudo-inverse of all outputs' eigenvectors, which avoid those of the other
            outputs: far weaker than the eigenvectors themselves, and on the classifiers of `benchmarks.bilinear`
            without effect.

    Returns:
        Directions, each with the sign that makes its mean entry positive (an eigenvector's own sign means nothing).

    Raises:
        ValueError: For pairs of one direction, an unknown output, or fewer than n positive eigenvalues.

    Source:
        Pearce et al. (arXiv 2410.08417), section 4.4.
    """
    if found.values.ndim != 2:
        raise ValueError("adversarial directions set one output against others; pass the pairs of several directions")
    if not 0 <= output < len(found.values):
        raise ValueError(f"output {output}: the pairs are of outputs 0 to {len(found.values) - 1}")
    check_count("n", n, k, "k")
    stacked, owners = [], []
    for index, (values, vectors) in enumerate(zip(found.values, found.vectors, strict=True)):
        order = values.argsort(descending=True)[:k]
        order = order[values[order] > 0]
        stacked.append(vectors[:, order].T)
        owners += [index] * len(order)
    own = [i for i, owner in enumerate(owners) if owner == output][:n]
    if len(own) < n:
        raise ValueError(f"output {output} has {len(own)} positive eigenvalues among its pairs, {n} were asked for")
    rows = torch.cat(stacked)
    chosen = torch.linalg.pinv(rows).T[own] if specific else rows[own]
    chosen = chosen[:, 1:] if found.layer.affine else chosen
    chosen = chosen * torch.where(chosen.sum(1, keepdim=True) < 0, -1, 1)
    return chosen / chosen.norm(dim=1, keepdim=True).clamp_min(torch.finfo(chosen.dtype).tiny)
