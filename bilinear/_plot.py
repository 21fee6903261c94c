"""Plots of spectra and vectors; matplotlib is an optional extra, imported when a plot is drawn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilinear._eigen import Eigen


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'weightdecomp[demo]'") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_spectra(found: Eigen, labels: Sequence[str] | None = None) -> Any:
    """The eigenvalues of every direction, positive and negative ones by rank.

    Args:
        found: Eigenpairs.
        labels: A name for every direction.

    Returns:
        A matplotlib `Figure`; write it with `savefig("spectra.svg")`.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    figure, axes = _figure(1, 1, (6.0, 3.5))
    for index, values in enumerate(found.values.reshape(-1, found.k).cpu()):
        label = labels[index] if labels else str(index)
        (line,) = axes[0, 0].plot(values[values > 0].sort(descending=True)[0].numpy(), marker=".", label=label)
        axes[0, 0].plot(values[values < 0].sort()[0].numpy(), marker=".", color=line.get_color())
    axes[0, 0].axhline(0, color="grey", linewidth=0.5)
    axes[0, 0].set(xlabel="rank among its sign", ylabel="eigenvalue", title=f"spectra, metric {found.metric.name}")
    axes[0, 0].legend(fontsize="small", ncols=2, title="direction")
    return figure


def plot_vectors(found: Eigen, shape: tuple[int, int], k: int = 3, labels: Sequence[str] | None = None) -> Any:
    """The leading vectors of every direction as images: the k most positive, then the k most negative.

    Args:
        found: Eigenpairs in pixel space.
        shape: Rows and columns of an image.
        k: Images of each sign.
        labels: A name for every direction.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ValueError: If the vectors do not have that many pixels.
        ModuleNotFoundError: Without matplotlib.
    """
    vectors = found.vectors.reshape(-1, *found.vectors.shape[-2:])[:, int(found.layer.affine) :]
    if vectors.shape[1] != shape[0] * shape[1]:
        raise ValueError(f"vectors have {vectors.shape[1]} entries, images of {shape[0]}x{shape[1]} do not fit")
    values = found.values.reshape(len(vectors), -1)
    figure, axes = _figure(len(vectors), 2 * k, (1.1 * 2 * k, 1.15 * len(vectors)))
    for index in range(len(vectors)):
        order = values[index].argsort(descending=True)
        chosen = torch.cat([order[:k], order.flip(0)[:k]])
        for place, pair in enumerate(chosen.tolist()):
            _image(axes[index, place], vectors[index, :, pair].reshape(shape), float(values[index, pair]))
        axes[index, 0].set_ylabel(labels[index] if labels else str(index))
    return figure


def _image(axis: Any, image: Tensor, value: float) -> None:
    size = float(image.abs().max()) or 1.0
    axis.imshow(image.cpu().numpy(), cmap="RdBu", vmin=-size, vmax=size)
    axis.set_title(f"{value:+.3g}", fontsize=7)
    axis.set(xticks=[], yticks=[])
