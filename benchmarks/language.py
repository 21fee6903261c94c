"""Language models: all attention and MLP matrices decomposed at once, beside nulls and transcoders.

`python -m benchmarks.language [--data DIR] [--only NAME] [--seeds N] [--smoke]`. Decompositions, their checkpoints
and what was measured of them are kept in `benchmarks/.cache/language`, so that a run that was stopped goes on;
`--fresh` begins anew.
"""

import argparse
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.bilinear_language import text_of, trained_model, windows
from benchmarks.images import DATA_VARIABLE, data_folder
from benchmarks.report import RESULTS, peak_bytes, provenance, reset_peak, table, write, write_json
from weightdecomp import Config, Decomposition, compare, decompose, load, load_hf
from weightdecomp._compare import matched_cosine
from weightdecomp._comparison import PROTOCOLS
from weightdecomp.baselines import ALL, Data, TopK, Transcoder
from weightdecomp.baselines._transcoder import spans

CACHE = Path(__file__).parent / ".cache" / "language"
TOLERANCE = 0.02


class Effort(NamedTuple):
    """How much is spent.

    Attributes:
        config: Of the decomposition.
        attack: Steps and restarts of the verification's longest attack, and rows (positions) that it shares sources
            among: as many as a run is held to.
        training: Steps of the character model.
        methods: What `compare` scores beside the decomposition.
        beside: Inputs that methods are compared on.
        sequences: To decompose on at most.
        positions: Of a sequence at most.
    """

    config: Config
    attack: tuple[int, int, int]
    training: int
    methods: tuple[str, ...]
    beside: int
    sequences: int
    positions: int


FULL = Effort(Config(), (40, 3, 4096), 1500, ("neurons", "svd", "transcoder", "skip transcoder"), 8, 2048, 256)
SMOKE = Effort(Config(steps=2, sample=256, batch=64, rounds=1), (2, 1, 32), 5, ("svd",), 2, 16, 16)


class Case(NamedTuple):
    """A language model with token ids.

    Attributes:
        name: Of the model.
        what: It in words.
        model: The target.
        sites: Patterns of what is decomposed.
        tokens: Sequences to decompose on.
        held: Sequences that the run does not see.
    """

    name: str
    what: str
    model: nn.Module
    sites: tuple[str, ...]
    tokens: Tensor
    held: Tensor


def stories(data: Path | None, effort: Effort) -> Case | None:
    """The Llama-architecture model of 260K parameters on what it says itself; None without its files."""
    folder = None if data is None else data / "stories260k"
    if folder is None or not folder.exists():
        return None
    ids = torch.from_numpy(np.load(folder / "self_sampled_tokens_T1.npy").astype(np.int64))
    ids = ids[:, : effort.positions]
    cut = len(ids) * 3 // 4
    sites = ("model.layers.0.mlp.*",) if effort is SMOKE else ("model.layers.*",)
    what = "5 layers, width 64, trained on stories; sequences of 256 tokens sampled from itself"
    return Case("stories260k", what, load_hf(folder), sites, ids[: min(cut, effort.sequences)], ids[cut:])


def characters(data: Path | None, effort: Effort) -> Case:
    """A character model with bilinear MLPs, trained here on a text file, on other parts of the file."""
    text, name = text_of(data)
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([number[c] for c in text])
    cut = len(ids) * 9 // 10
    d = 16 if effort is SMOKE else 64
    model = trained_model(ids[:cut], len(number), d, 2, effort.training, seed=0)
    rng = torch.Generator().manual_seed(1)
    seen = torch.cat([one[:, :-1] for one in windows(ids[:cut], 32, rng)])
    (held,) = (one[:, :-1] for one in windows(ids[cut:], 1, rng))
    what = f"2 layers, width {d}, bilinear MLPs, trained {effort.training} steps on {name}; windows of 64 characters"
    seen, held = (one[: effort.sequences, : effort.positions] for one in (seen, held))
    return Case("characters", what, model, ("blocks.*",), seen, held)


CASES: dict[str, Callable[[Path | None, Effort], Case | None]] = {"stories260k": stories, "characters": characters}


def decomposed(case: Case, seed: int, effort: Effort, cache: Path) -> tuple[Decomposition, dict[str, Any]]:
    """The decomposition of one seed, from the cache where it is there, and its cost (if resumed, the last part's)."""
    place, cost = cache / f"{case.name}-{seed}", cache / f"{case.name}-{seed}.json"
    if not cost.exists():
        reset_peak()
        start, wall = time.process_time(), time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unmet tolerance is in the record
            found = decompose(
                case.model,
                [case.tokens],
                sites=case.sites,
                tolerance=TOLERANCE,
                seed=seed,
                config=effort.config,
                checkpoint=cache / f"{case.name}-{seed}-progress",
            )
        found.save(place)
        spent = {"cpu_seconds": time.process_time() - start, "wall_seconds": time.perf_counter() - wall}
        write_json(cost, spent | {"peak_bytes": peak_bytes()})
    return load(place, case.model), json.loads(cost.read_text())


def agreement(one: Decomposition, other: Decomposition) -> float:
    """Mean absolute cosine of two seeds' components (their weights), matched one to one; the mean over sites."""
    scores = [matched_cosine(_weights(one, path), _weights(other, path)) for path in one.parts]
    return sum(scores) / len(scores)


def _weights(found: Decomposition, path: str) -> Tensor:
    pieces = found.parts[path].pieces
    return torch.stack([pieces.weight(i).flatten() for i in range(pieces.n)])


