"""Edits: copies of the target with components removed, scaled or rewritten in the weights themselves."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weightdecomp._circuits import Circuit, Member
from weightdecomp._sites import put_weight

if TYPE_CHECKING:
    from weightdecomp._decomposition import Decomposition

Selection = Member | Circuit


def edited(
    decomposition: "Decomposition",
    remove: Sequence[Selection],
    scale: Mapping[Selection, float],
    write: Mapping[Member, Tensor],
) -> nn.Module:
    """A copy of the target whose weights have the changes added; see `Decomposition.edit`."""
    changes: dict[str, Tensor] = {}
    named: set[Member] = set()

    def add(member: Member, change: Tensor) -> None:
        if member in named:
            raise ValueError(f"component {member} is edited twice; name it in one of remove, scale and write")
        named.add(member)
        path = member[0]
        changes[path] = changes[path] + change if path in changes else change

    for factor, selection in [(0.0, one) for one in remove] + [(factor, one) for one, factor in scale.items()]:
        for path, index in _members(selection):
            decomposition.component(path, index)
            if not math.isfinite(factor):
                raise ValueError(f"the factor for {(path, index)} is {factor}, expected a finite number")
            add((path, index), (factor - 1) * decomposition.parts[path].pieces.weight(index))
    for member, vector in write.items():
        add(member, _rewritten(decomposition, member, vector))
    return _with_changes(decomposition, changes)


def _members(selection: Selection) -> Iterator[Member]:
    if isinstance(selection, Circuit):
        yield from selection.members
    elif isinstance(selection, tuple) and len(selection) == 2:
        yield selection
    else:
        raise TypeError(f"expected a circuit or a pair (site, index), got {selection!r}")


def _rewritten(decomposition: "Decomposition", member: Member, vector: Tensor) -> Tensor:
    component = decomposition.component(*member)
    if len(component.left) != 1:
        raise ValueError(
            f"component {member} has rank {len(component.left)}; only rank-one components can be rewritten"
        )
    vector = torch.as_tensor(vector, dtype=component.left.dtype, device=component.left.device)
    if vector.shape != component.left[0].shape:
        expected = tuple(component.left[0].shape)
        raise ValueError(f"the vector for {member} has shape {tuple(vector.shape)}, expected {expected}")
    if not torch.isfinite(vector).all():
        raise ValueError(f"the vector for {member} contains NaN or infinity")
    return torch.outer(vector - component.left[0], component.right[0])


def _with_changes(decomposition: "Decomposition", changes: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(decomposition.target)
    for path, change in changes.items():
        site = decomposition.site(path)
        put_weight(model, site, site.matrix() + change)
    return model
