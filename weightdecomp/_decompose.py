"""The entry point: `decompose`.

1. Read the sample inputs and find the sites; refuse what cannot be decomposed, by name.
2. Record the target on a sample: outputs, site inputs, and how sensitive the output is to each site.
3. Choose a start for every site: exact decompositions made in closed form, the ledger deciding.
4. Open the gates: per component the exact minimiser of damage + price x openings; the price is bisected until the
   adversarial damage meets the tolerance. There is no sparsity coefficient.
5. Refine: gradient steps on the components under random and adversarial ablations, exact at every moment; after every
   round the gates are recomputed, and the round is kept only if the ledger got smaller.
6. Price a null (weights of the same norms in random directions), group components into circuits, and return.

Not here: training gate networks, choosing a divergence from labels, decomposing vectors.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightdecomp._attack import Ablation
from weightdecomp._batches import Batch, digest, tensors
from weightdecomp._check import checked
from weightdecomp._checkpoint import Checkpoint
from weightdecomp._circuits import activity, grouped
from weightdecomp._config import Config
from weightdecomp._decomposition import Decomposition, Outcome, Parts
from weightdecomp._divergence import Divergence
from weightdecomp._fit import REVIEW, Gated, Start, chosen_start, frequencies
from weightdecomp._frame import Frame, frame
from weightdecomp._ledger import value_bits
from weightdecomp._null import effort, null_effort
from weightdecomp._pieces import Pieces
from weightdecomp._progress import Progress
from weightdecomp._rounds import refined
from weightdecomp._sample import Sample, taken
from weightdecomp._sites import Site, find_sites
from weightdecomp._storage import digest as weights_digest

_CHEAPER = 0.9  # a decomposition compresses when it costs less than this share of its null


class NumericalWarning(UserWarning):
    """A result that is returned but should not be relied on, such as an unmet tolerance."""


def decompose(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    sites: Sequence[str] | None = None,
    tolerance: float = 0.02,
    divergence: str | Callable[[Any, Any], Tensor] = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    config: Config | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = True,
) -> Decomposition:
    """Decompose a trained model's weights into components with gates, and these into circuits.

    Args:
        model: The target, any module in eval mode; it is never changed.
        batches: Sample inputs: an iterable of tensors, tuples (positional arguments) or dicts (keyword arguments).
        sites: Shell-style patterns over module paths; None takes every weight matrix that a module call uses.
        tolerance: Largest adversarial damage to accept, as a share of the damage of ablating everything. The one knob.
        divergence: "auto", "mse", "kl" (over the last dimension), or `callable(output, target_output)` that returns
            one non-negative number per input.
        seed: Of every random draw; the same seed gives the same result on the same machine.
        checkpoint: A folder to save progress in; the same call resumes from it and ends at the same result.
        config: Settings; the defaults serve every task.
        on_step: Called after every step with the step number and each measured term.
        progress: Show a progress bar with the time left, on a terminal's stderr.

    Returns:
        The decomposition. If the tolerance could not be met, `converged` is False, with the reason.

    Raises:
        ValueError: For inputs, models, patterns or settings that cannot work, naming the argument and the fix.
        TypeError: For arguments of a wrong kind.

    Source:
        Components, masks and adversary after SPD (arXiv 2506.20790) and VPD (Goodfire 2026); starts, gates and
        price ours.
    """
    config = config or Config()
    kept, metric = checked(model, batches, tolerance, divergence)
    found, skipped = find_sites(model, kept[0], sites)
    key = _run_key(model, kept, found, tolerance, metric, seed, config)
    saved = Checkpoint(checkpoint, key)
    rng = torch.Generator(device=tensors(kept[0])[0].device).manual_seed(seed)
    bar = Progress(len(found) + config.steps + 2, on_step, progress)
    with bar, _resumable(checkpoint):
        bar.now("recording")
        sample = taken(model, kept, found, metric, config.sample, rng)
        starts = {site.path: _start(bar, saved, model, sample, site, metric, tolerance, config) for site in found}
        ablation = Ablation(model, found, {path: start.pieces for path, start in starts.items()}, metric, {})
        frames = {site.path: _frame(site, starts[site.path]) for site in found}
        best = refined(ablation, frames, sample, tolerance, config, seed, bar, saved)
        bar.now("null")
        spent = effort(model, sample, found, sum(start.bits for start in starts.values()), tolerance)
        null = null_effort(model, sample.batches, found, metric, tolerance, config, seed)
    parts = _parts(best.ablation.pieces, best.gated, {path: start.name for path, start in starts.items()})
    outcome = _outcome(best.gated, best.steps, starts, tolerance, spent, null)
    if not outcome.converged:
        warnings.warn(outcome.reason, NumericalWarning, stacklevel=2)
    ranks = {path: part.pieces.ranks() for path, part in parts.items()}
    shapes = {site.path: site.shape for site in found}
    groups = grouped(activity(best.gated.importances), ranks, shapes, tolerance)
    return Decomposition(model, found, skipped, parts, metric, tolerance, config, outcome, *groups)


def _run_key(
    model: nn.Module,
    batches: list[Batch],
    sites: Sequence[Site],
    tolerance: float,
    divergence: Divergence,
    seed: int,
    config: Config,
) -> dict[str, Any]:
    """All that a run's result depends on, to recognise it when it is resumed."""
    return {
        "model": weights_digest(model.state_dict()),
        "batches": digest(batches),
        "sites": [site.path for site in sites],
        "tolerance": tolerance,
        "divergence": divergence.name,
        "seed": seed,
        "config": asdict(config),
    }


