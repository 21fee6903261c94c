"""Which method's graph of a model is simplest: fewest edges, most separate modules?

The weight decomposition, every baseline and random directions are units of the same model at the same sites, and their
graphs are made and measured by the same code. Of a baseline's grid (every second setting where it is trained) the
setting counts that has the fewest active units within the tolerance, else the least damage; it is chosen with the
first seed. Random directions have as many active as the weight decomposition.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import graphs
from benchmarks import recall
from benchmarks.report import spread, table
from benchmarks.targets import ResidualTraining, make, residual_target, trained
from weightdecomp import Decomposition, NumericalWarning, baselines, decompose, digits
from weightdecomp._sites import Site
from weightdecomp.baselines import Bank, Data, Fitted, Inapplicable, Method, Training, protocols
from weightdecomp.baselines._bank import dictionary
from weightdecomp.baselines._closed import kept_largest, per_site
from weightdecomp.baselines._ours import as_fitted

OURS = "weight decomposition"
GRAPHED = 64  # inputs of a graph
STEPS = 300  # of training, for every trained method
WORKS = 0.1  # damage above which the units alone no longer do what the model does
_HELD_OUT = 256


class Case(NamedTuple):
    """One decomposed model, with inputs to fit other methods on and others to measure on."""

    decomposition: Decomposition
    fit_on: Tensor
    held_out: Tensor


class RandomDirections(NamedTuple):
    """A null: a random orthonormal basis of every site's inputs, as many directions active as are given."""

    active: Mapping[str, float]

    def fit(self, data: Data, seed: int) -> Fitted:
        """Draw the bases."""
        rng = data.generator(seed)

        def made(site: Site) -> Bank:
            d_in = site.shape[1]
            basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=rng, dtype=torch.float64)).Q.to(site.dtype)
            bank = dictionary(site, lambda x: x @ basis.T, basis, basis.new_zeros(d_in), numbers=d_in)
            inner = bank.encode(data.inputs(site.path))
            share = min(1.0, self.active[site.path] / d_in)
            return replace(bank, importance=kept_largest(inner, bank.writes[site.path], share))

        return per_site(data, "random directions", "as many active", made)


# ------------------------------------------------------------ the models


def of_digits(seed: int, smoke: bool) -> Case:
    """The classifier of digits; only the decomposition and the fits depend on the seed."""
    batches = [digits.batches("train")[0][:64]] if smoke else digits.batches("train")
    return _case(digits.model(), batches, torch.cat(digits.batches("test")), seed, "kl")


def of_superposition(seed: int, smoke: bool) -> Case:
    """The toy model of superposition, 40 features in 10 dimensions."""
    target = make("tms_40_10", seed, **({"cache": None, "steps": 5} if smoke else {}))
    inputs = torch.cat(target.batches(_HELD_OUT, 2))
    return _case(target.model, target.batches(256 if smoke else 4096, 1), inputs, seed, "auto", list(target.mechanisms))


def of_residual(seed: int, smoke: bool) -> Case:
    """A residual MLP of two blocks, 20 features through 10 neurons each in a stream of 64."""
    training = ResidualTraining(2, 20, 10, 5 if smoke else 1000, d_embed=64, batch=1024, probability=0.05)
    target = residual_target("small residual MLP", *trained(training, seed, None), training, seed)
    inputs = torch.cat(target.batches(_HELD_OUT, 2))
    return _case(target.model, target.batches(256 if smoke else 4096, 1), inputs, seed, "auto", list(target.mechanisms))


def of_transformer(seed: int, smoke: bool) -> Case:
    """Two blocks of attention and MLP that recall what followed a token."""
    model, _ = recall.trained(seed, steps=5 if smoke else 1000)
    rng = torch.Generator().manual_seed(seed + 1)
    batches = [recall.drawn(64 if smoke else 1024, rng)[0] for _ in range(1 if smoke else 2)]
    sites = ["blocks.1.mlp_*"] if smoke else ["blocks.*"]
    return _case(model, batches, recall.drawn(_HELD_OUT, rng)[0], seed, "kl", sites)


CASES = {
    "digits": of_digits,
    "residual MLP": of_residual,
    "transformer": of_transformer,
    "TMS 40-10": of_superposition,
}


def _case(
    model: torch.nn.Module,
    batches: Sequence[Tensor],
    held_out: Tensor,
    seed: int,
    divergence: str,
    sites: Sequence[str] | None = None,
) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        found = decompose(model, batches, sites=sites, divergence=divergence, seed=seed, progress=False)
    return Case(found, torch.cat(list(batches)), held_out[:_HELD_OUT])


# ------------------------------------------------------------ the figures


