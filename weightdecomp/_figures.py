"""The pictures of a report, as PNG files in memory; matplotlib comes with the extra `demo`."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weightdecomp._regimes import ON
from weightdecomp._verification import Verification

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weightdecomp._decomposition import Component, Decomposition

_BLUE, _ORANGE, _GREY, _RED = "#0072b2", "#d55e00", "#767676", "#b2182b"
_MARKERS = "sD^vP*"
_ROWS, _SHOWN = 6, 6  # components in the picture of directions, and images on each side of one


class Images(NamedTuple):
    """Inputs that are pictures, with their classes.

    Attributes:
        pixels: As the model takes them, one square picture a row.
        labels: Class of each picture, from 0.
        side: Height and width in pixels.
    """

    pixels: Float[Tensor, "image pixel"]
    labels: Int[Tensor, " image"]
    side: int

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    def by_class(self, on: Bool[Tensor, " image"]) -> Float[Tensor, " label"]:
        """Share of each class's pictures for which a statement holds; 0 for a class without pictures."""
        total = torch.bincount(self.labels, minlength=self.n_classes)
        return torch.bincount(self.labels[on], minlength=self.n_classes) / total.clamp_min(1)


def check_plotting() -> None:
    """Check that pictures can be made, which long runs want to know before they start.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    _figure(1, 1)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the report's pictures need matplotlib, which is not installed: pip install 'weightdecomp[demo]'"
        ) from error
    # Not pyplot: it keeps figures and a backend for the whole process, which are the caller's.
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def png(figure: "Figure") -> str:
    """A figure as a data URI for an `img` tag."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def ladder(verification: Verification) -> "Figure":
    """Damage against attack steps: this decomposition's two ladders, and the nulls at the budget they had."""
    figure = _figure(8.4, 4.2)
    axes = figure.add_subplot()
    shared, per_input = verification.shared, verification.per_input
    axes.plot(shared.steps, shared.damages, "o-", color=_BLUE, label=_labelled("this decomposition", shared))
    label = _labelled("the same, attacked\nimage by image", per_input)
    axes.plot(per_input.steps, per_input.damages, "o--", color=_BLUE, mfc="white", label=label)
    nulls = [one for one in verification.nulls if one.adversarial]
    for marker, one in zip(_MARKERS, sorted(nulls, key=_damage, reverse=True), strict=False):
        steps = int(one.adversarial.budget.split()[0].replace(",", "")) if one.adversarial else 0
        label = f"null: {one.name} ({_damage(one):.2g})"
        axes.plot([steps], [_damage(one)], marker, color=_ORANGE, ms=8, label=label, ls="none")
    axes.axhline(1, color=_GREY, lw=1, label="everything ablated (1)")
    axes.axhline(verification.tolerance, color=_RED, lw=1, ls=":", label=f"tolerance ({verification.tolerance:g})")
    axes.set(xscale="log", yscale="log", xlabel="attack steps", ylabel="damage found (log scale)")
    axes.set_xticks(shared.steps, [f"{step:,}" for step in shared.steps])
    axes.xaxis.set_minor_locator(_nothing())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color="#e4e4e4")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _labelled(name: str, found: Any) -> str:
    return f"{name} ({found.plateau:.2g})"


def _damage(candidate: Any) -> float:
    return candidate.adversarial.damage


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def sizes(decomposition: "Decomposition", verification: Verification) -> "Figure":
    """Per site: rank of the matrix, components, live ones, and those active on a mean image."""
    sites = verification.sites
    figure = _figure(8.4, 0.6 + 0.95 * len(sites))
    axes = figure.add_subplot()
    ranks = [int(torch.linalg.matrix_rank(site.matrix())) for site in decomposition.sites]
    kinds = [
        ("rank of the matrix", ranks, "#d9d9d9"),
        ("components", [site.components for site in sites], "#9ecae1"),
        ("live on some image", [site.live for site in sites], "#4292c6"),
        ("active on a mean image", [site.active for site in sites], "#08306b"),
    ]
    for i, (name, numbers, colour) in enumerate(kinds):
        bars = axes.barh([j + 0.2 * i for j in range(len(sites))], numbers, 0.18, color=colour, label=name)
        axes.bar_label(bars, [f"{number:.3g}" for number in numbers], padding=3, fontsize=9)
    axes.set_yticks([j + 0.3 for j in range(len(sites))], [site.path or "(model)" for site in sites])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    figure.legend(loc="outside right center", frameon=False)
    return figure


