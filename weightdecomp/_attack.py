"""The adversary: sources in [0, 1] that make the masked output as different from the target's as it can."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weightdecomp._batches import Batch, select, size
from weightdecomp._climb import GAIN, Climb
from weightdecomp._divergence import Divergence
from weightdecomp._forward import Masks, masked, recorded
from weightdecomp._pieces import Pieces
from weightdecomp._processes import ALONE, Processes
from weightdecomp._sites import Site

PATIENCE = 160  # steps without improvement after which a search is over


class Ablation(NamedTuple):
    """Everything that fixes a masked forward pass except the sources.

    Attributes:
        model: The target.
        sites: Its decomposed sites.
        pieces: Components of each site.
        divergence: Between a masked output and the target's.
        remainders: Per site, what its components do not sum to; sites with none are left out.
        processes: Those that have some inputs each; sources shared by inputs are then shared by all of theirs.
    """

    model: nn.Module
    sites: Sequence[Site]
    pieces: Mapping[str, Pieces]
    divergence: Divergence
    remainders: Mapping[str, Float[Tensor, "d_out d_in"]]
    processes: Processes = ALONE


class Part(NamedTuple):
    """Some inputs with what the target and the gates do on them.

    Attributes:
        batch: The inputs.
        target: The target's output on them.
        importances: Per site and call, in [0, 1].
    """

    batch: Batch
    target: Any
    importances: Masks


Sources = dict[str, Float[Tensor, "group source"]]  # per site: a source per component, and one for the remainder


class Attack(NamedTuple):
    """What a search for the worst sources found.

    Attributes:
        ladder: Mean divergence of the worst sources within each number of steps, by the first restart, by the
            first two, and so on. A lower bound of the worst case that never falls along either axis.
        spent: Steps made; fewer than the budget where the last 160 brought less than 0.1 %.
        sources: The worst ones, a row for each group of inputs that shares some.
    """

    ladder: Float[Tensor, "budget restart"]
    spent: int
    sources: Sources


def drawn_sources(ablation: Ablation, groups: int, rng: torch.Generator) -> Sources:
    """Uniform sources, one row a group of inputs."""
    found = {}
    for site in ablation.sites:
        own = ablation.pieces[site.path]
        found[site.path] = torch.rand(groups, own.n + 1, generator=rng, device=own.v.device, dtype=own.v.dtype)
    return found


def _per_row(source: Float[Tensor, "group n"], group: Int[Tensor, " input"], like: Tensor) -> Tensor:
    """Each input's source, shaped to broadcast over the site's positions."""
    if like.ndim < 2 or len(like) != len(group):
        return source[0]  # a site whose rows do not belong to single inputs shares the first group's source
    return source[group].reshape(len(group), *[1] * (like.ndim - 2), source.shape[-1])


def masks_from(importances: Masks, sources: Sources, group: Int[Tensor, " input"]) -> tuple[Masks, dict[str, Tensor]]:
    """Masks m = g + (1 - g) s of the components and m = s of the remainders."""
    masks, remainder = {}, {}
    for path, calls in importances.items():
        rows = [_per_row(sources[path], group, g) for g in calls]
        masks[path] = [g + (1 - g) * row[..., :-1] for g, row in zip(calls, rows, strict=True)]
        remainder[path] = rows[0][..., -1:]
    return masks, remainder


def ablated_divergence(
    ablation: Ablation,
    batch: Batch,
    target: object,
    masks: Masks,
    remainder: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Divergence per input of one masked pass; remainders are off unless masks for them are given."""
    remainder = remainder or {}
    remainders = {path: (m, remainder[path]) for path, m in ablation.remainders.items() if path in remainder}
    output = masked(ablation.model, batch, ablation.sites, ablation.pieces, masks, remainders)
    return ablation.divergence(output, target)


