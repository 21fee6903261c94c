"""The report on a decomposed image classifier: what it finds, as text and as Markdown."""

from typing import NamedTuple

import torch

from weightdecomp._decomposition import Decomposition
from weightdecomp._figures import Images
from weightdecomp._verification import Verification


class Report(NamedTuple):
    """What a report is about.

    Attributes:
        title: Its heading.
        decomposition: Of an image classifier that returns one number per class.
        verification: Of that decomposition, on the images.
        images: Images that the run has not seen.
    """

    title: str
    decomposition: Decomposition
    verification: Verification
    images: Images


def problems(report: Report) -> list[str]:
    """What a reader must know before anything else; empty if the result can be relied on."""
    outcome, verification = report.decomposition.outcome, report.verification
    found = []
    if not outcome.converged:
        found.append(f"The run did not converge: {outcome.reason}.")
    if not verification.converged:
        own = f" On the run's own images: {outcome.reason}." if outcome.converged else ""
        found.append(f"Outside the tolerance on images that the run has not seen: {verification.reason}.{own}")
    if not outcome.compresses:
        found.append(f"The run's verdict: {outcome.verdict}.")
    return found


def findings(report: Report) -> list[str]:
    """The result in a few sentences."""
    decomposition, verification = report.decomposition, report.verification
    sites = verification.sites
    n, active = sum(site.components for site in sites), sum(site.active for site in sites)
    right, kept = _accuracy(report)
    live = sum(1 for frequency in decomposition.group_frequencies if frequency > 0)
    budget, n_inputs = verification.shared.budget, verification.n_inputs
    said = [
        f"{len(sites)} weight matrices are cut into {n} components, grouped into {live} live circuits; "
        "components and remainder sum to the weights exactly.",
        f"{active:.1f} components are active on a mean image, of {n_inputs:,} that the run has not seen. The "
        f"model classifies {right:.1%} of these right, the active components alone {kept:.1%}.",
        f"The worst ablation of inactive components that was found ({budget}), one for all images, does "
        f"{verification.damage:.1%} of the damage of ablating everything; tolerance "
        f"{decomposition.tolerance:.1%}. Another ablation for every image does "
        f"{verification.per_input.plateau:.1%}.",
    ]
    nulls = [(one.name, one.adversarial) for one in verification.nulls if one.adversarial]
    ours = verification.ours.adversarial
    if nulls and ours:
        named = ", ".join(f"{found.damage:.3f} with {name}" for name, found in nulls)
        said.append(
            f"At the same number active and the same attack ({ours.budget}), damage is {ours.damage:.3f} "
            f"here, and {named}."
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
    right = [(output.argmax(-1) == labels).double().mean() for output in (whole, alone)]
    return float(right[0]), float(right[1])


def text(report: Report) -> str:
    """The summary for a terminal, the sentences last, where they stay in sight."""
    said = [f"- {one}" for one in findings(report)] + [f"! {one}" for one in problems(report)]
    return "\n\n".join((report.title, str(report.verification), "\n".join(said)))


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
