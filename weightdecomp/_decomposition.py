"""The result of a run: the target's weights as components with gates, and every question one can ask of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._attack import Ablation
from weightdecomp._batches import Batch, read_batches, size
from weightdecomp._check import unreadable_named
from weightdecomp._circuits import Circuit, Member, circuit
from weightdecomp._config import Config
from weightdecomp._cost import Cost
from weightdecomp._divergence import Divergence
from weightdecomp._edit import Selection, edited
from weightdecomp._forward import Masks, Record, inner_activations, masked, recorded
from weightdecomp._ledger import Ledger
from weightdecomp._made import Made
from weightdecomp._pieces import Pieces
from weightdecomp._sites import Site, Skipped
from weightdecomp._summary import summary
from weightdecomp._trade import opened

if TYPE_CHECKING:
    from weightdecomp._verify import Verification

_ROUNDING = 1e-5  # a remainder whose norm is below this share of W's is rounding


@dataclass(frozen=True, eq=False)
class Component:
    """One component: a low-rank part of one site's matrix.

    Attributes:
        site: Module path of the site.
        index: Number of the component at its site.
        weight: Its part of the weight, in the layout of the module's own parameter.
        left: What it writes, one row a piece; only left^T right is free of gauge.
        right: What it reads, one row a piece.
        frequency: Share of the run's inputs (or positions) on which it is active.
        thresholds: Sizes of its contribution beyond which its gate opens, on the positive and the negative arm.
    """

    site: str
    index: int
    weight: Tensor
    left: Float[Tensor, "piece d_out"]
    right: Float[Tensor, "piece d_in"]
    frequency: float
    thresholds: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Parts:
    """One site's components with their gates, and what the run measured of them.

    Attributes:
        pieces: The components.
        thresholds: Size of the contribution beyond which each arm of each gate opens.
        frequencies: Share of the run's inputs (or positions) on which each component is active.
        start: Name of the start that the ledger chose.
    """

    pieces: Pieces
    thresholds: Float[Tensor, "arm=2 component"]
    frequencies: Float[Tensor, " component"]
    start: str


@dataclass(frozen=True)
class Outcome:
    """What the run measured of its own result.

    Attributes:
        converged: Whether the adversarial damage met the tolerance.
        reason: The damage, the attack budget and the tolerance, in words.
        damage: Adversarial damage found by the run's own attack.
        compresses: Whether the components cost clearly less per bit of behaviour than those of random weights.
        verdict: That finding in words.
        effort: Bits of the starts per bit of the behaviour that the weights make.
        null_effort: The same for weights of the same norms in random directions; None where these do nothing at all.
        ledger: Bits of the run's sample.
        dense_bits: Bits per input with every rank of every site always active.
        steps: Refinement steps that were kept.
        cost: Of the run, all its parts if it was resumed, which is no part of what outcomes are compared by; None
            where the components were given.
        made: From what; None where the components were given.
    """

    converged: bool
    reason: str
    damage: float
    compresses: bool
    verdict: str
    effort: float
    null_effort: float | None
    ledger: Ledger
    dense_bits: float
    steps: int
    cost: Cost | None = field(default=None, compare=False)
    made: Made | None = None


class Decomposition:
    """The weights of a target as components with gates.

    Nothing here changes the target. Components and remainder sum to each weight exactly (F1).

    Attributes:
        target: The decomposed model, as it was given.
        sites: Decomposed sites, in the model's own order.
        skipped: Every parameter that was not decomposed, with the reason.
        parts: Per site, the components, their gates and their frequencies.
        divergence: How outputs are compared, and why so.
        tolerance: Largest adversarial damage the run was asked for.
        config: Settings of the run.
        outcome: What the run measured of its own result.
        circuits: Components grouped across sites by the ledger; they partition all components.
    """

    def __init__(
        self,
        target: nn.Module,
        sites: Sequence[Site],
        skipped: Sequence[Skipped],
        parts: Mapping[str, Parts],
        divergence: Divergence,
        tolerance: float,
        config: Config,
        outcome: Outcome,
        groups: Sequence[Sequence[Member]],
        group_frequencies: Sequence[float],
    ) -> None:
        """Bind parts to their target; `decompose` and `load` are the doorways."""
        self.target, self.sites, self.skipped = target, tuple(sites), tuple(skipped)
        self.parts, self.divergence = dict(parts), divergence
        self.tolerance, self.config, self.outcome = tolerance, config, outcome
        self.groups = tuple(tuple(group) for group in groups)
        self.group_frequencies = tuple(group_frequencies)

    def __str__(self) -> str:
        """A table of sites, and the run's own findings."""
        return summary(self)

    __repr__ = __str__

    @property
    def converged(self) -> bool:
        """Whether the run met its tolerance; `outcome.reason` says with what damage and attack."""
        return self.outcome.converged

    @property
    def ledger(self) -> Ledger:
        """Bits of the run's sample inputs, by part."""
        return self.outcome.ledger

    def site(self, path: str) -> Site:
        """The site at a module path.

        Raises:
            ValueError: If no site is there, naming those that are.
        """
        for site in self.sites:
            if site.path == path:
                return site
        raise ValueError(f"no site at {path!r}; the sites are {[site.path for site in self.sites]}")

    @cached_property
    def remainders(self) -> dict[str, Float[Tensor, "d_out d_in"]]:
        """What the components of each site do not sum to."""
        return {site.path: site.matrix() - self.parts[site.path].pieces.total() for site in self.sites}

    def ablation(self) -> Ablation:
        """All that a masked forward pass needs; remainders beyond rounding are part of it."""
        real = {
            site.path: self.remainders[site.path]
            for site in self.sites
            if self.remainders[site.path].norm() > _ROUNDING * site.matrix().norm()
        }
        pieces = {path: parts.pieces for path, parts in self.parts.items()}
        return Ablation(self.target, self.sites, pieces, self.divergence, real)

    def gates_on(self, record: Record) -> Masks:
        """Importances per site and call, from what the target's sites were called with."""
        found = {}
        for site in self.sites:
            parts = self.parts[site.path]
            found[site.path] = [
                opened(parts.pieces.activations(inner), parts.thresholds)
                for inner in inner_activations(record, site, parts.pieces)
            ]
        return found

    def read(self, batches: Iterable[Batch]) -> list[Batch]:
        """Checked batches.

        Raises:
            ValueError: For empty batches, NaN or infinity, or another device than the model's.
        """
        return read_batches(batches, self.target)

    @torch.no_grad()
    def importances(self, inputs: Batch) -> dict[str, Float[Tensor, "*batch component"]]:
        """How far each component must stay on, in [0, 1], on the given inputs.

        Args:
            inputs: One batch, as the model takes it.

        Returns:
            Per site, the site's own leading shape and the component. Convolutions have flattened output positions;
            a module that is called k times in one forward pass has a leading axis of size k.
        """
        (batch,) = self.read([inputs])
        with unreadable_named(self.target, [batch], "inputs"):
            found = self.gates_on(recorded(self.target, batch, self.sites))
        return {path: calls[0] if len(calls) == 1 else torch.stack(list(calls)) for path, calls in found.items()}

    def ablate(
        self, inputs: Batch, keep: Mapping[str, Tensor] | Circuit | Sequence[Circuit], remainder: bool = False
    ) -> Any:
        """The target's output with only the given components on.

        Args:
            inputs: One batch, as the model takes it.
            keep: Per site a mask in [0, 1], in the importances' shape or one that broadcasts to it (sites that are not
                named are off), or circuits, whose components are on everywhere.
            remainder: Keep what the components do not sum to.

        Returns:
            What the model returns.

        Raises:
            ValueError: For masks of unknown sites, of a wrong size or outside [0, 1].
        """
        (batch,) = self.read([inputs])
        masks = self._checked_masks(keep)
        left = {path: (matrix, torch.ones_like(matrix[0, 0])) for path, matrix in self.remainders.items()}
        pieces = {path: parts.pieces for path, parts in self.parts.items()}
        with unreadable_named(self.target, [batch], "inputs"):
            self._check_leading(masks, batch)
            return masked(self.target, batch, self.sites, pieces, masks, left if remainder else None)

    def _checked_masks(self, keep: Mapping[str, Tensor] | Circuit | Sequence[Circuit]) -> Masks:
        if isinstance(keep, Circuit):
            keep = [keep]
        if not isinstance(keep, Mapping):
            keep = self._members_mask({member for one in keep for member in one.members})
        masks = {}
        for path in keep:
            self.site(path)
        for site in self.sites:
            own = self.parts[site.path].pieces
            mask = keep[site.path] if site.path in keep else torch.zeros(own.n)
            mask = torch.as_tensor(mask, dtype=own.v.dtype, device=own.v.device)
            if mask.ndim == 0 or mask.shape[-1] != own.n:
                raise ValueError(f"mask of {site.path!r} has shape {tuple(mask.shape)}, expected (..., {own.n})")
            if not ((mask >= 0) & (mask <= 1)).all():
                raise ValueError(f"mask of {site.path!r} has entries outside [0, 1]")
            several = site.n_calls > 1 and mask.ndim > 1
            if several and len(mask) != site.n_calls:
                raise ValueError(
                    f"mask of {site.path!r} has {len(mask)} calls on its first axis, expected {site.n_calls}; "
                    "a module that runs several times needs one mask a call, or one vector for all"
                )
            masks[site.path] = list(mask) if several else [mask] * site.n_calls
        return masks

    def _check_leading(self, masks: Masks, batch: Batch) -> None:
        """Refuse masks that do not broadcast to what their sites compute."""
        if all(mask.ndim == 1 for calls in masks.values() for mask in calls):
            return
        operands = recorded(self.target, batch, self.sites).operands
        for site in self.sites:
            for mask, call in zip(masks[site.path], operands[site.path], strict=True):
                rows = site.read(call, self.parts[site.path].pieces.v[:1]).shape[:-1]
                fits = mask.ndim <= len(rows) + 1 and all(
                    a in (1, b) for a, b in zip(reversed(mask.shape[:-1]), reversed(rows), strict=False)
                )
                if not fits:
                    raise ValueError(
                        f"mask of {site.path!r} has shape {tuple(mask.shape)}, expected {(*rows, mask.shape[-1])} or "
                        "one that broadcasts to it"
                    )

    def _members_mask(self, members: set[Member]) -> dict[str, Tensor]:
        masks = {path: torch.zeros(parts.pieces.n) for path, parts in self.parts.items()}
        for path, index in members:
            self.component(path, index)
            masks[path][index] = 1
        return masks

    def component(self, site: str, index: int) -> Component:
        """One component.

        Raises:
            ValueError: If there is no such site or component.
        """
        parts, place = self.parts[self.site(site).path], self.site(site)
        if not 0 <= index < parts.pieces.n:
            raise ValueError(f"{site!r} has components 0 to {parts.pieces.n - 1}, got {index}")
        own = parts.pieces.owner == index
        positive, negative = (float(arm[index]) for arm in parts.thresholds)
        return Component(
            site=site,
            index=index,
            weight=place.as_weight(parts.pieces.weight(index)),
            left=parts.pieces.u[own],
            right=parts.pieces.v[own],
            frequency=float(parts.frequencies[index]),
            thresholds=(positive, negative),
        )

    @torch.no_grad()
    def top_inputs(self, site: str, index: int, batches: Iterable[Batch], n: int = 10) -> list[tuple[int, float]]:
        """The inputs that drive a component most: (number of the input in the batches, contribution), largest first.

        Raises:
            ValueError: If there is no such site or component, or for bad batches.
        """
        self.component(site, index)
        place, own = self.site(site), self.parts[site].pieces
        found, offset = [], 0
        for batch in self.read(batches):
            calls, inputs = [], size(batch)
            for inner in inner_activations(recorded(self.target, batch, [place]), place, own):
                a = own.activations(inner)[..., index]
                # Rows that no single input owns (positions, say) drive the component alike on all inputs.
                calls.append(a.reshape(inputs, -1) if len(a) == inputs else a.reshape(1, -1).expand(inputs, -1))
            everywhere = torch.cat(calls, 1)
            peaks = everywhere.gather(1, everywhere.abs().argmax(1, keepdim=True))[:, 0]
            found += [(offset + i, float(x)) for i, x in enumerate(peaks)]
            offset += inputs
        return sorted(found, key=lambda pair: -abs(pair[1]))[:n]

    @cached_property
    def circuits(self) -> tuple[Circuit, ...]:
        """Components grouped across sites by the ledger, most frequent first; they partition all components."""
        return tuple(
            circuit(self, members, frequency)
            for members, frequency in zip(self.groups, self.group_frequencies, strict=True)
        )

    def verify(self, batches: Iterable[Batch], **options: Any) -> "Verification":
        """Damage by regime and attack budget, sizes, bits and nulls on the given inputs; see `verification`.

        Args:
            batches: Inputs, best ones that the run has not seen.
            **options: `steps`, `restarts`, `inputs`, `nulls`, `bound`, `seed`, `on_progress`.

        Returns:
            Every figure with its kind of evidence and attack budget.
        """
        from weightdecomp._verify import verification

        read = self.read(batches)
        with unreadable_named(self.target, read):
            return verification(self, read, **options)

    def edit(
        self,
        remove: Sequence[Selection] = (),
        scale: Mapping[Selection, float] | None = None,
        write: Mapping[Member, Tensor] | None = None,
    ) -> nn.Module:
        """A copy of the target whose weights really changed.

        Args:
            remove: Components `(site, index)` or circuits to take out of the weights.
            scale: Components or circuits with the factor to multiply them by.
            write: Components with what their pieces shall write instead, in the shape of `component.left`; one vector
                will do for rank one. A circuit is rewritten component by component.

        Returns:
            The edited copy; the target stays as it is. Tied weights are untied where only one use is edited.

        Raises:
            ValueError: For unknown components, vectors of a wrong size, or a component that is edited twice.
        """
        return edited(self, remove, scale or {}, write or {})

    def save(self, directory: str | Path) -> None:
        """Write the decomposition to a folder: safetensors and JSON, whole or not at all.

        Raises:
            ValueError: If the folder holds something else.
            OSError: If it cannot be written; what was there before stays.
        """
        from weightdecomp._save import save

        save(self, Path(directory))
