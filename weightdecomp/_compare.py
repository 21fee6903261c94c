"""`compare`: a decomposition beside activation-based and weight-based methods, in the same bits.

1. Hold a quarter of the inputs out; record the target on the rest.
2. Fit every method at every setting of its stated grid, with every seed.
3. Score each, and the decomposition, in the same form by the same protocols and the same ledger.
4. Keep a method's best setting: at as many sites as it can, the fewest bits within the tolerance.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weightdecomp import baselines
from weightdecomp._batches import Batch, joined, select, size, tensors
from weightdecomp._comparison import Comparison, Point, Row
from weightdecomp._cost import Meter
from weightdecomp._decomposition import Decomposition
from weightdecomp._judge import Judge, Share, known, labelled
from weightdecomp._progress import shown
from weightdecomp.baselines import protocols
from weightdecomp.baselines._bank import Fitted
from weightdecomp.baselines._data import Data, Inapplicable, OnStep
from weightdecomp.baselines._method import Method
from weightdecomp.baselines._ours import as_fitted

_HELD_OUT = 4  # every fourth input is scored on
_RESTARTS = 3


def compare(
    decomposition: Decomposition,
    batches: Iterable[Batch],
    methods: Sequence[str | Method] | None = None,
    *,
    evaluate: Iterable[Batch] | None = None,
    labels: Tensor | None = None,
    truth: Sequence[Share] | None = None,
    seeds: int = 1,
    inputs: int = 1024,
    attack: int = 20,
    tune: bool = True,
    progress: bool = True,
) -> Comparison:
    """Score a decomposition of weights and other methods on the same model, inputs, ledger and output divergence.

    Args:
        decomposition: The result of a run.
        batches: Inputs to fit the other methods on, all of one shape.
        methods: Names, as `weightdecomp.baselines.NAMES` lists them, or objects with settings of your own; None takes
            all. Of a name the whole grid of settings is tried, of an object only the settings it has.
        evaluate: Inputs to score on; None holds every fourth input of `batches` out of the fits.
        labels: The right class of every input (and position, -100 where there is none) of `evaluate`, or of `batches`
            where that is None; the cross-entropy that each method recovers is then told.
        truth: Where the mechanisms are known, their shares of the weights by site; causal-effect matching and
            splitting are then told. Objects of several widths show how units split as capacity grows.
        seeds: Fits of every method.
        inputs: Inputs to score on at most.
        attack: Steps of the adversarial protocol, 3 restarts.
        tune: Try the grids; False takes every method's defaults.
        progress: Show a bar on stderr, with the steps of the fit that is going on.

    Returns:
        A table, a plot and all figures. A method that cannot be used is a row with the reason.

    Raises:
        ValueError: For an unknown method (naming the nearest), bad batches, labels, shares or settings.
        TypeError: For a method that is neither a name nor a method.

    Source:
        One two-part code for all: ours; the comparison at equal damage after Ayonrinde et al. 2024 (arXiv 2410.11179).
    """
    for name, value in (("seeds", seeds), ("inputs", inputs), ("attack", attack)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    chosen = _chosen(methods, tune)
    fit_on, score_on, index, among = _split(decomposition, batches, evaluate, inputs)
    data = Data(decomposition.target, [fit_on], decomposition.sites, decomposition.divergence, decomposition.tolerance)
    trial = protocols.trial(data.model, score_on, data.sites, data.divergence)
    judge = Judge(trial, data.tolerance, attack, _RESTARTS, labelled(trial, labels, index, among), known(trial, truth))
    own = judge(as_fitted(decomposition), 0, decomposition.outcome.cost)
    rows, points = [_row(own.method, [[own]], data.tolerance)], [own]
    with shown(progress, seeds * sum(len(grid) for grid in chosen.values())) as bar:

        def step(number: int, _: dict[str, float]) -> None:
            bar.set_postfix_str(f"step {number + 1}", refresh=False)
            bar.update(0)

        def tell(method: Method, seed: int) -> OnStep:
            bar.set_postfix_str("", refresh=False)
            bar.set_description_str(f"{method.name}, {method.setting}, seed {seed}")
            bar.update()
            return step

        for name, grid in chosen.items():
            row, found = _scored(name, grid, data, judge, seeds, tell)
            rows.append(row)
            points += found
    return Comparison(
        rows=tuple(rows),
        points=tuple(points),
        tolerance=data.tolerance,
        divergence=data.divergence.name,
        n_inputs=size(score_on),
        n_fitted=size(fit_on),
        nothing=trial.nothing,
        budget=f"{attack} steps x {_RESTARTS} restarts",
        seeds=seeds,
    )


def _chosen(methods: Sequence[str | Method] | None, tune: bool) -> dict[str, list[Method]]:
    """The settings to try, by method."""
    if isinstance(methods, str):
        raise TypeError(f"methods must be a list, got the string {methods!r}; write methods=[{methods!r}]")
    named = {method.name: method for method in baselines.ALL}
    found: dict[str, list[Method]] = {}
    for one in named if methods is None else methods:
        if isinstance(one, str):
            if one not in named:
                near = difflib.get_close_matches(one.lower(), named, n=1, cutoff=0.0)
                raise ValueError(f"methods: no method {one!r}; did you mean {near[0]!r}? There are {list(named)}")
            method = named[one]
            found[one] = list(method.grid()) if tune else [method]
        elif isinstance(one, Method) and not isinstance(one, type):
            found.setdefault(one.name, []).append(one)
        else:
            raise TypeError(
                f"methods: expected a name or a method such as weightdecomp.baselines.PCA(share=0.5), got {one!r}"
            )
    if not found:
        raise ValueError(f"methods is empty; choose from {list(named)}")
    return found


def _split(
    decomposition: Decomposition, batches: Iterable[Batch], evaluate: Iterable[Batch] | None, inputs: int
) -> tuple[Batch, Batch, Tensor, int]:
    """One batch to fit on, one to score on, and the latter's numbers among how many it was taken from."""
    whole = _one(decomposition.read(batches), "batches")
    index = torch.arange(size(whole), device=tensors(whole)[0].device)
    if evaluate is not None:
        held = _one(decomposition.read(evaluate), "evaluate")
        scored = torch.arange(size(held), device=index.device)[:inputs]
        return whole, select(held, scored), scored, size(held)
    if size(whole) < _HELD_OUT:
        raise ValueError(f"batches hold {size(whole)} inputs; pass at least {_HELD_OUT}, a quarter is held out")
    held_out = index % _HELD_OUT == _HELD_OUT - 1
    scored = index[held_out][:inputs]
    return select(whole, index[~held_out]), select(whole, scored), scored, size(whole)


