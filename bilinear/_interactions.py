"""Interactions: how pairs of given input directions act together on given output directions, exactly."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilinear._checks import check_count, check_tensor
from bilinear._layer import Layer
from bilinear._metric import check_layer


class Strongest(NamedTuple):
    """The largest interactions, largest |value| first.

    Attributes:
        values: Interactions; those of two different directions count both orders.
        outputs: Number of the output direction of each.
        pairs: Numbers of the two input directions, the smaller first.
    """

    values: Float[Tensor, " n"]
    outputs: Int[Tensor, " n"]
    pairs: Int[Tensor, "n two"]


def interactions(
    layer: Layer, reads: Tensor, writes: Tensor | None = None, bias: Tensor | None = None
) -> Float[Tensor, "*output feature feature"]:
    r"""Interaction matrices between input directions along output directions.

    Where the layer's input is x = reads @ z + bias, its output along a row g of writes is exactly
    :math:`\tilde z^\top t_g \tilde z`, with :math:`t_{g,ij} = f_i^\top B_g f_j`.

    Args:
        layer: The layer.
        reads: (d_in, feature) directions as columns: decoder columns of a sparse autoencoder, embeddings. Behind a
            norm they are directions of x-hat, and a bias has no place.
        writes: (output, d_out) directions as rows, or one (d_out,): encoder rows, unembeddings; None is all outputs.
        bias: (d_in,), the decoder's bias.

    Returns:
        One symmetric matrix an output direction. Where the layer is affine or there is a bias, row and column 0 belong
        to the constant 1.

    Raises:
        ValueError: For directions of a wrong width.

    Source:
        Pearce et al. (arXiv 2410.08417), section 4.2; constants and biases ours.
    """
    check_layer(layer)
    check_tensor("reads", reads, (layer.d_in, None), layer.w)
    head = layer.directions(writes)
    if layer.norm is not None:
        if bias is not None:
            raise ValueError("behind a norm the reads are directions on the sphere, where a bias has no place")
        lift = torch.block_diag(torch.ones(1, 1).to(reads), reads) if layer.affine else reads
        found = lift.T @ layer.form(head) @ lift
    else:
        if bias is not None and layer.d_bias is None:
            # Whatever constant the bias makes, the forms then have a place for it.
            layer = layer.with_head(layer.directions(None), torch.zeros_like(layer.d[:, 0]))
        found = layer.with_embedding(reads, bias).form(head)
    return found[0] if writes is not None and writes.ndim == 1 else found


def strongest(matrices: Float[Tensor, "output feature feature"], n: int) -> Strongest:
    """The n largest interactions of interaction matrices, each unordered pair once."""
    size = matrices.shape[-1]
    check_count("n", n, matrices.shape[0] * size * (size + 1) // 2, "pairs")
    rows, columns = torch.triu_indices(size, size, device=matrices.device)
    values = matrices[:, rows, columns] * torch.where(rows == columns, 1, 2)
    order = values.abs().reshape(-1).argsort(descending=True)[:n]
    which = order % len(rows)
    return Strongest(
        values.reshape(-1)[order], order // len(rows), torch.stack([rows[which], columns[which]], 1)
    )  # fmt: skip