@contextmanager
def _resumable(checkpoint: str | Path | None) -> Iterator[None]:
    """Say how to go on after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint is None:
            raise
        raise KeyboardInterrupt(
            f"interrupted; progress is in {str(checkpoint)!r}: repeat the same call to resume"
        ) from None


def _start(
    bar: Progress,
    saved: Checkpoint,
    model: nn.Module,
    sample: Sample,
    site: Site,
    divergence: Divergence,
    tolerance: float,
    config: Config,
) -> Start:
    """The start of one site, from the checkpoint where it is there already."""
    bar.now(f"start of {site.path or 'the model'}")
    prefix = f"start|{site.path}|"
    if not saved.under(prefix):
        start = chosen_start(model, sample, site, divergence, tolerance, config)
        names = {**saved.document.get("starts", {}), site.path: [start.name, start.bits, start.work]}
        # Contiguous as when read back from disk, since sums over another layout round differently (R1).
        found = {name: x.contiguous() for name, x in {**start.pieces._asdict(), **start.origin}.items()}
        saved.keep({prefix + name: x for name, x in found.items()}, {"starts": names})
    values = {name: x.to(site.weight.device) for name, x in saved.under(prefix).items()}
    pieces = Pieces(values["v"], values["u"], values["owner"])
    name, bits, work = saved.document["starts"][site.path]
    origin = {name: values[name] for name in ("basis", "power", "held")}
    return Start(name, pieces, bits, work, origin)


def _frame(site: Site, start: Start) -> Frame:
    return frame(**start.origin, matrix=site.matrix(), pieces=start.pieces)


def _parts(pieces: Mapping[str, Pieces], gated: Gated, names: Mapping[str, str]) -> dict[str, Parts]:
    """Components, most frequent first at every site."""
    found = {}
    frequency = frequencies(gated.importances)
    for path, own in pieces.items():
        found[path] = Parts(own.balanced(), gated.thresholds[path], frequency[path], names[path])
    return found


def _outcome(
    gated: Gated, steps: int, starts: Mapping[str, Start], tolerance: float, spent: float, null: float | None
) -> Outcome:
    dense = value_bits(tolerance) * sum(_rank(start) for start in starts.values())
    compresses = null is None or spent < _CHEAPER * null
    random = "random directions do nothing" if null is None else f"{null:.2f} with random directions"
    against = f"{spent:.2f} bits per bit of behaviour, {random}"
    verdict = f"compresses: {against}" if compresses else f"nothing compresses: {against}; claim no mechanisms"
    converged = gated.damage <= tolerance
    relation = "within" if converged else "above"
    reason = (
        f"{gated.damage:.4f} after {REVIEW[0]} steps x {REVIEW[1]} restarts on held-out inputs, "
        f"{relation} the tolerance {tolerance:g}"
    )
    return Outcome(converged, reason, gated.damage, compresses, verdict, spent, null, gated.ledger, dense, steps)


def _rank(start: Start) -> int:
    sizes = torch.linalg.svdvals(start.pieces.total())
    return int((sizes > 1e-6 * sizes[0]).sum())
