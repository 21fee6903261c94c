"""The report as one HTML file with its pictures inside, which needs nothing else."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from weightdecomp import _figures
from weightdecomp._circuits import Circuit
from weightdecomp._decomposition import Decomposition
from weightdecomp._figures import Images
from weightdecomp._report import Report, findings, markdown, problems
from weightdecomp._verification import Candidate, Verification

_FREQUENT, _SPECIFIC = 10, 6  # circuits listed
_RARE = 0.02  # circuits active on fewer images are not called specific
_MEMBERS = 8  # components named of one circuit


def write(report: Report, directory: Path) -> Path:
    """Write `report.html`, and `report.md` beside it, and return the path of the former.

    Raises:
        OSError: If they cannot be written.
    """
    page = directory / "report.html"
    page.write_text(html(report), encoding="utf-8")
    (directory / "report.md").write_text(markdown(report), encoding="utf-8")
    return page


def html(report: Report) -> str:
    """The whole report as one HTML file that needs nothing else."""
    decomposition, verification, images = report.decomposition, report.verification, report.images
    wrong = problems(report)
    banner = "".join(f"<p>{escape(one)}</p>" for one in wrong) or "<p>Within tolerance under attack.</p>"
    said = "".join(f"<li>{escape(one)}</li>" for one in findings(report))
    first = escape(decomposition.sites[0].path or "the model")
    sections = (
        (
            "Under attack",
            _picture(_figures.ladder(decomposition, verification), "damage against attack steps", _ATTACK),
        ),
        ("The same scores for what cannot be right", _candidates(verification)),
        (
            "How much is active",
            _picture(_figures.sizes(decomposition, verification), "sizes by site", _SIZES),
        ),
        (
            f"What the first layer reads ({first})",
            _picture(_figures.directions(decomposition, images), "input directions", _DIRECTIONS),
        ),
        ("Circuits", _circuits(decomposition, images)),
        ("All figures", f"<pre>{escape(str(decomposition))}</pre><pre>{escape(str(verification))}</pre>"),
    )
    body = "".join(f"<section><h2>{head}</h2>{content}</section>" for head, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(report.title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(report.title)}</h1>"
        f'<p>{_INTRODUCTION}</p><div class="{"no" if wrong else "yes"}">{banner}</div>'
        f"<ul>{said}</ul>{body}</body></html>\n"
    )


def _picture(figure: Any, alt: str, caption: str) -> str:
    source = _figures.png(figure)
    return f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


def _candidates(verification: Verification) -> str:
    rows = "".join(_candidate(one) for one in (verification.ours, *verification.nulls, verification.dense))
    budget = escape(verification.ours.adversarial.budget) if verification.ours.adversarial else ""
    head = "".join(f"<th>{one}</th>" for one in _HEADS)
    return (
        f"<table><tr>{head}</tr>{rows}</table>"
        f"<p class=note>{_CANDIDATES} Worst found: {budget}, one ablation for all images.</p>"
    )


def _candidate(one: Candidate) -> str:
    if one.ledger is None:
        return f"<tr><td>{escape(one.name)}</td><td colspan=5>skipped: {escape(one.reason)}</td></tr>"
    damages = [f"{f.damage:.3f}" if f else "–" for f in (one.stochastic, one.gates, one.adversarial)]
    cells = "".join(f"<td>{cell}</td>" for cell in (f"{one.active:.1f}", f"{one.ledger.per_input:.1f}", *damages))
    return f"<tr><td>{escape(one.name)}</td>{cells}</tr>"


def _circuits(decomposition: Decomposition, images: Images) -> str:
    """The most frequent circuits, those that tell most about the class, and when each is active."""
    active = _figures.active_circuits(decomposition, images)
    frequent = list(range(min(_FREQUENT, len(active))))
    common = [i for i, on in enumerate(active) if float(on.double().mean()) >= _RARE]
    specific = sorted(common, key=lambda i: -_told_about_class(active[i], images))[:_SPECIFIC]
    head = "".join(f"<th>{label}</th>" for label in range(images.n_classes))
    tables = []
    for name, chosen in (("Most frequent", frequent), ("Most telling about the digit", specific)):
        rows = "".join(_circuit(i, decomposition.circuits[i], active[i], images) for i in chosen)
        top = f"<tr><th></th><th>members</th><th>all</th>{head}</tr>"
        tables.append(f"<h3>{name}</h3><table class=circuits>{top}{rows}</table>")
    return "".join(tables) + f"<p class=note>{_CIRCUITS}</p>"


def _told_about_class(on: Bool[Tensor, " image"], images: Images) -> float:
    """Mutual information between a circuit's activity and the class, in nats."""
    joint = torch.stack([torch.bincount(images.labels[a], minlength=images.n_classes) for a in (on, ~on)])
    p = joint.double() / joint.sum()
    apart = p.sum(0, keepdim=True) * p.sum(1, keepdim=True)
    return float(torch.special.xlogy(p, p / apart.clamp_min(1e-12)).sum())


def _circuit(number: int, circuit: Circuit, on: Bool[Tensor, " image"], images: Images) -> str:
    more = f" and {len(circuit.members) - _MEMBERS} more" if len(circuit.members) > _MEMBERS else ""
    members = ", ".join(_by_site(circuit.members[:_MEMBERS])) + more
    shares = [float(on.double().mean()), *images.by_class(on).tolist()]
    cells = "".join(
        f'<td style="background:rgba(0,114,178,{0.6 * share:.2f})">{100 * share:.0f}</td>' for share in shares
    )
    return f"<tr><td>{number + 1}</td><td>{escape(members)}</td>{cells}</tr>"


def _by_site(members: Sequence[tuple[str, int]]) -> list[str]:
    sites: dict[str, list[str]] = {}
    for path, index in members:
        sites.setdefault(path, []).append(str(index))
    return [f"{path or '(model)'}: {' '.join(numbers)}" for path, numbers in sites.items()]


_INTRODUCTION = (
    "Every weight matrix is written as a sum of components: parts of rank one, or a few, each with a gate "
    "that says on which images it matters. Components that act together form circuits. Damage is how far the "
    "outputs move when components that are said not to matter are ablated, in the worst way found."
)
_ATTACK = (
    "An ablation sets the components that are inactive on an image to any value between off and on. Solid: "
    "one ablation searched for all images together, which decides the verdict. Dashed: another for every "
    "image, which is harder to withstand. Cross: the first kind, on the images that the run has seen. "
    "Orange: the nulls, at the one budget they are attacked with."
)
_HEADS = (
    "weights cut up as",
    "active",
    "bits per image",
    "random ablations",
    "only active on",
    "worst found",
)
_CANDIDATES = (
    "Damage: 0 is unchanged, 1 all behaviour lost. Nulls have as many components active as ours, so their "
    "bits are comparable only where their damage is; dense has every rank of every matrix active on every "
    "image."
)
_SIZES = "Components per weight matrix. A dense matrix has as many active as its rank, on every image."
_DIRECTIONS = (
    "The most frequent components of the first layer. Left: the pixels that one reads. It opens where ink on "
    "red pixels outweighs ink on blue ones by more than a threshold (+), or the other way round (−). Middle: "
    "the unseen images that do so most. Right: the share of every digit's images on which it is open, + "
    "upwards, − downwards."
)
_CIRCUITS = (
    "Numbers: per cent of the unseen images on which any member is active; first all images, then by digit. "
    "Members are named as site: component numbers."
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.25rem; margin-top: 2.5rem } h3 { font-size: 1rem }
.no, .yes { padding: .2rem 1rem; border-left: .4rem solid #b2182b; background: #fdf0ed }
.yes { border-color: #1b7837; background: #eef7ee }
figure { margin: 0 } img { max-width: 100% } figcaption, .note { color: #555; font-size: .9rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { font-weight: 600 }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child, .circuits td:nth-child(2), .circuits th:nth-child(2) { text-align: left }
.circuits td, .circuits th { padding: .25rem .45rem; min-width: 1.6rem }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .7rem }
"""