def strongest(
    ablation: Ablation,
    batch: Batch,
    target: object,
    importances: Masks,
    budgets: Sequence[int],
    restarts: int,
    per_input: bool,
    rng: torch.Generator,
) -> Float[Tensor, "budget restart"]:
    """The ladder of an attack on one batch; see `attacked`."""
    part = Part(batch, target, importances)
    return attacked(ablation, [part], budgets, restarts, per_input, rng).ladder


def attacked(
    ablation: Ablation,
    parts: Sequence[Part],
    budgets: Sequence[int],
    restarts: int,
    per_input: bool,
    rng: torch.Generator,
    on_step: Callable[[], None] | None = None,
    begin: Sources | None = None,
) -> Attack:
    """Search for the sources with the largest mean divergence.

    Every restart climbs, backtracks and begins anew as `Climb` says, until the budget is spent or the whole
    search has stood still for 160 steps.

    Args:
        ablation: The masked model.
        parts: Inputs; in several parts where they do not fit together.
        budgets: Ascending numbers of steps.
        restarts: Climbs run side by side.
        per_input: Let every input have sources of its own instead of sharing one set among all.
        rng: For starts and choices.
        on_step: Called after every step.
        begin: Shared sources that the first restart climbs from, such as an earlier search's; else it draws its own.

    Returns:
        The worst found within each budget, and the steps made.

    Source:
        Ours: conditional gradients (Frank and Wolfe 1956) with random backtracking, in basin hopping (Wales
        and Doye 1997). Within 20 steps about as strong as sign ascent with momentum (Dong et al. 2018, arXiv
        1710.06081) within 320, and stronger from there.
    """
    tiles = [_tiled(ablation, part, restarts) for part in parts]
    if not per_input:
        return _searched(ablation, tiles, 1, budgets, restarts, rng, on_step, begin)
    found = [_searched(ablation, [tile], tile.inputs, budgets, restarts, rng, on_step) for tile in tiles]
    sizes = [entries(ablation, part) for part in parts]
    ladder = torch.stack([n / sum(sizes) * one.ladder for n, one in zip(sizes, found, strict=True)]).sum(0)
    sources = {path: torch.cat([one.sources[path] for one in found]) for path in found[0].sources}
    return Attack(ladder, max(one.spent for one in found), sources)


@torch.no_grad()
def entries(ablation: Ablation, part: Part) -> int:
    """How many numbers, one per input or position, the divergence returns for a part."""
    return ablation.divergence(part.target, part.target).numel()


class _Gate(NamedTuple):
    """Importances of one call, what is left to a source, and whether its rows belong to single inputs."""

    importance: Float[Tensor, "*batch component"]
    closed: Float[Tensor, "*batch component"]
    per_input: bool


class _Tile(NamedTuple):
    """One part, its inputs repeated once a restart."""

    batch: Batch
    target: Any
    gates: dict[str, list[_Gate]]
    inputs: int


def _tiled(ablation: Ablation, part: Part, restarts: int) -> _Tile:
    n, device = size(part.batch), next(iter(ablation.pieces.values())).v.device
    index = torch.arange(n, device=device).repeat(restarts)
    batch = select(part.batch, index)
    operands = recorded(ablation.model, batch, ablation.sites).operands

    def gate(path: str, call: int, g: Tensor) -> _Gate:
        # A table of n positions has as many rows as there are inputs, but does not grow with them.
        own = g.ndim > 1 and len(g) == n and len(operands[path][call][0]) == n * restarts
        return _Gate(g, 1 - g, own)

    gates = {path: [gate(path, i, g) for i, g in enumerate(calls)] for path, calls in part.importances.items()}
    return _Tile(batch, _tiled_output(part.target, index, n), gates, n)