def verified(found: Decomposition, case: Case, effort: Effort) -> dict[str, Any]:
    """Figures on inputs that the run has not seen, nulls beside them, with the report in full."""
    steps, restarts, rows = effort.attack
    inputs = max(1, rows // case.held.shape[1])
    one = found.verify([case.held], steps=steps, restarts=restarts, inputs=inputs, bound=False)
    figures = {
        "L0": one.ours.active,
        "live": sum(site.live for site in one.sites),
        "bits": one.ledger.per_input,
        "stochastic": one.stochastic.damage,
        "gates": one.gates.damage,
        "adversarial": one.damage,
    }
    beside = [
        {"name": null.name, "L0": null.active, "adversarial": null.adversarial.damage}
        for null in (one.ours, *one.nulls)
        if null.adversarial is not None
    ]
    return {"figures": figures, "nulls": beside, "report": str(one), "verification": one.to_dict()}


def compared(found: Decomposition, case: Case, effort: Effort) -> dict[str, Any]:
    """A decomposition beside other methods, transcoders among them with as many latents on as there are components."""
    data = Data(found.target, [case.tokens], found.sites, found.divergence, found.tolerance)
    active = sum(float(parts.frequencies.sum()) for parts in found.parts.values())
    k = max(1, round(active / len(spans(data))))
    same = [replace(one, rule=TopK(k=k)) for one in ALL if isinstance(one, Transcoder) and one.name in effort.methods]
    beside = compare(found, [case.tokens], [*effort.methods, *same], evaluate=[case.held[: effort.beside]])
    return {"report": str(beside), "comparison": beside.to_dict()}


def _kept(file: Path, made: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was made before, or what is made now and kept, so that a run that was stopped goes on."""
    if not file.exists():
        write_json(file, made())
    return json.loads(file.read_text())


def measured(case: Case, seeds: int, effort: Effort, cache: Path) -> tuple[dict[str, Any], str]:
    """All figures of one model, and the tables; other methods are scored beside the first seed."""
    found, costs = zip(*[decomposed(case, seed, effort, cache) for seed in range(seeds)], strict=True)
    pairs = [agreement(one, other) for i, one in enumerate(found) for other in found[:i]]
    runs = []
    for seed, one in enumerate(found):
        starts = {path: parts.start for path, parts in one.parts.items()}
        made = partial(verified, one, case, effort)
        checked = _kept(cache / f"{case.name}-{seed}-verified.json", made)
        runs.append({"seed": seed, **costs[seed], "starts": starts, **checked})
    result = {
        "name": case.name,
        "what": case.what,
        "tolerance": TOLERANCE,
        "runs": runs,
        "agreement": sum(pairs) / len(pairs) if pairs else None,
        "beside": _kept(cache / f"{case.name}-compared.json", partial(compared, found[0], case, effort)),
        "provenance": provenance(),
    }
    return result, _text(result)


def _text(result: dict[str, Any]) -> str:
    """What a reader wants to know first, then the tables in full."""
    rows = []
    for run in result["runs"]:
        one = run["figures"]
        rows.append(
            [
                f"seed {run['seed']}",
                f"{run['cpu_seconds'] / 60:.1f}",
                f"{run['wall_seconds'] / 60:.1f}",
                f"{run['peak_bytes'] / 2**20:,.0f}",
                f"{one['L0']:.1f}",
                f"{one['live']}",
                f"{one['bits']:,.0f}",
                *(f"{one[name]:.4f}" for name in ("stochastic", "gates", "adversarial")),
            ]
        )
    head = ("run", "CPU min", "min", "peak MiB", "L0", "live", "bits", "stochastic", "gates", "adversarial")
    coders = [
        [one["method"], one["setting"], f"{one['active']:.1f}", *(f"{one[name]:.3f}" for name in PROTOCOLS)]
        for one in result["beside"]["comparison"]["points"]
        if "transcoder" in one["method"]
    ]
    first = result["runs"][0]
    nulls = [
        [f"seed {run['seed']}", one["name"], f"{one['L0']:.1f}", f"{one['adversarial']:.4f}"]
        for run in result["runs"]
        for one in run["nulls"]
    ]
    agreement = "one seed" if result["agreement"] is None else f"agreement of seeds {result['agreement']:.2f}"
    parts = (
        f"## {result['name']}\n\n{result['what']}; tolerance {result['tolerance']:g}, {agreement}.",
        table(head, rows),
        table(("run", "at the same number active per site and token", "L0", "adversarial"), nulls),
        f"```\n{first['report']}\n```",
        f"```\n{result['beside']['report']}\n```",
        *([table(("at every setting", "", "L0", *PROTOCOLS), coders)] if coders else ()),
    )
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.language", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help=f"folder of the data sets; by default what {DATA_VARIABLE} names")
    parser.add_argument("--only", choices=sorted(CASES), nargs="+", help="these models alone")
    parser.add_argument("--seeds", type=int, default=2, help="runs of every model (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="make all decompositions anew")
    parser.add_argument("--out", type=Path, default=RESULTS / "language", help="where results go")
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds; figures mean nothing, and need --out")
    given = parser.parse_args(arguments)
    if given.smoke and given.out == RESULTS / "language":
        parser.error("--smoke would replace real results; pass --out")
    if given.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {given.seeds}")
    try:
        data = data_folder(given.data)
    except ValueError as error:
        parser.error(str(error))
    effort, cache = (SMOKE, given.out / "cache") if given.smoke else (FULL, CACHE)
    if given.fresh:
        shutil.rmtree(cache, ignore_errors=True)
    for name in given.only or CASES:
        case = CASES[name](data, effort)
        if case is None:
            print(f"{name}: its files are not there; pass --data or set {DATA_VARIABLE}", flush=True)
            continue
        result, text = measured(case, given.seeds, effort, cache)
        write_json(given.out / f"{name}.json", result)
        write(given.out / f"{name}.md", text)
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
