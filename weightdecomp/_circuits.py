"""Circuits: components that act together, grouped across sites wherever that makes the ledger smaller."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weightdecomp._ledger import dictionary_bits, entropy, value_bits

if TYPE_CHECKING:
    from weightdecomp._decomposition import Decomposition

Member = tuple[str, int]  # module path of the site, number of the component


@dataclass(frozen=True, eq=False)
class Circuit:
    """Components, usually of several sites, that act together.

    Attributes:
        members: Its components.
        weights: Per site, the sum of its components as (d_out, d_in).
        frequency: Share of the run's inputs on which any of them is active.
        bits: What it costs per input in the ledger: its name, its values and its share of the dictionary.
    """

    members: tuple[Member, ...]
    weights: dict[str, Float[Tensor, "d_out d_in"]]
    frequency: float
    bits: float


class Groups(NamedTuple):
    """A partition of all components, most frequent group first, with the groups' frequencies."""

    members: list[list[Member]]
    frequencies: list[float]


def _costs(
    frequency: Float[Tensor, "*n"],
    rank: Float[Tensor, "*n"],
    numbers: Float[Tensor, "*n"],
    n_inputs: int,
    tolerance: float,
) -> Float[Tensor, "*n"]:
    """Bits per input of groups that are named by one name: naming, values and dictionary."""
    values = frequency * rank * value_bits(tolerance)
    return entropy(frequency) + values + dictionary_bits(frequency, numbers, n_inputs) / n_inputs


def grouped(
    on: Mapping[str, Bool[Tensor, "input component"]],
    ranks: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    tolerance: float,
) -> Groups:
    """Merge the pair of groups that saves most bits until no merge saves any.

    A merge saves a name and pays the values of members that are then active for nothing. Components that are never
    active are one group of their own. Source: ours; VPD's clustering (post, appendix) counts co-activation only.

    Args:
        on: Per site, on which inputs each component is active; the same inputs at every site.
        ranks: Per site, the rank of each component.
        shapes: Per site, (d_out, d_in).
        tolerance: The run's tolerance.
    """
    members = [(path, index) for path, pattern in on.items() for index in range(pattern.shape[1])]
    patterns = torch.cat([pattern.double() for pattern in on.values()], 1).T
    rank = torch.cat([ranks[path].double() for path in on])
    numbers = torch.cat([ranks[path].double() * sum(shapes[path]) for path in on])
    live = patterns.any(1)
    dead = [member for member, alive in zip(members, live.tolist(), strict=True) if not alive]
    groups = [[member] for member, alive in zip(members, live.tolist(), strict=True) if alive]
    groups, frequencies = _merged(groups, patterns[live], rank[live], numbers[live], tolerance)
    order = sorted(range(len(groups)), key=lambda i: -frequencies[i])
    found = Groups([groups[i] for i in order], [frequencies[i] for i in order])
    return Groups([*found.members, dead], [*found.frequencies, 0.0]) if dead else found


def activity(
    importances: Mapping[str, Sequence[Float[Tensor, "*batch component"]]],
) -> dict[str, Bool[Tensor, "input component"]]:
    """On which inputs (or positions, where all sites have the same) each component of each site is active."""
    rows = {tuple(call.shape[:-1]) for calls in importances.values() for call in calls}
    if len(rows) == 1:
        return {path: torch.stack(list(calls)).amax(0).flatten(0, -2) > 0 for path, calls in importances.items()}
    inputs = {len(call) for calls in importances.values() for call in calls if call.ndim > 1}
    found = {}
    for path, calls in importances.items():
        merged = torch.cat([call.reshape(len(call), -1, call.shape[-1]) for call in calls], 1).amax(1) > 0
        # A site whose rows belong to no single input (positions, say) is active for all inputs alike.
        found[path] = merged if len(merged) == max(inputs) else merged.any(0).expand(max(inputs), -1)
    return found


def _merged(
    groups: list[list[Member]], patterns: Tensor, rank: Tensor, numbers: Tensor, tolerance: float
) -> tuple[list[list[Member]], list[float]]:
    n_inputs = patterns.shape[1]
    together = patterns @ patterns.T / n_inputs
    while len(groups) > 1:
        f = together.diagonal()
        own = _costs(f, rank, numbers, n_inputs, tolerance)
        either = (f[:, None] + f[None, :] - together).clamp(0, 1)
        joint = _costs(either, rank[:, None] + rank, numbers[:, None] + numbers, n_inputs, tolerance)
        saving = own[:, None] + own[None, :] - joint
        saving.fill_diagonal_(-torch.inf)
        best = int(saving.argmax())
        i, j = sorted(divmod(best, len(groups)))
        if saving[i, j] <= 0:
            break
        patterns[i] = torch.maximum(patterns[i], patterns[j])
        rank[i] += rank[j]
        numbers[i] += numbers[j]
        keep = torch.arange(len(groups)) != j
        patterns, rank, numbers = patterns[keep], rank[keep], numbers[keep]
        together = together[keep][:, keep]
        together[i] = together[:, i] = patterns @ patterns[i] / n_inputs
        groups = [*groups[:i], groups[i] + groups[j], *groups[i + 1 : j], *groups[j + 1 :]]
    return groups, together.diagonal().tolist()


def circuit(decomposition: "Decomposition", members: Sequence[Member], frequency: float) -> Circuit:
    """A circuit with its weights and its price."""
    weights: dict[str, Tensor] = {}
    rank = numbers = 0.0
    for path, index in members:
        pieces = decomposition.parts[path].pieces
        part = pieces.weight(index)
        weights[path] = weights[path] + part if path in weights else part
        own = int((pieces.owner == index).sum())
        rank, numbers = rank + own, numbers + own * sum(part.shape)
    n = decomposition.ledger.n_inputs
    sizes = [torch.tensor(x, dtype=torch.float64) for x in (frequency, rank, numbers)]
    bits = float(_costs(sizes[0], sizes[1], sizes[2], n, decomposition.tolerance))
    return Circuit(tuple(members), weights, frequency, bits)
