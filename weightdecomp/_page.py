"""The report as one HTML file with its pictures and scripts inside, which needs nothing else."""

import base64
import hashlib
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from weightdecomp import _card_html, _circuit_html, _figures
from weightdecomp._cards import cards
from weightdecomp._report import Report, findings, markdown, problems
from weightdecomp._storage import commit
from weightdecomp._verification import Candidate, Verification


def write(report: Report, directory: Path) -> Path:
    """Write `report.html`, and `report.md` beside it, and return the path of the former.

    Raises:
        OSError: If they cannot be written; what was there before stays.
    """
    page = directory / "report.html"
    commit({page: html(report).encode(), directory / "report.md": markdown(report).encode()})
    return page


def html(report: Report) -> str:
    """The whole report as one HTML file that needs nothing else; whatever names and labels hold, they stay text."""
    wrong = problems(report)
    banner = "".join(f"<p>{escape(one)}</p>" for one in wrong) or "<p>Within tolerance under attack.</p>"
    said = "".join(f"<li>{escape(one)}</li>" for one in findings(report))
    sections = list(enumerate(_sections(report).items()))
    links = "".join(f'<a href="#s{i}">{escape(head)}</a>' for i, (head, _) in sections)
    body = "".join(f'<section id="s{i}"><h2>{escape(head)}</h2>{content}</section>' for i, (head, content) in sections)
    graphs = "".join(report.graphs.values())
    style, script = (files("weightdecomp").joinpath(name).read_text(encoding="utf-8") for name in _RESOURCES)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, script, graphs)}">'
        f"<title>{escape(report.title)}</title>"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><h1>{escape(report.title)}</h1>"
        f'<p>{_INTRODUCTION}</p><div class="{"no" if wrong else "yes"}">{banner}</div>'
        f"<ul>{said}</ul><nav aria-label=Contents>{links}</nav>{body}<script>{script}</script></body></html>\n"
    )


def _sections(report: Report) -> dict[str, str]:
    """What the report consists of, by heading."""
    decomposition, verification, images = report.decomposition, report.verification, report.images
    found = {}
    if report.curve:
        picture = _figures.curve(report.curve, verification)
        found["Sparsity and damage"] = _picture(picture, "damage against active components", _CURVE)
    attack = _figures.ladder(decomposition, verification)
    found["Under attack"] = _picture(attack, "damage against attack steps", _ATTACK)
    found["The same scores for what cannot be right"] = _candidates(verification)
    sizes = _figures.sizes(decomposition, verification)
    found["How much is active"] = _picture(sizes, "sizes by site", _SIZES)
    if images is not None:
        read = _figures.directions(decomposition, images)
        first = decomposition.sites[0].path or "the model"
        found[f"What the first layer reads ({first})"] = _picture(read, "input directions", _DIRECTIONS)
    found |= _parts(report)
    for name, graph in report.graphs.items():
        # The frame has no origin, so that its script reaches nothing outside it.
        found[name] = f'<iframe sandbox="allow-scripts" title="{escape(name)}" srcdoc="{escape(graph)}"></iframe>'
    if report.comparison is not None:
        plot = _picture(report.comparison.figure(), "bits against damage by method", _COMPARISON)
        found["Beside other methods"] = f"{plot}<pre>{escape(str(report.comparison))}</pre>"
    found["All figures"] = f"<pre>{escape(str(decomposition))}</pre><pre>{escape(str(verification))}</pre>"
    found["Recipe"] = _recipe(report.recipe)
    return found


def _parts(report: Report) -> dict[str, str]:
    """The component browser and the circuits, which link to each other."""
    decomposition, images = report.decomposition, report.images
    found = cards(decomposition, report.batches)
    how = _card_html.setting(decomposition, report.batches, images, report.vocabulary, report.output_names)
    known = {card.member for own in found.values() for card in own}

    def link(site: str, index: int) -> str | None:
        return _card_html.anchor(how, site, index) if (site, index) in known else None

    if images is None:
        circuits = _circuit_html.listed(decomposition, link)
    else:
        circuits = _circuit_html.by_class(decomposition, images, link)
    browser = f"<p class=note>{_CARDS}</p>{_card_html.browser(found, decomposition, how)}"
    return {"Components": browser, "Circuits": circuits}


