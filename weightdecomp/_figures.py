"""The pictures of a report, as PNG files in memory; matplotlib comes with the extra `demo`."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weightdecomp._curve import Point
from weightdecomp._decomposition import Component, Decomposition
from weightdecomp._gatekeeper import REVIEW
from weightdecomp._regimes import ON, Figure, Ladder
from weightdecomp._verification import Verification

_BLUE, _ORANGE, _GREY, _RED = "#0072b2", "#d55e00", "#767676", "#b2182b"
_MARKERS = "sD^vP*"
_COMPONENTS = 6  # in the picture of directions
_ACROSS, _DOWN = 4, 2  # images shown for either arm of a component
_ROOM = 0.12  # of the axis of a curve, for the label of a point


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
    _canvas(1.0, 1.0)


def _canvas(width: float, height: float) -> Any:
    """An empty matplotlib Figure, sizes in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the report's pictures need matplotlib, which is not installed: pip install 'weightdecomp[demo]'"
        ) from error
    # Not pyplot: it keeps figures and a backend for the whole process, which are the caller's.
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def png(figure: Any) -> str:
    """A figure as a data URI for an `img` tag."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def ladder(decomposition: Decomposition, verification: Verification) -> Any:
    """Damage against attack steps: this decomposition's two ladders, and the nulls at the budget they had."""
    figure = _canvas(8.4, 4.2)
    axes = figure.add_subplot()
    own, damage = verification.shared, decomposition.outcome.damage
    _draw_ladder(axes, own, "this decomposition", "o-", _BLUE)
    _draw_ladder(axes, verification.per_input, "the same, attacked\ninput by input", "o--", "white")
    label = f"on the inputs of the run ({damage:.3g})"
    axes.plot([REVIEW[0]], [damage], "x", color=_BLUE, ms=8, mew=2, ls="none", label=label)
    nulls = [(one.name, one.adversarial) for one in verification.nulls if one.adversarial]
    nulls.sort(key=lambda pair: -pair[1].damage)
    for marker, (name, found) in zip(_MARKERS, nulls, strict=False):
        label = f"null: {name} ({found.damage:.3g})"
        axes.plot([_steps(found)], [found.damage], marker, color=_ORANGE, ms=8, ls="none", label=label)
    axes.axhline(1, color=_GREY, lw=1, label="everything ablated (1)")
    limit = verification.tolerance
    axes.axhline(limit, color=_RED, lw=1.5, ls=":", label=f"tolerance ({limit:g})")
    axes.set(xscale="log", yscale="log", xlabel="attack steps", ylabel="damage found (log scale)")
    axes.set_xticks(own.steps, [f"{step:,}" for step in own.steps])
    axes.xaxis.set_minor_locator(_nothing())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color="#e4e4e4")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _draw_ladder(axes: Any, found: Ladder, name: str, line: str, face: str) -> None:
    label = f"{name} ({found.plateau:.3g})"
    axes.plot(found.steps, found.damages, line, color=_BLUE, mfc=face, label=label)


