"""Cards: what a reader is told of one component, all of it measured on given inputs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from weightdecomp._batches import Batch, call, joined, select, size, tensors
from weightdecomp._circuits import Member
from weightdecomp._decomposition import Component, Decomposition
from weightdecomp._divergence import output_tensor
from weightdecomp._forward import inner_activations, recorded

INPUTS = 512  # looked at, at most
_CARDS = 400  # of all sites together
_FEWEST, _MOST = 8, 48  # of one site
_PEAKS = 6  # shown of an arm
_COORDINATES = 4
_SMALL = 0.01  # share of the largest coordinate below which none is named


class Peak(NamedTuple):
    """Where an input drives a component most.

    Attributes:
        input: Number of the input in the batches.
        row: Position (call after call) of the largest contribution.
        contributions: At all rows of that input.
    """

    input: int
    row: int
    contributions: Float[Tensor, " row"]


class Arm(NamedTuple):
    """One side of a component's gate.

    Attributes:
        sign: 1 or -1.
        share: Of rows on which it is open.
        peaks: The inputs that drive it most beyond its threshold, strongest first.
        effect: What the component adds to the outputs there: the target's less those without it, the mean over peaks;
            log-probabilities where the divergence is KL.
    """

    sign: int
    share: float
    peaks: list[Peak]
    effect: Float[Tensor, " output"] | None


class Card(NamedTuple):
    """One component.

    Attributes:
        component: Itself.
        circuit: Number of its circuit, from 0.
        reads: Its main input direction.
        writes: Its main output direction.
        arms: Those that are open on some row.
    """

    component: Component
    circuit: int
    reads: Float[Tensor, " d_in"]
    writes: Float[Tensor, " d_out"]
    arms: list[Arm]

    @property
    def member(self) -> Member:
        """Site and number."""
        return self.component.site, self.component.index


@torch.no_grad()
def cards(decomposition: Decomposition, batches: Sequence[Batch]) -> dict[str, list[Card]]:
    """Per site, cards of its most frequent components, measured on the first 512 inputs."""
    chosen = _first(joined(decomposition.read(batches)))
    circuit = {member: i for i, group in enumerate(decomposition.groups) for member in group}
    most = min(_MOST, max(_FEWEST, _CARDS // len(decomposition.sites)))
    found: dict[str, list[Card]] = {}
    for site in decomposition.sites:
        frequencies = decomposition.parts[site.path].frequencies
        shown = [int(i) for i in frequencies.argsort(descending=True, stable=True)[:most] if frequencies[i] > 0]
        drives = [_contributions(decomposition, site.path, batch)[..., shown] for batch in chosen]
        own = []
        for column, index in enumerate(shown):
            component = decomposition.component(site.path, index)
            arms = _arms(decomposition, component, chosen, [drive[..., column] for drive in drives])
            own.append(Card(component, circuit[site.path, index], *_directions(component), arms))
        found[site.path] = own
    return found


def top(values: Tensor, n: int = _COORDINATES) -> list[tuple[int, float]]:
    """The entries of largest size, largest first, with their places; none below a hundredth of the largest."""
    best = values.abs().topk(min(n, len(values)))
    return [(int(i), float(values[i])) for i in best.indices if abs(values[i]) > _SMALL * best.values[0]]


def _first(batches: Sequence[Batch]) -> list[Batch]:
    kept, left = [], INPUTS
    for batch in batches:
        if left > 0:
            kept.append(select(batch, torch.arange(min(left, size(batch)), device=tensors(batch)[0].device)))
        left -= size(batch)
    return kept


def _contributions(decomposition: Decomposition, path: str, batch: Batch) -> Float[Tensor, "input row component"]:
    """Contributions of all components of a site; nothing at padded positions."""
    place, own, inputs = decomposition.site(path), decomposition.parts[path].pieces, size(batch)
    calls = []
    for inner in inner_activations(recorded(decomposition.target, batch, [place]), place, own):
        a = own.activations(inner)
        # Rows that no single input owns (positions, say) drive the component alike on all inputs.
        calls.append(
            a.reshape(inputs, -1, own.n) if len(a) == inputs else a.reshape(1, -1, own.n).expand(inputs, -1, -1)
        )
    return torch.cat(calls, 1)


def _directions(component: Component) -> tuple[Tensor, Tensor]:
    """What a component reads and writes; of several pieces, the main pair of directions of their product."""
    if len(component.left) == 1:
        size_in = component.right[0].norm().clamp_min(1e-30)
        return component.right[0] / size_in, component.left[0] * size_in
    left, sizes, right = torch.linalg.svd(component.left.T @ component.right, full_matrices=False)
    return right[0], left[:, 0] * sizes[0]


def _arms(
    decomposition: Decomposition, component: Component, batches: Sequence[Batch], drives: Sequence[Tensor]
) -> list[Arm]:
    """The arms that are open on some row, with where they are most."""
    rows, arms = sum(drive.numel() for drive in drives), []
    for sign, threshold in zip((1, -1), component.thresholds, strict=True):
        share = sum(int((sign * drive > threshold).sum()) for drive in drives) / rows
        if share:
            peaks = _peaks(drives, sign, threshold)
            arms.append(Arm(sign, share, peaks, _effect(decomposition, component, batches, peaks)))
    return arms


def _peaks(drives: Sequence[Tensor], sign: int, threshold: float) -> list[Peak]:
    found, offset = [], 0
    for drive in drives:
        best = (sign * drive).amax(1)
        for i in best.topk(min(_PEAKS, len(best))).indices.tolist():
            if best[i] > threshold:
                found.append((float(best[i]), Peak(offset + i, int((sign * drive[i]).argmax()), drive[i])))
        offset += len(drive)
    return [peak for _, peak in sorted(found, key=lambda pair: -pair[0])[:_PEAKS]]


def _effect(
    decomposition: Decomposition, component: Component, batches: Sequence[Batch], peaks: Sequence[Peak]
) -> Float[Tensor, " output"] | None:
    """What taking a component out changes at its peaks, with the sign of having it; None for outputs of other kinds."""
    if decomposition.divergence.name not in ("mse", "kl"):
        return None
    keep = {path: torch.ones(parts.pieces.n) for path, parts in decomposition.parts.items()}
    keep[component.site][component.index] = 0
    changes, offset = [], 0
    for batch in batches:
        own = [peak for peak in peaks if offset <= peak.input < offset + size(batch)]
        if own:
            index = torch.tensor([peak.input - offset for peak in own], device=tensors(batch)[0].device)
            few = select(batch, index)
            outputs = call(decomposition.target, few), decomposition.ablate(few, keep, remainder=True)
            whole, without = (_numbers(decomposition, output) for output in outputs)
            changes += [_at(change, peak) for change, peak in zip(whole - without, own, strict=True)]
        offset += size(batch)
    return torch.stack(changes).mean(0)


def _numbers(decomposition: Decomposition, output: object) -> Float[Tensor, "input *row output"]:
    found = output_tensor(output)
    return found.log_softmax(-1) if decomposition.divergence.name == "kl" else found


def _at(change: Float[Tensor, "*row output"], peak: Peak) -> Float[Tensor, " output"]:
    """A change of one input's outputs at the peak's row, or the mean where its rows are others than the site's."""
    rows = change.reshape(-1, change.shape[-1])
    return rows[peak.row] if len(rows) == len(peak.contributions) else rows.mean(0)