def measured(name: str, seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """All figures of one model: per method their spread over seeds, or the reason why there is none."""
    found: dict[str, Any] = {}
    chosen: dict[str, Method] = {}
    for seed in seeds:
        case = CASES[name](seed, smoke)
        one = case.decomposition
        data = Data(one.target, [case.fit_on], one.sites, one.divergence, one.tolerance)
        trial = protocols.trial(one.target, case.held_out, one.sites, one.divergence)
        if not chosen:
            chosen, refused = _settings(data, trial, seed, smoke)
            found |= refused
        own = as_fitted(one)
        active = {bank.reads[0]: n for bank, n in zip(own.banks, _active(trial, own), strict=True)}
        fits = {OURS: own, "random directions": RandomDirections(active).fit(data, seed)}
        fits |= {label: method.fit(data, seed) for label, method in chosen.items()}
        for label, fitted in fits.items():
            if isinstance(found.get(label), str):
                continue
            try:
                found.setdefault(label, []).append(_figures(case, trial, fitted, smoke))
            except ValueError as error:
                found[label] = str(error)
        print(f"methods on {name}, seed {seed}", file=sys.stderr)
    ordered = [label for label in (OURS, "random directions", *baselines.NAMES) if label in found]
    return {label: found[label] if isinstance(found[label], str) else spreads(found[label]) for label in ordered}


def _settings(data: Data, trial: protocols.Trial, seed: int, smoke: bool) -> tuple[dict[str, Method], dict[str, str]]:
    """Every baseline's best setting, and the reasons of those that cannot be used."""
    chosen: dict[str, Method] = {}
    refused: dict[str, str] = {}
    for method in baselines.ALL:
        best: tuple[bool, float] | None = None
        for setting in [method] if smoke else method.grid()[:: 2 if hasattr(method, "training") else 1]:
            own = _shortened(setting, 3 if smoke else STEPS)
            try:
                fitted = own.fit(data, seed)
            except Inapplicable as error:
                refused[method.name] = str(error)
                break
            damage = protocols.propagating(trial, fitted) / trial.nothing
            within = damage <= data.tolerance
            order = not within, sum(_active(trial, fitted)) if within else damage
            if best is None or order < best:
                best, chosen[method.name] = order, own
    return chosen, {name: reason for name, reason in refused.items() if name not in chosen}


def _shortened(method: Method, steps: int) -> Method:
    if not hasattr(method, "training"):
        return method
    return replace(method, training=Training(steps=steps, batch=256))  # type: ignore[type-var]


def _active(trial: protocols.Trial, fitted: Fitted) -> list[float]:
    """Mean number of active units per row, of every bank."""
    codes = protocols.codes(trial, fitted)
    found = []
    for number in range(len(fitted.banks)):
        rows = torch.cat([one.importance.flatten(0, -2) for (bank, _), one in codes.items() if bank == number])
        found.append(float((rows > 0).sum(-1).double().mean()))
    return found


def _figures(case: Case, trial: protocols.Trial, fitted: Fitted, smoke: bool) -> dict[str, float]:
    inputs = case.held_out[:GRAPHED]
    graph = graphs.circuit_graph(case.decomposition, inputs, edges=None, units=fitted)
    through = sum(data["influence"] for _, data in graph.nodes(data=True) if data["kind"] == "remainder")
    return {
        **{key: float(x) for key, x in graphs.complexity(graph, seeds=2 if smoke else 3)._asdict().items()},
        "edges": float(graph.number_of_edges()),
        "through remainders": through,
        "damage": protocols.propagating(trial, fitted) / trial.nothing,
        "active": sum(_active(trial, fitted)),
    }


# ------------------------------------------------------------ the table


LEGEND = (
    "Every method's units at the same sites of the same model; graphs of "
    f"{GRAPHED} held-out inputs with all edges; {STEPS} training steps where there is training. Of a method's grid, "
    "every second setting where it is trained, the one counts that has the fewest active units within the tolerance of "
    "damage .02, else the least damage. Edges that carry 90 and 99 % of the influence on the outputs, of all edges; "
    "modularity Q, and Q with weights shuffled between the same two layers (most lie below it: strong weights meet at "
    "few nodes, which join everything, and shuffled ones do not); influence through what the units do not explain, "
    "sites that the method leaves as they are included; damage of the model run on the units alone; active units per "
    "row, summed over sites. Random directions: as many active as the weight decomposition has. Starred methods come "
    f"last: at a damage above {WORKS} their units are no model of the target, and few edges mean little."
)


def methods_table(found: Mapping[str, Any]) -> str:
    """One model's methods, fewest edges for 90 % first and those that break the model last; reasons of others below."""
    head = ["method", "edges for 90 %", "99 %", "of", "Q", "null", "Q - null", "through remainders", "damage", "active"]
    names = ["edges_90", "edges_99", "edges", "q", "q_null", "q_excess", "through remainders", "damage", "active"]
    forms = [",.0f"] * 3 + [".2f"] * 5 + [".1f"]
    runs = {label: one for label, one in found.items() if not isinstance(one, str)}
    broken = {label for label, one in runs.items() if one["damage"]["median"] > WORKS}
    ordered = sorted(runs, key=lambda label: (label in broken, runs[label]["edges_90"]["median"]))
    rows = [
        [
            f"{label} *" if label in broken else label,
            *(ranged(runs[label][name], form) for name, form in zip(names, forms, strict=True)),
        ]
        for label in ordered
    ]
    without = [f"- {label}: {reason}" for label, reason in found.items() if isinstance(reason, str)]
    return "\n".join([table(head, rows), *(["", *without] if without else [])])


def spreads(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Every figure's median and range."""
    return {key: spread([run[key] for run in runs])._asdict() for key in runs[0]}


def ranged(one: Mapping[str, float], form: str) -> str:
    """A median, with its range where seeds differ."""
    middle, low, high = (f"{one[name]:{form}}" for name in ("median", "low", "high"))
    return middle if low == high else f"{middle} ({low} to {high})"
