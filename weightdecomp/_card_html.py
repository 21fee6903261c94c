"""The component browser of a report: cards as HTML, with pictures or texts of the inputs that drive a component."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightdecomp._batches import Batch, tensors
from weightdecomp._cards import Arm, Card, Peak, top
from weightdecomp._decomposition import Decomposition
from weightdecomp._figures import Images
from weightdecomp._forward import recorded
from weightdecomp._vocabulary import Vocabulary

_AROUND = 12  # tokens shown before the peak, and half as many after it
_EFFECTS = 6  # outputs named that a component adds to, and takes from
_SHADES = 5


class Setting(NamedTuple):
    """What cards are drawn with.

    Attributes:
        anchors: Number of every site, for links.
        batches: The inputs that cards were measured on.
        images: Where inputs are pictures.
        seen: Sites that read the pictures themselves.
        vocabulary: Where inputs are tokens.
        names: Names of outputs, by number.
    """

    anchors: Mapping[str, int]
    batches: Sequence[Batch]
    images: Images | None
    seen: frozenset[str]
    vocabulary: Vocabulary | None
    names: Mapping[int, str] | None


def setting(
    decomposition: Decomposition,
    batches: Sequence[Batch],
    images: Images | None,
    vocabulary: Vocabulary | None,
    names: Mapping[int, str] | None,
) -> Setting:
    """How to draw the cards of a decomposition."""
    anchors = {site.path: number for number, site in enumerate(decomposition.sites)}
    seen = frozenset() if images is None else _seen(decomposition, images)
    return Setting(anchors, batches, images, seen, vocabulary, names)


def _seen(decomposition: Decomposition, images: Images) -> frozenset[str]:
    """The sites that are called with the pictures as they are."""
    few = images.pixels[:1]
    record = recorded(decomposition.target, few, decomposition.sites)
    operands = {path: calls[0][0] for path, calls in record.operands.items()}
    return frozenset(path for path, x in operands.items() if x.shape == few.shape and torch.equal(x, few))


def browser(found: Mapping[str, Sequence[Card]], decomposition: Decomposition, how: Setting) -> str:
    """All cards, by site, with a field to find some."""
    sites = []
    for number, (path, cards) in enumerate(found.items()):
        n = decomposition.parts[path].pieces.n
        shown = f"{len(cards)} of {n} components, most frequent first"
        body = "".join(_card(card, how) for card in cards)
        sites.append(
            f"<details class=site{' open' if number == 0 else ''}><summary>{escape(path or '(model)')} "
            f"<span class=note>{shown}</span></summary><div class=cards>{body}</div></details>"
        )
    find = "<p><label>find <input id=find type=search placeholder='site, number, token' autocomplete=off></label> "
    return find + "<output id=found aria-live=polite></output></p>" + "".join(sites)


def anchor(how: Setting, site: str, index: int) -> str:
    """The id of a card."""
    return f"c{how.anchors[site]}-{index}"


def _card(card: Card, how: Setting) -> str:
    one = card.component
    facts = f"open on {_percent(one.frequency)} of the run's rows · circuit {card.circuit + 1}"
    rank = f" · rank {len(one.left)}" if len(one.left) > 1 else ""
    arms = "".join(_arm(arm, how) for arm in card.arms) or "<p class=note>open on none of these inputs</p>"
    return (
        f'<article class=card id="{anchor(how, one.site, one.index)}" data-number={one.index} tabindex=0>'
        f"<h4>{escape(one.site or '(model)')} {one.index}</h4><p class=note>{facts}{rank}</p>"
        f"<div class=pair>{_direction('reads', card.reads, card, how)}{_direction('writes', card.writes, card, how)}"
        f"</div>{arms}</article>"
    )


def _direction(what: str, direction: Tensor, card: Card, how: Setting) -> str:
    """A direction as a picture where it is one, else its largest coordinates."""
    site = card.component.site
    if what == "reads" and how.images is not None and site in how.seen:
        limit = float(direction.abs().max())
        picture = _png(direction.reshape(how.images.side, -1), "RdBu_r", -limit, limit)
        return f'<div><b>reads</b><br><img class=pixels src="{picture}" alt="weights by pixel, red positive"></div>'
    largest = " ".join(f"<span class=chip>{i}: {value:+.2g}</span>" for i, value in top(direction))
    return f"<div><b>{what}</b> <span class=note>{largest}</span></div>"


def _arm(arm: Arm, how: Setting) -> str:
    sign = "+" if arm.sign > 0 else "−"
    head = f"<p><b>{sign}</b> open on {_percent(arm.share)} of rows here</p>"
    return f"<div class=arm>{head}{_peaks(arm, how)}{_effects(arm, how)}</div>"


def _peaks(arm: Arm, how: Setting) -> str:
    if how.images is not None:
        side, pixels = how.images.side, how.images.pixels
        sheet = [pixels[peak.input].reshape(side, -1) for peak in arm.peaks]
        spaced = torch.cat([torch.nn.functional.pad(one, (0, 1), value=0.0) for one in sheet], 1)[:, :-1]
        source = _png(spaced, "gray_r", 0.0, float(pixels.max()))
        labels = " ".join(str(int(how.images.labels[peak.input])) for peak in arm.peaks)
        return f'<img class="pixels sheet n{len(sheet)}" src="{source}" alt="inputs of classes {labels}">'
    if how.vocabulary is not None:
        return "".join(f"<p class=text>{_text(peak, arm.sign, how)}</p>" for peak in arm.peaks)
    told = ", ".join(f"{peak.input} ({float(peak.contributions[peak.row]):+.3g})" for peak in arm.peaks)
    return f"<p class=note>inputs {told}</p>"


def _text(peak: Peak, sign: int, how: Setting) -> str:
    """The tokens around a peak, shaded by how much they drive the component."""
    assert how.vocabulary is not None
    ids = _tokens(how.batches, peak.input)
    if len(ids) != len(peak.contributions):
        return escape("".join(text for text, _ in how.vocabulary.words(ids[: 2 * _AROUND])))
    start, stop = max(0, peak.row - _AROUND), min(len(ids), peak.row + _AROUND // 2)
    drive = (sign * peak.contributions / abs(float(peak.contributions[peak.row]))).clamp(0, 1)
    said, at = [], start
    for text, n in how.vocabulary.words(ids[start:stop]):
        shade = round(_SHADES * float(drive[at : at + n].max()))
        mark = " peak" if at <= peak.row < at + n else ""
        said.append(f'<span class="t{shade}{mark}">{escape(text)}</span>')
        at += n
    return ("…" if start else "") + "".join(said)


def _tokens(batches: Sequence[Batch], number: int) -> list[int]:
    """The token ids of one input, numbered over all batches."""
    for batch in batches:
        ids = next(x for x in tensors(batch) if not x.is_floating_point())
        if number < len(ids):
            return ids[number].flatten().tolist()
        number -= len(ids)
    raise AssertionError("a peak lies outside the inputs")


def _effects(arm: Arm, how: Setting) -> str:
    """The outputs that the component adds most to, and those that it takes most from."""
    if arm.effect is None:
        return ""
    n, said = min(_EFFECTS, max(1, len(arm.effect) // 2)), ""
    for word, sign in (("promotes", 1), ("suppresses", -1)):
        best = (sign * arm.effect).topk(n)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        named = " ".join(_chip(index, sign * change, how) for index, change in pairs if change > 0)
        said += f"<p>{word} {named}</p>" if named else ""
    return said


def _chip(index: int, change: float, how: Setting) -> str:
    name = str(index) if how.names is None else how.names.get(index, str(index))
    return f"<span class=chip><code>{escape(name)}</code> <span class=note>{change:+.2g}</span></span>"


def _png(values: Tensor, colours: str, low: float, high: float) -> str:
    """A matrix as a picture, a pixel a number."""
    from matplotlib.image import imsave

    data: Any = io.BytesIO()
    imsave(data, values.cpu().numpy(), cmap=colours, vmin=low, vmax=high, format="png")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