def _recipe(recipe: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(told)}</td></tr>" for name, told in recipe.items()
    )
    return f"<div class=scroll><table class=recipe>{rows}</table></div>"


def _policy(style: str, script: str, graphs: str) -> str:
    """What the page may do: show pictures inside it, and run the scripts that are its own or its graph's.

    A frame without an address of its own is bound by the policy of the page around it as well.
    """
    inner = {name: re.findall(f"<{name}>(.*?)</{name}>", graphs, re.DOTALL) for name in ("style", "script")}
    allowed = {"style": [style, *inner["style"]], "script": [script, *inner["script"]]}
    sources = "; ".join(f"{name}-src {' '.join(dict.fromkeys(map(_hash, texts)))}" for name, texts in allowed.items())
    return f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; {sources}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _picture(figure: Any, alt: str, caption: str) -> str:
    source = _figures.png(figure)
    return f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


def _candidates(verification: Verification) -> str:
    rows = "".join(_candidate(one) for one in (verification.ours, *verification.nulls, verification.dense))
    budget = escape(verification.ours.adversarial.budget) if verification.ours.adversarial else ""
    head = "".join(f"<th>{one}</th>" for one in _HEADS)
    return (
        f"<div class=scroll><table><tr>{head}</tr>{rows}</table></div>"
        f"<p class=note>{_CANDIDATES} Worst found: {budget}, one ablation for all inputs.</p>"
    )


def _candidate(one: Candidate) -> str:
    if one.ledger is None:
        return f"<tr><td>{escape(one.name)}</td><td colspan=5>skipped: {escape(one.reason)}</td></tr>"
    damages = [f"{f.damage:.3f}" if f else "–" for f in (one.stochastic, one.gates, one.adversarial)]
    cells = "".join(f"<td>{cell}</td>" for cell in (f"{one.active:.1f}", f"{one.ledger.per_input:.1f}", *damages))
    return f"<tr><td>{escape(one.name)}</td>{cells}</tr>"


_INTRODUCTION = (
    "Every weight matrix is written as a sum of components: parts of rank one, or a few, each with a gate "
    "that says on which inputs it matters. Components that act together form circuits. Damage is how far the "
    "outputs move when components that are said not to matter are ablated, in the worst way found."
)
_ATTACK = (
    "An ablation sets the components that are inactive on an input to any value between off and on. Solid: "
    "one ablation searched for all inputs together, which decides the verdict. Dashed: another for every "
    "input, which is harder to withstand. Cross: the first kind, on inputs of the run. "
    "Orange: the nulls, at the one budget they are attacked with."
)
_HEADS = (
    "weights cut up as",
    "active",
    "bits per input",
    "random ablations",
    "only active on",
    "worst found",
)
_CANDIDATES = (
    "Damage: 0 is unchanged, 1 all behaviour lost. Nulls have as many components active as ours, so their "
    "bits are comparable only where their damage is; dense has every rank of every matrix active on every "
    "input."
)
_SIZES = "Components per weight matrix. A dense matrix has as many active as its rank, on every input."
_DIRECTIONS = (
    "The most frequent components of the first layer. Left: the pixels that one reads. It opens where ink on "
    "red pixels outweighs ink on blue ones by more than a threshold (+), or the other way round (−). Middle: "
    "the images that do so most. Right: the share of every class's images on which it is open, + "
    "upwards, − downwards."
)
_RESOURCES = ("report.css", "report.js")
_CURVE = (
    "All thresholds of the gates multiplied by one number, told above (x 1 is the decomposition itself), on at most "
    "256 inputs. To the left fewer components are active, and ablating the others does more damage. Worst found: 20 "
    "attack steps, 3 restarts, one ablation for all inputs. Nulls are attacked with the budget of the table below."
)
_CARDS = (
    "On at most 512 of the inputs. Arms: the two sides of a gate, with the inputs that open them furthest. Promotes, "
    "suppresses: what the component adds to the outputs there (log-probabilities, or outputs), found by taking it out. "
    "Reads, writes: largest coordinates of its directions. Links of circuits lead here."
)
_COMPARISON = "Every setting of every method; lower and further left is better. The dotted line is the tolerance."
