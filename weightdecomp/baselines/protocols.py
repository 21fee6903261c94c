"""Protocols: the target run through a method's units, in one way for every method.

- *matched*: one site at a time is replaced, the others stay as in the target; the mean over sites.
- *clean*: all sites are replaced at once, every code is read from the target's own run.
- *propagating*: all sites are replaced at once, every code is read from what the replaced model computes.
- *adversarial*: all sites are replaced; which units are on is fixed by the target's own run, units that are off and
  what the units do not explain are put back by shares in [0, 1] that an attack chooses, shared across inputs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, call
from weightdecomp._climb import GAIN, Climb
from weightdecomp._divergence import Divergence
from weightdecomp._forward import Operands, recorded, replaced
from weightdecomp._sites import Site
from weightdecomp.baselines._bank import Bank, Fitted, offset_of

Masks = dict[int, list[Tensor]]  # per bank, one (..., unit) tensor for each call
PATIENCE = 40  # attack steps without improvement after which a search is over


class Inner(NamedTuple):
    """Inner activations and importances of one bank in one call."""

    inner: Float[Tensor, "*batch piece"]
    importance: Float[Tensor, "*batch unit"]


class Pass:
    """Stands in for the sites in one forward pass and keeps what the banks computed.

    Output rows of a written site are `sum (inner * mask) writes + offsets + rest * (W x - sum inner writes - offsets)`.

    Attributes:
        codes: Per bank and call, what it computed.
    """

    def __init__(
        self,
        fitted: Fitted,
        *,
        only: Collection[str] | None = None,
        mask: Callable[[int, int, Inner], Tensor] | None = None,
        rest: Mapping[str, Tensor | float] | None = None,
        clean: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """Prepare a pass.

        Args:
            fitted: The units.
            only: Sites to replace; None: all that are written.
            mask: Of a bank's number, the call and its codes, the mask over units; None: the importances.
            rest: Per site the share of what the units do not explain; 0 where a site is missing.
            clean: Input rows of the target's own run, for banks that read ahead.
        """
        self.fitted, self.mask, self.rest, self.clean = fitted, mask, rest or {}, clean
        self.only = set(fitted.written if only is None else only)
        self.rows: dict[str, list[Tensor]] = {site.path: [] for site in fitted.sites}
        self.codes: Masks = {}
        self.found: dict[tuple[int, int], Inner] = {}

    def __call__(self, site: Site, index: int, operands: Operands) -> Any:
        """One call of one site."""
        path = site.path
        self.rows[path].append(site.vectors(operands))
        if path not in self.only:
            return site.write(site.read(operands, site.matrix()), operands)
        written: Tensor | float = 0.0
        whole: Tensor | float = 0.0
        for number, bank in enumerate(self.fitted.banks):
            if path not in bank.writes:
                continue
            found = self.code(number, index)
            mask = found.importance if self.mask is None else self.mask(number, index, found)
            written = written + (found.inner * bank.per_piece(mask)) @ bank.writes[path] + offset_of(bank, path)
            if path in self.rest:
                whole = whole + found.inner @ bank.writes[path] + offset_of(bank, path)
        if path in self.rest:
            written = written + self.rest[path] * (site.read(operands, site.matrix()) - whole)
        assert isinstance(written, Tensor)
        return site.write(written, operands)

    def code(self, number: int, index: int) -> Inner:
        """Codes of one bank, made once a call."""
        if (number, index) not in self.found:
            bank = self.fitted.banks[number]
            known = [self.rows[p][index] if len(self.rows[p]) > index else None for p in bank.reads]
            if any(x is None for x in known):
                assert self.clean is not None, "a bank that reads ahead needs the target's own rows"
                known = [self.clean[p][index] for p in bank.reads]
            rows = torch.cat([x for x in known if x is not None], -1)
            inner = bank.encode(rows)
            self.found[number, index] = Inner(inner, bank.importances(inner))
        return self.found[number, index]


class Trial(NamedTuple):
    """A model with inputs that methods are scored on.

    Attributes:
        model: The target.
        batch: The inputs.
        sites: All sites that are compared on.
        divergence: How outputs are compared.
        output: The target's own output.
        nothing: Mean divergence with every site's rows at zero: the unit of damage.
    """

    model: nn.Module
    batch: Batch
    sites: Sequence[Site]
    divergence: Divergence
    output: Any
    nothing: float


@torch.no_grad()
def trial(model: nn.Module, batch: Batch, sites: Sequence[Site], divergence: Divergence) -> Trial:
    """Run the target, and run it with every site ablated.

    Raises:
        ValueError: If ablating every site changes nothing, so that damage has no unit.
    """
    output = call(model, batch)
    nothing = float(divergence(without_sites(model, batch, sites), output).double().mean())
    if not 0 < nothing < torch.inf:
        raise ValueError(
            f"ablating every site gives a divergence of {nothing} on the given batches, so that damage has no unit; "
            "pass inputs on which the decomposed weights matter"
        )
    return Trial(model, batch, sites, divergence, output, nothing)


@torch.no_grad()
def without_sites(model: nn.Module, batch: Batch, sites: Sequence[Site]) -> Any:
    """The output with every site's rows at zero."""
    with replaced(sites, lambda site, _, operands: site.write(0 * site.read(operands, site.matrix()), operands)):
        return call(model, batch)


def _run(on: Trial, step: Pass) -> Any:
    with replaced(on.sites, step):
        return call(on.model, on.batch)


def _clean(on: Trial, fitted: Fitted) -> dict[str, list[Tensor]] | None:
    """The target's own input rows, where some bank needs them."""
    if not fitted.reads_ahead:
        return None
    operands = recorded(on.model, on.batch, on.sites).operands
    return {site.path: [site.vectors(one) for one in operands[site.path]] for site in on.sites}


