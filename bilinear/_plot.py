"""Plots of spectra and vectors; matplotlib is an optional extra, imported when a plot is drawn."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bilinear._eigen import Eigen

_KEY = "red: negative entries, blue: positive, white: 0; each image to its own scale, and up to its overall sign"


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'weightdecomp[demo]'") from error
    return Figure(figsize=size, layout="constrained")


def _names(found: Eigen, labels: Sequence[str] | None) -> Sequence[str]:
    """The directions' names, by default their numbers.

    Raises:
        ValueError: If there are not as many as directions.
    """
    n = found.values.numel() // found.k
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels names {len(labels)} directions, the pairs are of {n}")
    return [f"direction {i}" for i in range(n)] if labels is None else labels


def plot_spectra(found: Eigen, labels: Sequence[str] | None = None) -> Any:
    """The eigenvalues of every direction, positive and negative ones by rank.

    Args:
        found: Eigenpairs.
        labels: A name for every direction.

    Returns:
        A matplotlib `Figure`; write it with `savefig("spectra.svg")`.

    Raises:
        ValueError: If there are not as many labels as directions.
        ModuleNotFoundError: Without matplotlib.
    """
    names, figure = _names(found, labels), _figure((7.0, 3.8))
    axis, colours = figure.subplots(), _colours(len(names))
    for name, colour, values in zip(names, colours, found.values.reshape(-1, found.k).cpu(), strict=True):
        for label, own in ((name, values[values > 0].sort(descending=True)[0]), (None, values[values < 0].sort()[0])):
            axis.plot(range(1, len(own) + 1), own.numpy(), ".-", color=colour, label=label, markersize=4, linewidth=1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(
        xlabel="rank among the eigenvalues of its sign",
        ylabel="eigenvalue",
        title=f"{found.k} largest eigenvalues per direction ({found.metric.name} metric)",
    )
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _colours(n: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10" if n <= 10 else "viridis"](i if n <= 10 else i / (n - 1)) for i in range(n)]


def plot_vectors(found: Eigen, shape: tuple[int, int], k: int = 3, labels: Sequence[str] | None = None) -> Any:
    """The leading vectors of every direction as images: the k most positive, then the k most negative.

    Args:
        found: Eigenpairs in pixel space.
        shape: Rows and columns of an image.
        k: Images of each sign.
        labels: A name for every direction.

    Returns:
        A matplotlib `Figure`. Places stay empty where a direction has fewer eigenvalues of a sign.

    Raises:
        ValueError: If the vectors do not have that many pixels, or there are not as many labels as directions.
        ModuleNotFoundError: Without matplotlib.
    """
    vectors = found.vectors.reshape(-1, *found.vectors.shape[-2:])[:, int(found.layer.affine) :]
    if vectors.shape[1] != shape[0] * shape[1]:
        raise ValueError(f"vectors have {vectors.shape[1]} entries, images of {shape[0]}x{shape[1]} do not fit")
    values, names = found.values.reshape(len(vectors), -1), _names(found, labels)
    figure = _figure((2.1 * k + 1.2, 1.15 * len(vectors) + 0.9))
    halves = figure.subfigures(1, 2, wspace=0.04)
    for half, sign, title in zip(halves, (1, -1), ("raise the output", "lower the output"), strict=True):
        axes = half.subplots(len(vectors), k, squeeze=False)
        half.suptitle(f"{title}\n(most {'positive' if sign > 0 else 'negative'} eigenvalues)", fontsize=10)
        for row, own, images in zip(axes, values * sign, vectors, strict=True):
            order = own.argsort(descending=True)
            for axis, pair in zip(row, order[own[order] > 0].tolist(), strict=False):
                _image(axis, images[:, pair].reshape(shape), sign * float(own[pair]))
            for axis in row:
                axis.set(xticks=[], yticks=[], frame_on=False)
    for row, name in zip(halves[0].axes[::k], names, strict=True):
        row.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.supxlabel(_KEY, fontsize=8)
    return figure


def _image(axis: Any, image: Tensor, value: float) -> None:
    size = float(image.abs().max()) or 1.0
    axis.imshow(image.cpu().numpy(), cmap="RdBu", vmin=-size, vmax=size)
    axis.set_title(f"{value:+.2g}", fontsize=8, pad=2)
