"""Edits: copies of the target with components removed, scaled or rewritten in the weights themselves."""

import copy
import math
import operator
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
        for path, index in members_of(selection):
            decomposition.component(path, index)
            if not math.isfinite(factor):
                raise ValueError(f"the factor for {(path, index)} is {factor}, expected a finite number")
            add((path, index), (factor - 1) * decomposition.parts[path].pieces.weight(index))
    for member, vector in ((_member(one), vector) for one, vector in write.items()):
        add(member, _rewritten(decomposition, member, vector))
    return _with_changes(decomposition, changes)


def members_of(selection: Selection) -> Iterator[Member]:
    """The components of a selection.

    Raises:
        TypeError: For something that is neither a circuit nor a pair.
    """
    if isinstance(selection, Circuit):
        yield from selection.members
    else:
        yield _member(selection)


def _member(selection: object) -> Member:
    """A pair with a plain number, so that one component has one name whatever kind of integer it came as."""
    match selection:
        case (str() as path, index) if hasattr(index, "__index__") and not isinstance(index, bool):
            return path, operator.index(index)
    raise TypeError(f"expected a circuit or a pair (site, index) of a text and an integer, got {selection!r}")


def _rewritten(decomposition: "Decomposition", member: Member, vector: Tensor) -> Tensor:
    """What changes in the weight when each piece of a component writes a new vector on what it reads."""
    component = decomposition.component(*member)
    left = component.left
    vector = torch.as_tensor(vector, dtype=left.dtype, device=left.device)
    if vector.ndim == 1:
        vector = vector[None]
    if vector.shape != left.shape:
        given, expected = tuple(vector.shape), tuple(left.shape)
        raise ValueError(
            f"the vectors for {member} have shape {given}, expected {expected}: one row for each row of its .left"
        )
    if not torch.isfinite(vector).all():
        raise ValueError(f"the vectors for {member} contain NaN or infinity")
    return (vector - left).T @ component.right


def _with_changes(decomposition: "Decomposition", changes: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(decomposition.target)
    for path, change in changes.items():
        site = decomposition.site(path)
        matrix = site.matrix() + change
        if not torch.isfinite(matrix).all():
            raise ValueError(f"the edit of {path!r} is too large for its weights, which are {matrix.dtype}")
        put_weight(model, site, matrix)
    return model
