"""The entry point: `decompose`.

1. Read the sample inputs and find the sites; refuse what cannot be decomposed, by name.
2. Record the target on a sample: outputs, site inputs, and how sensitive the output is to each site.
3. Choose a start for every site: exact decompositions made in closed form, the ledger deciding; whether sites start
   from sparse readings, where they have some, it decides for all of them together.
4. Open the gates: per component the exact minimiser of damage + price x openings; the highest price is sought at
   which the adversarial damage meets the tolerance. There is no sparsity coefficient.
5. Refine: gradient steps on the components under random and adversarial ablations, exact at every moment; after every
   round the gates are recomputed, and the round is kept only if the ledger got smaller. At the end gates are chosen
   once more, against what attacks on them blame on each component.
6. Price a null (weights of the same norms in random directions), group components into circuits, and return.

Not here: training gate networks, choosing a divergence from labels, decomposing vectors.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weightdecomp._attack import Ablation
from weightdecomp._batches import Batch, digest, size, tensors
from weightdecomp._begun import begun, opened, site_starts
from weightdecomp._check import check_seed, checked, unreadable_named
from weightdecomp._checkpoint import Checkpoint
from weightdecomp._circuits import activity, grouped
from weightdecomp._config import Config
from weightdecomp._cost import Cost
from weightdecomp._decomposition import Decomposition, Outcome, Parts
from weightdecomp._divergence import Divergence
from weightdecomp._gatekeeper import REVIEW, Gated, frequencies
from weightdecomp._ledger import value_bits
from weightdecomp._made import Made, package_version
from weightdecomp._null import effort, null_effort
from weightdecomp._pieces import Pieces
from weightdecomp._processes import Processes, ProcessLost
from weightdecomp._progress import Progress
from weightdecomp._rounds import Refined, refined
from weightdecomp._sample import dealt, taken
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
    group: dist.ProcessGroup | None = None,
    shard: bool = False,
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
        progress: Show a bar with the time left on stderr.
        group: Processes that all make this same call, inputs included, and share the work; None for this one alone.
            The result, which all return, is one process's up to the rounding of sums. Tensors on the CPU and those on
            the model's device must both have a backend in it, as `torch.distributed.init_process_group()` chooses.
        shard: Keep only a share of every site's components in each process, and bring them together a site at a time:
            less memory, more traffic.

    Returns:
        The decomposition. If the tolerance could not be met, `converged` is False, with the reason.

    Raises:
        ValueError: For inputs, models, patterns or settings that cannot work, naming the argument and the fix.
        TypeError: For arguments of a wrong kind.
        ProcessLost: If another process of the group has ended.

    Source:
        Components, masks and adversary after SPD (arXiv 2506.20790) and VPD (Goodfire 2026); starts, gates and
        price ours.
    """
    config = config or Config()
    check_seed(seed)
    kept, metric = checked(model, batches, tolerance, divergence)
    found, skipped = find_sites(model, kept[0], sites)
    key = _run_key(model, kept, found, tolerance, metric, seed, config)
    processes = Processes(group, shard)
    processes.agree(key)
    if config.batch < processes.n:
        raise ValueError(f"config.batch is {config.batch}, less than one input for each of {processes.n} processes")
    saved = Checkpoint(checkpoint, key, processes)
    rng = torch.Generator(device=tensors(kept[0])[0].device).manual_seed(seed)
    bar = Progress(len(found) + config.steps + 3, on_step, progress and processes.index == 0)
    with bar, _resumable(checkpoint), unreadable_named(model, kept):
        bar.now("recording")
        sample = taken(model, kept, found, metric, config.sample, rng, processes)
        choice = begun(site_starts(bar, saved, model, sample, found, metric, tolerance, config, processes), processes)
        spent = effort(model, sample, found, choice[0].bits, tolerance)
        sample = dealt(sample, model, found, processes)
        ablation = Ablation(model, found, choice[0].pieces, metric, {}, processes)
        start, gated = opened(ablation, choice, sample, tolerance, seed, saved)
        ablation = ablation._replace(pieces=start.pieces)
        best = refined(ablation, start.frames, gated, sample, tolerance, config, seed, bar, saved)
        bar.now("null")
        null = null_effort(model, sample, found, metric, tolerance, config, seed, spent, processes)
        on = {path: processes.rows(rows.byte()) > 0 for path, rows in activity(best.gated.importances).items()}
        parts = _parts(best, frequencies(best.gated.importances, processes), start.names)
        dense = value_bits(tolerance) * sum(_rank(own) for own in start.pieces.values())
    made = Made(seed, sum(size(batch) for batch in kept), key["batches"], package_version())
    outcome = replace(_outcome(best.gated, best.steps, dense, tolerance, spent, null, saved.cost()), made=made)
    if not outcome.converged:
        warnings.warn(outcome.reason, NumericalWarning, stacklevel=2)
    ranks = {path: part.pieces.ranks() for path, part in parts.items()}
    shapes = {site.path: site.shape for site in found}
    groups = grouped(on, ranks, shapes, tolerance)
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
    """Say how to go on after Ctrl-C, and after another process was lost."""
    again = f"progress is in {str(checkpoint)!r}: repeat the same call to resume"
    try:
        yield
    except ProcessLost as error:
        hint = f"{again}, on any number of processes" if checkpoint is not None else "the run had no checkpoint="
        raise ProcessLost(f"{error}; {hint}") from error
    except KeyboardInterrupt:
        if checkpoint is None:
            raise
        raise KeyboardInterrupt(f"interrupted; {again}") from None


def _parts(best: Refined, frequency: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Parts]:
    """Components of every site."""
    found = {}
    for path, own in best.ablation.pieces.items():
        found[path] = Parts(own.balanced(), best.gated.thresholds[path], frequency[path], names[path])
    return found


def _outcome(
    gated: Gated, steps: int, dense: float, tolerance: float, spent: float, null: float | None, cost: Cost
) -> Outcome:
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
    return Outcome(converged, reason, gated.damage, compresses, verdict, spent, null, gated.ledger, dense, steps, cost)


def _rank(pieces: Pieces) -> int:
    sizes = torch.linalg.svdvals(pieces.total())
    return int((sizes > 1e-6 * sizes[0]).sum())