def _tiled_output(output: object, index: Tensor, n: int) -> object:
    if isinstance(output, Tensor):
        return output[index] if output.ndim and len(output) == n else output
    if isinstance(output, dict):
        return type(output)(**{key: _tiled_output(value, index, n) for key, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_tiled_output(value, index, n) for value in output)
    return output


def _searched(
    ablation: Ablation,
    tiles: Sequence[_Tile],
    groups: int,
    budgets: Sequence[int],
    restarts: int,
    rng: torch.Generator,
    on_step: Callable[[], None] | None,
    begin: Sources | None = None,
) -> Attack:
    widths = [ablation.pieces[site.path].n + 1 for site in ablation.sites]
    climb = Climb(restarts, groups, sum(widths), next(iter(ablation.pieces.values())).v, rng)
    if begin is not None:
        climb.sources[0] = torch.cat([begin[site.path] for site in ablation.sites], -1)
    ladder: list[Tensor] = []
    highest, since, step = -1.0, 0, 0
    for step in range(budgets[-1] + 1):
        value, grad = _evaluated(ablation, tiles, climb.sources, widths, groups)
        climb.step(value, grad)
        best = climb.best.cummax(0).values.mean(1)
        ladder += [best] * budgets.count(step)
        if on_step:
            on_step()
        since = 0 if float(best[-1]) > highest * (1 + GAIN) else since + 1
        highest = highest if since else float(best[-1])
        if since == PATIENCE:
            break
    ladder += [climb.best.cummax(0).values.mean(1)] * (len(budgets) - len(ladder))
    paths = [site.path for site in ablation.sites]
    return Attack(torch.stack(ladder), step, dict(zip(paths, climb.worst().split(widths, -1), strict=True)))


def _evaluated(
    ablation: Ablation, tiles: Sequence[_Tile], sources: Tensor, widths: Sequence[int], groups: int
) -> tuple[Float[Tensor, "restart group"], Float[Tensor, "restart group source"]]:
    """Divergence of every restart's sources, and its gradient."""
    total, n, slope = torch.zeros(()), 0, torch.zeros_like(sources)
    assert groups == 1 or ablation.processes.alone, "inputs of other processes have sources of their own"
    for tile in tiles:
        leaf = sources.detach().requires_grad_()
        with torch.enable_grad():
            masks, remainder = _tile_masks(ablation.sites, tile, leaf.split(list(widths), -1))
            divergence = ablated_divergence(ablation, tile.batch, tile.target, masks, remainder)
            if divergence.requires_grad:
                slope += torch.autograd.grad(divergence.sum(), leaf, materialize_grads=True)[0]
        found = divergence.detach().reshape(len(sources), groups, -1)
        total, n = total + found.sum(-1), n + found.shape[-1]
    if not ablation.processes.alone:
        total, slope, n = ablation.processes.sums([total, slope, slope.new_tensor(float(n))])
    return total / n, slope


def _tile_masks(
    sites: Sequence[Site], tile: _Tile, sources: Sequence[Float[Tensor, "restart group _"]]
) -> tuple[Masks, dict[str, Tensor]]:
    masks, remainder = {}, {}
    for site, source in zip(sites, sources, strict=True):
        rows = [_tile_rows(gate, tile.inputs, source) for gate in tile.gates[site.path]]
        masks[site.path] = [
            torch.addcmul(g.importance, g.closed, row[..., :-1].to(g.closed.dtype)).reshape(-1, *g.closed.shape[1:])
            for g, row in zip(tile.gates[site.path], rows, strict=True)
        ]
        first = rows[0][..., -1:]
        remainder[site.path] = first.flatten(0, 1) if tile.gates[site.path][0].per_input else first
    return masks, remainder


def _tile_rows(gate: _Gate, inputs: int, source: Tensor) -> Tensor:
    """Sources of one call, shaped to broadcast over (restart, input, positions)."""
    if not gate.per_input:
        return source[0, 0]  # rows that no single input owns share the first restart's source
    return source.reshape(*source.shape[:2], *[1] * (gate.closed.ndim - 2), -1).expand(
        -1, inputs, *[-1] * (gate.closed.ndim - 1)
    )