def curve(points: Sequence[Point], verification: Verification) -> Any:
    """Damage against the mean number active, all thresholds scaled together; nulls at their own number active."""
    figure = _canvas(8.4, 4.4)
    axes = figure.add_subplot()
    points = [point for point in points if point.active > 0]  # nothing has no place on a logarithmic axis
    active = [point.active for point in points]
    kinds = (
        ("worst found", "adversarial", "o-"),
        ("random ablations", "stochastic", "s--"),
        ("only active", "gates", "^:"),
    )
    for name, kind, line in kinds:
        axes.plot(active, [getattr(point, kind).damage for point in points], line, color=_BLUE, label=name)
    nulls = [one for one in verification.nulls if one.adversarial]
    for marker, one in zip(_MARKERS, nulls, strict=False):
        damage = one.adversarial.damage if one.adversarial else 0.0
        axes.plot([one.active], [damage], marker, color=_ORANGE, ls="none", label=f"null: {one.name}, attacked")
    axes.axhline(verification.tolerance, color=_RED, lw=1.5, ls=":", label=f"tolerance ({verification.tolerance:g})")
    axes.set(xscale="log", yscale="log", xlabel="active components, mean row (log scale)", ylabel="damage (log scale)")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color="#e4e4e4")
    _label(axes, points)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _label(axes: Any, points: Sequence[Point]) -> None:
    """Tell points of a curve by their number active, below the axes, and what thresholds are multiplied by, above."""
    # Inside the axes, markers of nulls would hide the decomposition's own label.
    above = axes.secondary_xaxis("top", xlabel="thresholds")
    told = _apart(points, *axes.get_xlim())
    labels = [_count(point.active) for point in told], [f"x {point.factor:g}" for point in told]
    for axis, own in zip((axes, above), labels, strict=True):
        axis.set_xticks([point.active for point in told], own, fontsize=9)
        axis.xaxis.set_minor_locator(_nothing())


def _apart(points: Sequence[Point], low: float, high: float) -> list[Point]:
    """Points with room for labels on a logarithmic axis: the decomposition itself, then those furthest from it."""
    furthest = sorted(points, key=lambda point: -abs(math.log(point.factor)))
    found: list[Point] = []
    least = _ROOM * math.log(high / low)
    for point in furthest[-1:] + furthest[:-1]:
        if all(abs(math.log(point.active / one.active)) > least for one in found):
            found.append(point)
    return found


def _count(active: float) -> str:
    return f"{active:,.0f}" if active >= 100 else f"{active:.3g}"


def _steps(found: Figure) -> int:
    """The steps in an attack's budget, which begins with them."""
    return int(found.budget.split()[0].replace(",", ""))


def _nothing() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _one_two_five() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