class _Reading(NamedTuple):
    """What one component reads from pictures; signs chosen so that the arm that opens more often is positive."""

    component: "Component"
    direction: Float[Tensor, " pixel"]
    contributions: Float[Tensor, " image"]
    on: Bool[Tensor, " image"]


def _reading(decomposition: "Decomposition", component: "Component", images: Images) -> _Reading:
    site, index = component.site, component.index
    a = torch.zeros(len(images.pixels))
    for i, value in decomposition.top_inputs(site, index, [images.pixels], len(a)):
        a[i] = value
    on = decomposition.importances(images.pixels)[site][:, index] > ON
    # Left^T right alone has a meaning: a component of several pieces shows the main direction of the product.
    direction = torch.linalg.svd(component.left.T @ component.right).Vh[0]
    if float(direction @ component.right[0]) < 0:
        direction = -direction
    flip = -1.0 if int((on & (a < 0)).sum()) > int((on & (a > 0)).sum()) else 1.0
    return _Reading(component, flip * direction, flip * a, on)


def directions(decomposition: "Decomposition", images: Images) -> "Figure":
    """The first site's most frequent components: what they read, what drives them, on which classes."""
    first = decomposition.sites[0].path
    n = min(_ROWS, decomposition.parts[first].pieces.n)
    figure = _figure(10.5, 1.35 * n + 0.5)
    grid = figure.add_gridspec(n, 4, width_ratios=[1, 3, 3, 2.6])
    heads = ("reads (+ red, − blue)", "images that open it most: +", "images that open it most: −", "open on, by digit")
    for row in range(n):
        reading = _reading(decomposition, decomposition.component(first, row), images)
        axes = [figure.add_subplot(grid[row, column]) for column in range(4)]
        _draw_direction(axes[0], reading, images.side)
        _draw_strip(axes[1], reading, images, 1)
        _draw_strip(axes[2], reading, images, -1)
        _draw_classes(axes[3], reading, images, last=row == n - 1)
        for one, head in zip(axes, heads, strict=True) if row == 0 else ():
            one.set_title(head, fontsize=10)
    return figure


def _draw_direction(axes: Any, reading: _Reading, side: int) -> None:
    limit = float(reading.direction.abs().max())
    picture = reading.direction.reshape(side, side).numpy()
    axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
    share = float(reading.on.double().mean())
    axes.set_ylabel(f"component {reading.component.index}\nopen on {share:.0%}", rotation=0, ha="right", va="center")
    axes.set(xticks=[], yticks=[])


def _draw_strip(axes: Any, reading: _Reading, images: Images, sign: int) -> None:
    """The pictures that drive one arm most, side by side, if they open its gate."""
    a, side = sign * reading.contributions, images.side
    best = a.where(reading.on & (a > 0), -torch.inf).topk(min(_SHOWN, len(a)))
    shown = best.indices[best.values > 0]
    axes.set_axis_off()
    if not len(shown):
        axes.text(0.5, 0.5, "no image", ha="center", va="center", color=_GREY, transform=axes.transAxes)
        return
    strip = torch.full((side, _SHOWN * (side + 1)), torch.nan)
    for i, image in enumerate(shown.tolist()):
        strip[:, i * (side + 1) : i * (side + 1) + side] = images.pixels[image].reshape(side, side)
    axes.imshow(strip.numpy(), cmap="gray_r", vmin=0)


def _draw_classes(axes: Any, reading: _Reading, images: Images, last: bool) -> None:
    classes = range(images.n_classes)
    for sign, colour in ((1, _RED), (-1, _BLUE)):
        share = images.by_class(reading.on & (sign * reading.contributions > 0))
        axes.bar(classes, (sign * share).tolist(), color=colour, width=0.8)
    axes.axhline(0, color="black", lw=0.6)
    axes.set(ylim=(-1.05, 1.05), xticks=list(classes), yticks=[-1, 0, 1])
    axes.set_xticklabels([str(one) for one in classes] if last else [])
    axes.set_yticklabels(["100 % −", "0", "100 % +"], fontsize=7)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def active_circuits(decomposition: "Decomposition", images: Images) -> Sequence[Bool[Tensor, " image"]]:
    """Per circuit, the pictures on which any of its components is active."""
    on = {path: gate > ON for path, gate in decomposition.importances(images.pixels).items()}
    return [
        torch.stack([on[path][:, index] for path, index in circuit.members]).any(0)
        for circuit in decomposition.circuits
    ]