@torch.no_grad()
def replaced_output(on: Trial, fitted: Fitted, only: Collection[str] | None = None) -> Any:
    """The target's output with sites' rows made from the units, their codes read from the replaced model.

    Args:
        on: Model and inputs.
        fitted: The units.
        only: Sites to replace; None: all that the method writes.
    """
    return _run(on, Pass(fitted, only=only, clean=_clean(on, fitted)))


@torch.no_grad()
def codes(on: Trial, fitted: Fitted) -> dict[tuple[int, int], Inner]:
    """Every bank's inner activations and importances on the target's own run, by (bank, call)."""
    operands = recorded(on.model, on.batch, on.sites).operands
    step = Pass(fitted)
    step.rows = {site.path: [site.vectors(one) for one in operands[site.path]] for site in on.sites}
    for number, bank in enumerate(fitted.banks):
        for index in range(len(step.rows[bank.reads[0]])):
            step.code(number, index)
    return step.found


@torch.no_grad()
def ablated_output(on: Trial, fitted: Fitted, units: Mapping[int, Sequence[int]]) -> Any:
    """The target's output with some units taken out and all else, the unexplained rest included, in place.

    Args:
        on: Model and inputs.
        fitted: The units.
        units: Per bank, the numbers of the units to take out.
    """
    pieces = {number: _pieces_of(fitted.banks[number], own) for number, own in units.items() if len(own)}
    step = Pass(fitted, clean=_clean(on, fitted))

    def forward(site: Site, index: int, operands: Operands) -> Any:
        # With all else in place a site's rows are W x less what the units write, so that only their banks are encoded.
        step.rows[site.path].append(site.vectors(operands))
        written = site.read(operands, site.matrix())
        for number, own in pieces.items():
            if site.path in fitted.banks[number].writes:
                inner = step.code(number, index).inner[..., own]
                written = written - inner @ fitted.banks[number].writes[site.path][own]
        return site.write(written, operands)

    with replaced(on.sites, forward):
        return call(on.model, on.batch)


def _pieces_of(bank: Bank, units: Sequence[int]) -> Tensor:
    """The numbers of the pieces of some units."""
    own = torch.tensor(list(units), device=bank.numbers.device)
    return own if bank.owner is None else torch.isin(bank.owner, own.to(bank.owner)).nonzero().flatten()


@torch.no_grad()
def matched(on: Trial, fitted: Fitted) -> float:
    """Mean divergence with one site replaced at a time, the mean over sites."""
    found = [on.divergence(replaced_output(on, fitted, [path]), on.output).double().mean() for path in fitted.written]
    return float(torch.stack(found).mean())


@torch.no_grad()
def clean(on: Trial, fitted: Fitted) -> float:
    """Mean divergence with all sites replaced at once by what their units make of the target's own inputs."""
    step = Pass(fitted)
    step.found = codes(on, fitted)
    return float(on.divergence(_run(on, step), on.output).double().mean())


@torch.no_grad()
def propagating(on: Trial, fitted: Fitted) -> float:
    """Mean divergence with all sites replaced at once."""
    return float(on.divergence(replaced_output(on, fitted), on.output).double().mean())


def adversarial(
    on: Trial,
    fitted: Fitted,
    steps: int,
    rng: torch.Generator,
    on_step: Callable[[], None] | None = None,
    restarts: int = 3,
) -> float:
    """Mean divergence of the worst shares found for units that are off and for what is unexplained.

    A lower bound of the worst case: a counterexample, found by the same climb that attacks decompositions.

    Args:
        on: Model and inputs.
        fitted: The units.
        steps: Budget of every restart.
        rng: Of starts and choices.
        on_step: Called after every step.
        restarts: Searches in turn.
    """
    clean = _clean(on, fitted)
    importances = {key: one.importance for key, one in codes(on, fitted).items()}
    widths = [bank.n for bank in fitted.banks]
    width = sum(widths) + len(fitted.written)
    like = next(iter(importances.values()))
    climb, best, since = Climb(restarts, 1, width, like, rng), -1.0, 0
    for _ in range(steps + 1):
        values, slopes = [], []
        for source in climb.sources[:, 0]:
            value, slope = _sourced(on, fitted, importances, source, widths, clean)
            values.append(value)
            slopes.append(slope)
        climb.step(torch.stack(values)[:, None], torch.stack(slopes)[:, None])
        top = float(climb.best.max())
        since, best = (0, top) if top > best * (1 + GAIN) else (since + 1, best)
        if on_step is not None:
            on_step()
        if since == PATIENCE:
            break
    return float(climb.best.max())


def _sourced(
    on: Trial,
    fitted: Fitted,
    importances: Mapping[tuple[int, int], Tensor],
    source: Float[Tensor, " source"],
    widths: Sequence[int],
    clean: Mapping[str, Sequence[Tensor]] | None,
) -> tuple[Tensor, Tensor]:
    """Mean divergence under sources, and its gradient."""
    leaf = source.detach().requires_grad_()
    *own, rest = leaf.split([*widths, len(fitted.written)])

    def mask(number: int, index: int, _: Inner) -> Tensor:
        on_there = importances[number, index]
        return on_there + (1 - on_there) * own[number]

    shares = dict(zip(fitted.written, rest, strict=True))
    with torch.enable_grad():
        output = _run(on, Pass(fitted, mask=mask, rest=shares, clean=clean))
        value = on.divergence(output, on.output).mean()
        slope = torch.autograd.grad(value, leaf, materialize_grads=True)[0] if value.requires_grad else leaf * 0
    return value.detach(), slope