def _one(batches: Sequence[Batch], name: str) -> Batch:
    found = joined(batches)
    if len(found) > 1:
        raise ValueError(f"{name} hold inputs of different shapes, on which nothing can be fitted; pass one shape")
    return found[0]


def _scored(
    name: str,
    grid: Sequence[Method],
    data: Data,
    judge: Judge,
    seeds: int,
    tell: Callable[[Method, int], OnStep],
) -> tuple[Row, list[Point]]:
    """A method at every setting and seed, and the reasons of those that are not there."""
    by_setting: list[list[Point]] = []
    fits: list[list[Fitted]] = []
    refused: dict[str, str] = {}
    for method in grid:
        points, fitted = [], []
        for seed in range(seeds):
            on_step = tell(method, seed)
            try:
                meter = Meter(fresh=True)
                one = method.fit(data, seed, on_step)
                cost = meter.cost
            except Inapplicable as error:
                refused[method.setting] = str(error)
                break
            points.append(judge(one, seed, cost))
            fitted.append(one)
        if points:
            by_setting.append(points)
            fits.append(fitted)
    if not by_setting:
        return Row(name, reason=list(refused.values())[-1]), []
    row = _row(name, by_setting, data.tolerance, fits)
    notes = "; ".join([*[f"not tried at {setting}: {why}" for setting, why in refused.items()], row.reason]).strip("; ")
    return replace(row, reason=notes), [point for points in by_setting for point in points]


def _row(
    name: str, by_setting: Sequence[Sequence[Point]], tolerance: float, fits: Sequence[Sequence[Fitted]] = ()
) -> Row:
    """The best setting: of those at most sites the fewest bits within the tolerance, else the least damage."""
    candidates = [Row(name, tuple(points)) for points in by_setting]

    def order(index: int) -> tuple[int, bool, float]:
        row = candidates[index]
        damage = row.median(lambda p: p.propagating)
        within = damage <= tolerance
        # A site that is left as it is does no damage, which is no merit.
        skipped = len(fits[index][0].skipped) if fits else 0
        return skipped, not within, row.median(lambda p: p.bits) if within else damage

    best = min(range(len(candidates)), key=order)
    skipped = fits[best][0].skipped if fits else {}
    notes = "; ".join(f"{path or 'the model'} left as it is: {why}" for path, why in skipped.items())
    agreement = _agreement(fits[best]) if fits and len(fits[best]) > 1 else None
    return Row(name, candidates[best].points, notes, not order(best)[1], agreement)


def _agreement(fits: Sequence[Fitted]) -> float:
    """Mean cosine of one-to-one matched directions over all pairs of seeds and all banks, over the larger number."""
    scores: list[float] = []
    for first in range(len(fits)):
        for second in range(first):
            for one, other in zip(fits[first].banks, fits[second].banks, strict=True):
                scores += [matched_cosine(one.directions[p], other.directions[p]) for p in one.directions]
    return sum(scores) / len(scores)


def matched_cosine(one: Tensor, other: Tensor) -> float:
    """Mean absolute cosine of rows matched one to one, unmatched ones counted as zero."""
    unit = [x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (one, other)]
    cosine = (unit[0] @ unit[1].T).abs().cpu().numpy()
    rows, columns = linear_sum_assignment(-cosine)
    return float(cosine[rows, columns].sum() / max(cosine.shape))