def sizes(decomposition: Decomposition, verification: Verification) -> Any:
    """Per site: rank of the matrix, components, live ones, and those active on a mean row."""
    sites = verification.sites
    figure = _canvas(8.4, 0.6 + 0.95 * len(sites))
    axes = figure.add_subplot()
    ranks = [int(torch.linalg.matrix_rank(site.matrix())) for site in decomposition.sites]
    kinds = [
        ("rank of the matrix", ranks, "#d9d9d9"),
        ("components", [site.components for site in sites], "#9ecae1"),
        ("live on some input", [site.live for site in sites], "#4292c6"),
        ("active on a mean row", [site.active for site in sites], "#08306b"),
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
    """What one component reads from pictures, with the sign that makes its busier arm positive."""

    component: Component
    direction: Float[Tensor, " pixel"]
    contributions: Float[Tensor, " image"]
    on: Bool[Tensor, " image"]


def _reading(decomposition: Decomposition, component: Component, images: Images) -> _Reading:
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


def directions(decomposition: Decomposition, images: Images) -> Any:
    """The first site's most frequent components: what they read, what drives them, on which classes."""
    first = decomposition.sites[0].path
    n = min(_COMPONENTS, decomposition.parts[first].pieces.n)
    figure = _canvas(9.6, 1.3 * n + 0.4)
    grid = figure.add_gridspec(n, 4, width_ratios=[1, _ACROSS / _DOWN, _ACROSS / _DOWN, 2.6])
    heads = ("reads", "opened most by, +", "opened most by, −", "open on, by class")
    for row in range(n):
        reading = _reading(decomposition, decomposition.component(first, row), images)
        axes = [figure.add_subplot(grid[row, column]) for column in range(4)]
        _draw_direction(axes[0], reading, images.side)
        _draw_images(axes[1], reading, images, 1)
        _draw_images(axes[2], reading, images, -1)
        _draw_classes(axes[3], reading, images, last=row == n - 1)
        for one, head in zip(axes, heads, strict=True) if row == 0 else ():
            one.set_title(head, fontsize=10)
    return figure


def _draw_direction(axes: Any, reading: _Reading, side: int) -> None:
    limit = float(reading.direction.abs().max())
    picture = reading.direction.reshape(side, side).numpy()
    axes.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
    share = float(reading.on.double().mean())
    label = f"component {reading.component.index}\nopen on {share:.0%}"
    axes.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
    axes.set(xticks=[], yticks=[])


def _draw_images(axes: Any, reading: _Reading, images: Images, sign: int) -> None:
    """The pictures that drive one arm most, row by row, as far as they open its gate."""
    a, step = sign * reading.contributions, images.side + 1
    best = a.where(reading.on & (a > 0), 0).topk(min(_ACROSS * _DOWN, len(a)))
    shown = best.indices[best.values > 0].tolist()
    sheet = torch.full((_DOWN * step - 1, _ACROSS * step - 1), torch.nan)
    for i, image in enumerate(shown):
        y, x = step * (i // _ACROSS), step * (i % _ACROSS)
        sheet[y : y + images.side, x : x + images.side] = images.pixels[image].reshape(images.side, -1)
    axes.imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=float(images.pixels.max()))
    if not shown:
        axes.text(0.5, 0.5, "no image", ha="center", va="center", color=_GREY, transform=axes.transAxes)
    axes.set_axis_off()


def _draw_classes(axes: Any, reading: _Reading, images: Images, last: bool) -> None:
    """Share of each class on which either arm is open, the negative one downwards."""
    classes = range(images.n_classes)
    for sign, colour in ((1, _RED), (-1, _BLUE)):
        share = images.by_class(reading.on & (sign * reading.contributions > 0))
        axes.bar(classes, (sign * share).tolist(), color=colour, width=0.8)
    axes.axhline(0, color="black", lw=0.6)
    axes.set(ylim=(-1.05, 1.05), xticks=list(classes), yticks=[-1, 0, 1])
    axes.set_xticklabels([str(one) for one in classes] if last else [])
    axes.set_yticklabels(["− 100%", "0", "+ 100%"], fontsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False)


def active_circuits(decomposition: Decomposition, images: Images) -> Sequence[Bool[Tensor, " image"]]:
    """Per circuit, the pictures on which any of its components is active."""
    on = {path: gate > ON for path, gate in decomposition.importances(images.pixels).items()}
    return [
        torch.stack([on[path][:, index] for path, index in circuit.members]).any(0)
        for circuit in decomposition.circuits
    ]


def comparison(found: Any) -> Any:
    """Bits per input against damage for every setting of every method, a panel a protocol, both axes logarithmic."""
    from weightdecomp._comparison import PROTOCOLS

    figure = _canvas(13.5, 4.4)
    panels = figure.subplots(1, len(PROTOCOLS), sharey=True)
    for number, row in enumerate(found.rows):
        mine = [point for point in found.points if point.method == row.method]
        ours, marker = number == 0, (_MARKERS + "Xv<>hd")[number % 11]
        color = _BLUE if ours else f"C{number % 10}"
        for axes, protocol in zip(panels, PROTOCOLS, strict=True):
            # Below 1e-4 of the behaviour nothing is told apart; a free and lossless point would have no place else.
            spots = sorted((max(point.bits, 0.1), max(getattr(point, protocol), 1e-4)) for point in mine)
            size = 11 if ours else 5
            axes.plot(
                *zip(*spots, strict=True) if spots else ([], []),
                marker=marker, color=color, ms=size, lw=0.8, label=row.method if axes is panels[0] else None,
            )  # fmt: skip
    for axes, protocol in zip(panels, PROTOCOLS, strict=True):
        axes.axhline(found.tolerance, color=_RED, lw=1.2, ls=":")
        axes.set(xscale="log", yscale="log", title=protocol, xlabel="bits per input (names and values)")
        axes.xaxis.set_major_locator(_one_two_five())
        axes.xaxis.set_minor_locator(_nothing())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(color="#e4e4e4")
    panels[0].set_ylabel("damage (log scale)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure
