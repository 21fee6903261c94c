"""Methods beside mechanisms that are known in a trained model: causal-effect matching, site by site, and its tables."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import weightdecomp as wd
from benchmarks.report import spread, table
from benchmarks.trap_run import ORACLE, OURS, RANDOM, _random, components_of
from weightdecomp import baselines
from weightdecomp._sites import Site, find_sites
from weightdecomp.baselines import Data, Fitted, effect_matching, protocols
from weightdecomp.baselines._ours import as_fitted

Known = Mapping[str, Mapping[str, Tensor]]
"""By site and name of the mechanism, its share of the site's weight."""

_PLAIN = {"singular pairs": baselines.SVD(), "neurons": baselines.Neurons()}


def decomposed(
    model: nn.Module,
    seen: Tensor,
    unseen: Tensor,
    sites: Sequence[str],
    divergence: str,
    seed: int,
    attack: int,
    config: wd.Config | None,
) -> tuple[wd.Decomposition, dict[str, Any]]:
    """A decomposition, and the part of its record that tells its cost, its verdict and how it does on unseen inputs."""
    start = time.process_time()
    with warnings.catch_warnings(action="ignore", category=wd.NumericalWarning):
        found = wd.decompose(
            model, [seen], sites=sites, divergence=divergence, seed=seed, config=config, progress=False
        )
    seconds = time.process_time() - start
    print(found, flush=True)
    verification = found.verify([unseen], steps=attack, inputs=len(unseen)).to_dict()
    told = {"seed": seed, "CPU-seconds": seconds, "verdict": found.outcome.verdict, "verification": verification}
    return found, told


def rivals(site: Site, shares: Sequence[Tensor], data: Data, seed: int) -> dict[str, Fitted]:
    """The known answer, and what knows nothing of it."""
    found = {ORACLE: Fitted(ORACLE, "", [site], [components_of(site, shares)])}
    found |= {name: method.fit(data, seed) for name, method in _PLAIN.items()}
    return found | {RANDOM: _random(data, seed)}


def scores(
    decomposition: wd.Decomposition,
    known: Known,
    unseen: Tensor,
    seen: Tensor,
    seed: int,
    further: Callable[[Site], dict[str, Fitted]] = lambda _: {},
) -> list[dict[str, Any]]:
    """Causal-effect matching of every method at every site, on inputs that nothing was fitted to."""
    model, metric, ours, found = decomposition.target, decomposition.divergence, as_fitted(decomposition), []
    for site in find_sites(model, unseen, list(known))[0]:
        shares = known[site.path]
        trial = protocols.trial(model, unseen, [site], metric)
        truth = baselines.deletions(trial, [{site.path: share} for share in shares.values()])
        data = Data(model, [seen], [site], metric, decomposition.tolerance)
        own = [bank for bank in ours.banks if site.path in bank.writes]
        methods = {OURS: Fitted(OURS, "", [site], own)} | rivals(site, list(shares.values()), data, seed)
        for name, fitted in (methods | further(site)).items():
            matched = effect_matching(trial, fitted, truth)
            by_mechanism = dict(zip(shares, matched.scores, strict=True))
            found.append(
                {"site": site.path, "method": name, "score": matched.score, "by mechanism": by_mechanism}
                | {"units": fitted.n, "group sizes": matched.sizes}
            )
    return found


def score_table(runs: Sequence[dict[str, Any]], sites: Sequence[str]) -> str:
    """Methods by sites."""
    names = list(dict.fromkeys(one["method"] for one in runs[0]["scores"]))
    rows = []
    for name in names:
        row = [name]
        for site in sites:
            own = [x["score"] for run in runs for x in run["scores"] if (x["site"], x["method"]) == (site, name)]
            row.append(spread(own).text(".2f") if own else "")
        rows.append(row)
    return table(["method", *sites], rows)


def damage_table(runs: Sequence[dict[str, Any]], unit: str) -> str:
    """Damage of ours beside nulls at the same number active an input, which is called `unit`."""
    rows = []
    for place in range(1 + len(runs[0]["verification"]["nulls"])):
        shown = [[run["verification"]["ours"], *run["verification"]["nulls"]][place] for run in runs]
        figures = [
            spread([one[name]["damage"] for one in shown]).text(".3f") if shown[0][name] else shown[0]["reason"]
            for name in ("stochastic", "adversarial")
        ]
        rows.append([shown[0]["name"], spread([one["active"] for one in shown]).text(".1f"), *figures])
    return table(["components", f"active per {unit}", "stochastic", "adversarial"], rows)
