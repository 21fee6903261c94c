"""The report on a decomposed image classifier: text for the terminal and Markdown, and one HTML file with pictures."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from weightdecomp import _figures
from weightdecomp._circuits import Circuit
from weightdecomp._figures import Images
from weightdecomp._verification import Candidate, Verification

if TYPE_CHECKING:
    from weightdecomp._decomposition import Decomposition

_FREQUENT, _SPECIFIC = 10, 6  # circuits listed
_RARE = 0.02  # circuits active on fewer images are not called specific
_MEMBERS = 8  # components named of one circuit


class Report(NamedTuple):
    """What a report is about.

    Attributes:
        title: Its heading.
        decomposition: Of an image classifier that returns one number per class.
        verification: Of that decomposition, on the images.
        images: Images that the run has not seen.
    """

    title: str
    decomposition: "Decomposition"
    verification: Verification
    images: Images

    def write(self, directory: Path) -> None:
        """Write `report.html` and `report.md` to a folder.

        Raises:
            OSError: If they cannot be written.
        """
        for name, text in (("report.html", html(self)), ("report.md", markdown(self))):
            (directory / name).write_text(text, encoding="utf-8")


def problems(report: Report) -> list[str]:
    """What a reader must know before anything else; empty if the result can be relied on."""
    outcome, verification = report.decomposition.outcome, report.verification
    found = []
    if not outcome.converged:
        found.append(f"The run did not converge: {outcome.reason}.")
    if not verification.converged:
        before = f"the run met it on its own inputs ({outcome.reason}), but " if outcome.converged else ""
        found.append(f"Not within tolerance on images the run has not seen: {before}here {verification.reason}.")
    if not outcome.compresses:
        found.append(f"The run's verdict: {outcome.verdict}.")
    return found


def findings(report: Report) -> list[str]:
    """The result in a few sentences."""
    decomposition, verification = report.decomposition, report.verification
    sites = verification.sites
    n, n_active = sum(site.components for site in sites), sum(site.active for site in sites)
    right, kept = _accuracy(report)
    live = sum(1 for frequency in decomposition.group_frequencies if frequency > 0)
    said = [
        f"{len(sites)} weight matrices are cut into {n} components, grouped into {live} circuits; components and "
        "remainder sum to the weights exactly.",
        f"On {verification.n_inputs:,} images that the run has not seen, {n_active:.1f} components are active on a "
        f"mean image. Keeping only those leaves {kept:.1%} of the images classified right; the whole model has "
        f"{right:.1%}.",
        f"The worst ablation of inactive components that was found does {verification.damage:.1%} of the damage of "
        f"ablating everything ({verification.shared.budget}); the tolerance is {decomposition.tolerance:.1%}.",
    ]
    nulls = [one for one in verification.nulls if one.adversarial]
    if nulls and verification.ours.adversarial:
        named = ", ".join(f"{one.adversarial.damage:.2f} ({one.name})" for one in nulls if one.adversarial)
        said.append(
            f"With as many active, weights cut up in ways that cannot be right take {named}; this decomposition "
            f"{verification.ours.adversarial.damage:.2f} under the same attack."
        )
    if decomposition.outcome.compresses:
        said.append(f"The run's verdict: {decomposition.outcome.verdict}.")
    return said


@torch.no_grad()
def _accuracy(report: Report) -> tuple[float, float]:
    """Share of images classified right by the target, and by the active components alone."""
    decomposition, (pixels, labels, _) = report.decomposition, report.images
    whole = decomposition.target(pixels)
    alone = decomposition.ablate(pixels, keep=decomposition.importances(pixels))
    return tuple(float((output.argmax(-1) == labels).double().mean()) for output in (whole, alone))  # type: ignore


def text(report: Report) -> str:
    """The summary for a terminal."""
    said = [f"! {one}" for one in problems(report)] + [f"- {one}" for one in findings(report)]
    return "\n\n".join((report.title, "\n".join(said), str(report.verification)))


def markdown(report: Report) -> str:
    """The summary as Markdown, with all tables."""
    title = " ".join(report.title.split())
    warned = [f"> **{one}**\n" for one in problems(report)]
    said = [f"- {one}" for one in findings(report)]
    blocks = [
        ("The run, on its own inputs", str(report.decomposition)),
        ("Verification, on other images", str(report.verification)),
    ]
    tables = [f"\n## {head}\n\n```text\n{block}\n```" for head, block in blocks]
    return "\n".join([f"# {title}\n", *warned, *said, *tables, "\nPictures: `report.html`.\n"])


def html(report: Report) -> str:
    """The whole report as one HTML file that needs nothing else."""
    decomposition, verification, images = report.decomposition, report.verification, report.images
    wrong = problems(report)
    banner = "".join(f"<p>{escape(one)}</p>" for one in wrong) or "<p>Within tolerance under attack.</p>"
    said = "".join(f"<li>{escape(one)}</li>" for one in findings(report))
    first = escape(decomposition.sites[0].path or "the model")
    sections = (
        ("Under attack", _picture(_figures.ladder(verification), "damage against attack steps", _ATTACK)),
        ("The same scores for what cannot be right", _candidates(verification)),
        ("How much is active", _picture(_figures.sizes(decomposition, verification), "sizes by site", _SIZES)),
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
        f'<div class="{"no" if wrong else "yes"}">{banner}</div><ul>{said}</ul>{body}</body></html>\n'
    )


def _picture(figure: "_figures.Figure", alt: str, caption: str) -> str:
    source = _figures.png(figure)
    return f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


def _candidates(verification: Verification) -> str:
    rows = "".join(_candidate(one) for one in (verification.ours, *verification.nulls, verification.dense))
    budget = escape(verification.ours.adversarial.budget) if verification.ours.adversarial else ""
    return (
        "<table><tr><th>weights cut up as</th><th>active</th><th>bits per image</th><th>random ablations</th>"
        f"<th>only active on</th><th>worst found</th></tr>{rows}</table><p class=note>Damage: 0 is unchanged, 1 is "
        f"all behaviour lost. Worst found: {budget}, one ablation for all images. Every row has as many components "
        "active as ours; <i>dense</i> has every rank of every matrix active on every image.</p>"
    )


def _candidate(one: Candidate) -> str:
    if one.ledger is None:
        return f"<tr><td>{escape(one.name)}</td><td colspan=5>skipped: {escape(one.reason)}</td></tr>"
    damages = [f"{f.damage:.3f}" if f else "–" for f in (one.stochastic, one.gates, one.adversarial)]
    cells = "".join(f"<td>{cell}</td>" for cell in (f"{one.active:.1f}", f"{one.ledger.per_input:.1f}", *damages))
    return f"<tr><td>{escape(one.name)}</td>{cells}</tr>"


def _circuits(decomposition: "Decomposition", images: Images) -> str:
    """The most frequent circuits and those that depend most on the class, with the classes they are active on."""
    active = _figures.active_circuits(decomposition, images)
    frequent = list(range(min(_FREQUENT, len(active))))
    common = [i for i, on in enumerate(active) if float(on.double().mean()) >= _RARE]
    specific = sorted(common, key=lambda i: -_told_about_class(active[i], images))[:_SPECIFIC]
    head = "".join(f"<th>{label}</th>" for label in range(images.n_classes))
    tables = []
    for name, chosen in (("Most frequent", frequent), ("Most telling about the digit", specific)):
        rows = "".join(_circuit(i, decomposition.circuits[i], active[i], images) for i in chosen)
        tables.append(
            f"<h3>{name}</h3><table class=circuits><tr><th></th><th>members</th><th>all</th>{head}</tr>{rows}</table>"
        )
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
        f'<td style="background:rgba(0,114,178,{0.75 * share:.2f})">{100 * share:.0f}</td>' for share in shares
    )
    return f"<tr><td>{number + 1}</td><td>{escape(members)}</td>{cells}</tr>"


def _by_site(members: Sequence[tuple[str, int]]) -> list[str]:
    sites: dict[str, list[str]] = {}
    for path, index in members:
        sites.setdefault(path, []).append(str(index))
    return [f"{path or '(model)'}: {' '.join(numbers)}" for path, numbers in sites.items()]


_ATTACK = (
    "Every ablation sets components that are inactive on an image to any value between off and on. The solid line "
    "searches one ablation for all images (it decides the verdict), the dashed one another for every image, which "
    "is harder to withstand. Orange: the nulls, attacked with the same search at one budget."
)
_SIZES = "Components per weight matrix. A dense matrix has as many active as its rank, on every image."
_DIRECTIONS = (
    "The most frequent components of the first layer. Left: the pixels they read. A component opens when ink falls "
    "on red (+) more than a threshold, or on blue (−). Middle: the unseen images with the largest such sums. Right: "
    "the share of each digit's images on which it is open, on either side."
)
_CIRCUITS = (
    "Numbers: per cent of the unseen images on which any member is active; first all images, then by digit. "
    "Members are named as site: component numbers."
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.25rem; margin-top: 2.5rem } h3 { font-size: 1rem }
.no, .yes { padding: .2rem 1rem; border-left: .4rem solid #b2182b; background: #fdf0ed }
.yes { border-color: #1b7837; background: #eef7ee }
figure { margin: 0 } img { max-width: 100% } figcaption, .note { color: #555; font-size: .9rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th { font-weight: 600; text-align: right }
td { text-align: right } th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child, .circuits td:nth-child(2), .circuits th:nth-child(2) { text-align: left }
.circuits td, .circuits th { padding: .25rem .45rem; min-width: 1.6rem }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .8rem }
"""
