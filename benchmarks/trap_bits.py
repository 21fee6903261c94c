"""Whether an answer can be asked for: its bits beside those of other exact decompositions, all with ideal gates.

An ideal gate knows the input: a unit is open where taking it out alone changes the output by more than one level, the
highest at which all gates together stay within the tolerance. What the true shares do not sum to is paid for as well.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.trap_parts import Trap
from benchmarks.trap_run import components_of, prepared
from weightdecomp._divergence import output_tensor
from weightdecomp._ledger import Coded, summed
from weightdecomp._sites import Site
from weightdecomp._starts import Reach, column_start, row_start, svd_start
from weightdecomp.baselines import Bank, Data, Fitted, protocols
from weightdecomp.baselines._weights import components

ANSWER = "answer"
_BISECTIONS = 25


def bits(trap: Trap, seed: int, tolerance: float = 0.02, n: int = 512) -> dict[str, float]:
    """Bits per input for names and values of the answer, singular pairs, rows and columns at the trap's sites."""
    data, trial, _ = prepared(trap, seed, n, n)
    found = {ANSWER: [_answer(site, trap) for site in data.sites]}
    for name in ("svd", "rows", "columns"):
        found[name] = [_start(name, data, site) for site in data.sites]
    return {name: _ideal(trial, Fitted(name, "", data.sites, banks), tolerance) for name, banks in found.items()}


def _start(name: str, data: Data, site: Site) -> Bank:
    reach = Reach(site.matrix(), data.inputs(site.path))
    made = {"svd": svd_start, "rows": row_start, "columns": lambda one: column_start(one, site.matrix())}[name](reach)
    live = made.u.norm(dim=1) * made.v.norm(dim=1) > 0
    return components(site, made.v[live], made.u[live])


def _answer(site: Site, trap: Trap) -> Bank:
    """The true shares, and what they leave as singular pairs."""
    shares = [part[site.path] for part in trap.parts if site.path in part]
    rest = site.matrix() - torch.stack(shares).sum(0)
    left, sizes, right = torch.linalg.svd(rest, full_matrices=False)
    kept = sizes > 1e-5 * site.matrix().norm()
    pairs = zip((left * sizes).T[kept], right[kept], strict=True)
    return components_of(site, shares + [torch.outer(*pair) for pair in pairs])


@torch.no_grad()
def _ideal(trial: protocols.Trial, fitted: Fitted, tolerance: float) -> float:
    effects = [_effects(trial, fitted, number) for number in range(len(fitted.banks))]
    low, high = 0.0, max(float(one.max()) for one in effects)
    for _ in range(_BISECTIONS):
        # Effects span orders of magnitude.
        level = (max(low, 1e-9 * high) * high) ** 0.5
        low, high = (level, high) if _damage(trial, fitted, effects, level) <= tolerance else (low, level)
    groups = [
        Coded(len(one), (one > low).double().mean(0), bank.values, torch.zeros_like(bank.values))
        for one, bank in zip(effects, fitted.banks, strict=True)
    ]
    return summed(groups, len(effects[0]), tolerance, 0.0).per_input


def _effects(trial: protocols.Trial, fitted: Fitted, number: int) -> Float[Tensor, "input unit"]:
    """How far the output moves on each input when one unit of a bank is taken out."""
    output = output_tensor(trial.output)
    changes = [
        output_tensor(protocols.ablated_output(trial, fitted, {number: [unit]})) - output
        for unit in range(fitted.banks[number].n)
    ]
    return torch.stack([change.flatten(1).square().sum(1) for change in changes], 1)


def _damage(trial: protocols.Trial, fitted: Fitted, effects: Sequence[Tensor], level: float) -> float:
    def gates(open_: Tensor, bank: Bank) -> Bank:
        return replace(bank, importance=lambda inner: _spread(open_, inner))

    banks = [gates((one > level).float(), bank) for one, bank in zip(effects, fitted.banks, strict=True)]
    return protocols.propagating(trial, replace(fitted, banks=banks)) / trial.nothing


def _spread(open_: Float[Tensor, "input unit"], inner: Tensor) -> Tensor:
    """One gate an input for all positions of it."""
    middle = inner.shape[1:-1]
    return open_.reshape(len(open_), *[1] * len(middle), -1).expand(-1, *middle, -1)
