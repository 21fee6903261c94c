"""The report on a decomposition: what it finds, as text and as Markdown."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from weightdecomp._batches import Batch, digest, size
from weightdecomp._comparison import Comparison
from weightdecomp._curve import Point
from weightdecomp._decomposition import Decomposition
from weightdecomp._figures import Images
from weightdecomp._made import Made, package_version
from weightdecomp._pretrained import Pretrained
from weightdecomp._storage import digest as tensor_digest
from weightdecomp._verification import Verification
from weightdecomp._vocabulary import Vocabulary


class Report(NamedTuple):
    """What a report is about.

    Attributes:
        title: Its heading.
        decomposition: What it is about.
        verification: Of that decomposition, on the batches.
        batches: Inputs, best ones that the run has not seen.
        images: The same inputs as pictures with their classes, of a model that returns one number per class.
        vocabulary: Labels of tokens, where inputs are tokens.
        curve: Damage at fewer and more active components.
        graphs: Pages of circuit graphs, by heading.
        comparison: With other methods.
        recipe: How everything was made, by what it tells.
    """

    title: str
    decomposition: Decomposition
    verification: Verification
    batches: Sequence[Batch]
    images: Images | None = None
    vocabulary: Vocabulary | None = None
    curve: Sequence[Point] = ()
    graphs: Mapping[str, str] = MappingProxyType({})
    comparison: Comparison | None = None
    recipe: Mapping[str, str] = MappingProxyType({})

    @property
    def output_names(self) -> Vocabulary | None:
        """Labels of outputs, where they are tokens too."""
        encoder = isinstance(self.decomposition.target, Pretrained) and not self.decomposition.target.causal
        return None if encoder else self.vocabulary


def problems(report: Report) -> list[str]:
    """What a reader must know before anything else; empty if the result can be relied on."""
    outcome, verification = report.decomposition.outcome, report.verification
    found = []
    if not outcome.converged:
        found.append(f"The run did not converge: {outcome.reason}.")
    if not verification.converged:
        own = f" On the run's own inputs: {outcome.reason}." if outcome.converged else ""
        found.append(f"Outside the tolerance on the inputs of this report: {verification.reason}.{own}")
    if not outcome.compresses:
        found.append(f"The run's verdict: {outcome.verdict}.")
    return found


def findings(report: Report) -> list[str]:
    """The result in a few sentences."""
    decomposition, verification = report.decomposition, report.verification
    sites = verification.sites
    n, active = sum(site.components for site in sites), sum(site.active for site in sites)
    accuracy = "" if report.images is None else f" {_accuracy(report.decomposition, report.images)}"
    live = sum(1 for frequency in decomposition.group_frequencies if frequency > 0)
    budget, n_inputs = verification.shared.budget, verification.n_inputs
    said = [
        f"{len(sites)} weight matrices are cut into {n} components, grouped into {live} live circuits; "
        "components and remainder sum to the weights exactly.",
        f"{active:.1f} components are active on a mean row (an input, or a position of one) of the {n_inputs:,} inputs "
        f"of this report.{accuracy}",
        f"The worst ablation of inactive components that was found ({budget}), one for all inputs, does "
        f"{verification.damage:.1%} of the damage of ablating everything; tolerance "
        f"{decomposition.tolerance:.1%}. Another ablation for every input does "
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
def _accuracy(decomposition: Decomposition, images: Images) -> str:
    """How many images the target classifies right, and the active components alone."""
    pixels, labels, _ = images
    whole = decomposition.target(pixels)
    alone = decomposition.ablate(pixels, keep=decomposition.importances(pixels))
    right, kept = (float((output.argmax(-1) == labels).double().mean()) for output in (whole, alone))
    return f"The model classifies {right:.1%} of these right, the active components alone {kept:.1%}."


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
        ("Verification, on the inputs of this report", str(report.verification)),
    ]
    if report.comparison is not None:
        blocks.append(("Beside other methods", str(report.comparison)))
    blocks.append(("Recipe", "\n".join(f"{name}: {told}" for name, told in report.recipe.items())))
    tables = [f"\n## {head}\n\n```text\n{block}\n```" for head, block in blocks]
    return "\n".join([f"# {title}\n", *warned, *said, *tables, "\nPictures: `report.html`.\n"])


def model_name(model: nn.Module) -> str:
    """The class of a model, and where it comes from if it was loaded from a directory."""
    return model.title if isinstance(model, Pretrained) else type(model).__name__


def recipe(decomposition: Decomposition, batches: Sequence[Batch], words: Mapping[str, Any]) -> dict[str, str]:
    """How a report was made; `words` are the command's flags by name."""
    # By identity: 0 == False, and a flag of 0 is a choice.
    flags = {name: value for name, value in words.items() if name != "verb" and not (value is None or value is False)}
    config = ", ".join(f"{name} {value}" for name, value in decomposition.config.to_dict().items())
    return {
        "model": model_name(decomposition.target),
        "weights": f"sha256 {tensor_digest(decomposition.target.state_dict())}",
        "sites": ", ".join(site.path or "(model)" for site in decomposition.sites),
        "divergence": f"{decomposition.divergence.name} ({decomposition.divergence.reason})",
        "tolerance": f"{decomposition.tolerance:g}",
        "run": config,
        **_made(decomposition.outcome.made),
        "inputs of this report": f"{sum(map(size, batches)):,}, sha256 {digest(batches)}",
        "report": ", ".join(f"{name} {value}" for name, value in flags.items()),
        "weightdecomp": package_version(),
        "torch": torch.__version__,
    }


def _made(made: Made | None) -> dict[str, str]:
    """What the run was made from, where it is known."""
    if made is None:
        return {}
    return {
        "seed of the run": str(made.seed),
        "inputs of the run": f"{made.inputs:,}, sha256 {made.sha256}",
        "version of the run": made.version,
    }
