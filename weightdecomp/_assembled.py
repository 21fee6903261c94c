"""Assembled: a decomposition of components that are already known, with gates and circuits as a run would find them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightdecomp._attack import Ablation
from weightdecomp._batches import Batch, tensors
from weightdecomp._check import checked
from weightdecomp._circuits import activity, grouped
from weightdecomp._config import Config
from weightdecomp._decomposition import Decomposition, Outcome, Parts
from weightdecomp._gatekeeper import Gatekeeper, frequencies
from weightdecomp._ledger import value_bits
from weightdecomp._pieces import Pieces, rank_one_pieces
from weightdecomp._sample import taken
from weightdecomp._sites import find_sites


def assemble(
    model: nn.Module,
    batches: Iterable[Batch],
    components: Mapping[str, tuple[Tensor, Tensor]],
    *,
    tolerance: float = 0.02,
    divergence: str | Callable[[Any, Any], Tensor] = "auto",
    seed: int = 0,
    config: Config | None = None,
    start: str = "given",
) -> Decomposition:
    """A decomposition from known rank-one components; only their gates and circuits are computed.

    Args:
        model: The target, in eval mode.
        batches: Sample inputs, as in `decompose`.
        components: Per site, (reads, writes): rows (component, d_in) and (component, d_out) whose outer products sum to
            the weight; what they do not sum to is remainder.
        tolerance: As in `decompose`.
        divergence: As in `decompose`.
        seed: Of every random draw.
        config: Settings; `sample` is used.
        start: Name of the components' origin, for the printed table.

    Returns:
        The decomposition, as `decompose` returns it.

    Raises:
        ValueError: For sites that do not exist, or components whose shapes do not fit their site.
    """
    config = config or Config()
    kept, metric = checked(model, batches, tolerance, divergence)
    sites, skipped = find_sites(model, kept[0], list(components))
    pieces = {}
    for site in sites:
        reads, writes = (x.detach().to(site.matrix()) for x in components[site.path])
        d_out, d_in = site.shape
        if len(reads) != len(writes) or reads.shape[1:] != (d_in,) or writes.shape[1:] != (d_out,):
            raise ValueError(
                f"components of {site.path!r} have shapes {tuple(reads.shape)} and {tuple(writes.shape)}, expected "
                f"(n, {d_in}) and (n, {d_out})"
            )
        pieces[site.path] = rank_one_pieces(reads, writes)
    rng = torch.Generator(device=tensors(kept[0])[0].device).manual_seed(seed)
    sample = taken(model, kept, sites, metric, config.sample, rng)
    keeper = Gatekeeper(Ablation(model, sites, pieces, metric, {}), sample, tolerance, seed)
    gated = keeper.hardened(keeper.gates())
    frequency = frequencies(gated.importances)
    parts = {path: _part(own, gated.thresholds[path], frequency[path], start) for path, own in pieces.items()}
    relation = "within" if gated.damage <= tolerance else "above"
    reason = f"{gated.damage:.4f} on held-out inputs under the run's own attack, {relation} the tolerance {tolerance:g}"
    dense = value_bits(tolerance) * sum(int(torch.linalg.matrix_rank(site.matrix())) for site in sites)
    verdict = "no null was priced: the components were given, not searched for"
    ledger = gated.ledger
    outcome = Outcome(
        gated.damage <= tolerance, reason, gated.damage, False, verdict, 0.0, 0.0, ledger, dense, 0
    )  # fmt: skip
    ranks = {path: part.pieces.ranks() for path, part in parts.items()}
    groups = grouped(activity(gated.importances), ranks, {site.path: site.shape for site in sites}, tolerance)
    return Decomposition(model, sites, skipped, parts, metric, tolerance, config, outcome, *groups)


def _part(pieces: Pieces, thresholds: Tensor, frequency: Tensor, start: str) -> Parts:
    return Parts(pieces.balanced(), thresholds, frequency, start)
