"""What edits do: the effect where it is wanted and the damage where it is not, on inputs of either kind."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, call, read_batches, unpadded
from weightdecomp._check import check_module, scores_ids
from weightdecomp._divergence import Divergence, choose, output_tensor
from weightdecomp._sites import no_fast_path
from weightdecomp._verification import _plain, _table


@dataclass(frozen=True)
class Change:
    """How far an edited model is from the original on one kind of inputs.

    Attributes:
        inputs: Number of inputs.
        mean: Mean divergence per input from the original's output, over an input's positions first.
        error: Standard error of that mean; None for a single input.
        worst: Largest divergence of one input.
        flipped: Share of outputs whose largest entry is another one; None where outputs are not logits.
    """

    inputs: int
    mean: float
    error: float | None
    worst: float
    flipped: float | None


@dataclass(frozen=True)
class EditRow:
    """One edited model.

    Attributes:
        name: As the caller named it.
        on_target: Its effect where the edit is meant to change something.
        off_target: Its damage where nothing should change.
    """

    name: str
    on_target: Change
    off_target: Change


@dataclass(frozen=True)
class EditReport:
    """Edited models beside one another on the same inputs; it prints itself as a table.

    Attributes:
        rows: One a model.
        divergence: Name of the divergence: "kl" in nats, "mse" in squared output units, or the user's own.
    """

    rows: tuple[EditRow, ...]
    divergence: str

    def row(self, name: str) -> EditRow:
        """One model's row.

        Raises:
            ValueError: If no model has that name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"no edit is named {name!r}; the edits are {[row.name for row in self.rows]}")

    def __str__(self) -> str:
        """The table."""
        logits = self.divergence == "kl"
        unit = {"mse": "squared output units", "kl": "nats"}.get(self.divergence, "its own units")
        first = self.rows[0]
        counts = f"{first.on_target.inputs:,} on-target and {first.off_target.inputs:,} off-target inputs"
        heads = ["effect", "worst", *["flipped"] * logits, "damage", "worst", *["flipped"] * logits]
        lines = [[row.name, *_cells(row.on_target), *_cells(row.off_target)] for row in self.rows]
        head = f"Divergence from the original ({self.divergence}, {unit}) on {counts}: mean +- standard error"
        return f"{head}\n\n{_table([['edit', *heads], *lines])}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _plain(asdict(self))


def edit_report(
    original: nn.Module,
    edited: nn.Module | Mapping[str, nn.Module],
    on_target: Iterable[Batch],
    off_target: Iterable[Batch],
    divergence: str | Callable[[Any, Any], Tensor] = "auto",
) -> EditReport:
    """How much edits change a model where they should, and where they should not.

    Args:
        original: The model before.
        edited: The model after, or several by name: edits, fine-tuned models, nulls.
        on_target: Inputs that the edit is meant for, best ones that it was not made on.
        off_target: Inputs on which nothing should change, likewise.
        divergence: As in `decompose`.

    Returns:
        Effect and damage of every model on the same inputs.

    Raises:
        ValueError: For no edited model, bad batches, or an unknown divergence.
        TypeError: For batches of a wrong kind, or models that are no modules.
    """
    check_module(original)
    models = {"edited": edited} if isinstance(edited, nn.Module) else dict(edited)
    if not models:
        raise ValueError("edited is empty; pass an edited model, or several by name")
    kinds = [read_batches(batches, original) for batches in (on_target, off_target)]
    with torch.no_grad(), no_fast_path():
        before = [[call(original, batch) for batch in batches] for batches in kinds]
        metric = choose(divergence, before[0][0], scores_ids(original, kinds[0][0]))
        rows = []
        for name, model in models.items():
            on, off = (_change(model, metric, *kind) for kind in zip(kinds, before, strict=True))
            rows.append(EditRow(name, on, off))
    return EditReport(tuple(rows), metric.name)


def _change(model: nn.Module, metric: Divergence, batches: Sequence[Batch], before: Sequence[Any]) -> Change:
    check_module(model)
    divergences, flips = [], []
    for batch, target in zip(batches, before, strict=True):
        output = call(model, batch)
        found = metric(output, target)
        flipped, held = output_tensor(output).argmax(-1) != output_tensor(target).argmax(-1), unpadded(batch)
        if held is not None and held.shape == found.shape:
            found = found.where(held, 0) * held.numel() / len(held) / held.sum(1, keepdim=True)
            flipped = flipped[held]
        divergences.append(found.reshape(len(found), -1).double().mean(1))
        flips.append(flipped.flatten())
    each = torch.cat(divergences)
    return Change(
        inputs=len(each),
        mean=float(each.mean()),
        error=_standard_error(each),
        worst=float(each.max()),
        flipped=float(torch.cat(flips).double().mean()) if metric.name == "kl" else None,
    )


def _standard_error(each: Float[Tensor, " input"]) -> float | None:
    return float(each.std() / len(each) ** 0.5) if len(each) > 1 else None


def _cells(change: Change) -> list[str]:
    error = "" if change.error is None else f" +- {change.error:.1g}"
    flipped = [] if change.flipped is None else [f"{change.flipped:.1%}"]
    return [f"{change.mean:.4f}{error}", f"{change.worst:.3f}", *flipped]
