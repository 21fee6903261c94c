"""The sample: the inputs a run computes on, with what the target does on them, recorded once."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, joined, select, share, size, tensors
from weightdecomp._divergence import Divergence
from weightdecomp._effects import drawn_probes, sensitivities
from weightdecomp._forward import Record, masked, recorded
from weightdecomp._pieces import Pieces
from weightdecomp._processes import ALONE, Processes
from weightdecomp._sites import Site

_MOST_ROWS = 32_768  # rows that a site's reach and exemplars are taken from
_MOST_HELD = 2048  # inputs held out
_MOST_NUMBERS = 1 << 26  # and at most so many numbers, for wide sites


class Sample(NamedTuple):
    """Inputs with the target's record on them.

    Of several processes each first has all inputs at its own share of the sites, as starts are made a site at a time,
    and then, once `dealt`, its own share of the inputs at all sites.

    Attributes:
        batches: All inputs, in as few batches as their shapes allow.
        batch: The inputs that thresholds are computed on.
        held: Inputs that nothing is computed from; the tolerance must be met on them.
        record: The target's output on `batch` and what its sites were called with.
        sensitivity: Per site and call, gradients of random output projections at the site's output.
        nothing: Divergence with everything ablated: what a damage of 1 is.
        rows_per_input: Most rows that one input makes at any site: positions, patches, calls.
    """

    batches: list[Batch]
    batch: Batch
    held: Batch
    record: Record
    sensitivity: dict[str, list[Float[Tensor, "probe *batch d_out"]]]
    nothing: float
    rows_per_input: int


def without(model: nn.Module, batch: Batch, sites: Sequence[Site]) -> Any:
    """The model's output when the given sites output nothing but their biases."""
    empty = {}
    for site in sites:
        matrix = site.matrix()
        owner = torch.zeros(1, dtype=torch.long, device=matrix.device)
        empty[site.path] = Pieces(torch.zeros_like(matrix[:1]), torch.zeros_like(matrix[:, :1].T), owner)
    masks = {site.path: [torch.zeros_like(empty[site.path].v[0, :1])] * site.n_calls for site in sites}
    with torch.no_grad():
        return masked(model, batch, sites, empty, masks)


def ablated_entirely(
    model: nn.Module, batch: Batch, sites: Sequence[Site], divergence: Divergence, target: Any
) -> Float[Tensor, "*batch"]:
    """Divergence per input when the given sites output nothing but their biases."""
    with torch.no_grad():
        return divergence(without(model, batch, sites), target)


class NoEffect(ValueError):
    """Nothing is to be decomposed: ablating the sites changes no output, or none that a gradient shows."""


def taken(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    divergence: Divergence,
    rows: int,
    rng: torch.Generator,
    processes: Processes = ALONE,
) -> Sample:
    """Record the target on about `rows` rows of the inputs, at this process's share of the sites.

    Raises:
        NoEffect: If ablating everything changes nothing, so that no damage can be measured.
        ValueError: For outputs that are not finite.
    """
    whole, held = _held_out(joined(batches))
    largest = max(whole, key=size)
    per_input = _rows_per_input(model, largest, sites)
    wanted = min(size(largest), max(1, rows // per_input))
    batch = select(largest, torch.arange(wanted, device=tensors(largest)[0].device))
    held = select(held, torch.arange(min(size(held), wanted), device=tensors(held)[0].device))
    record = recorded(model, batch, processes.own(sites))
    nothing = float(ablated_entirely(model, batch, sites, divergence, record.output).mean())
    paths = [site.path for site in sites]
    if not math.isfinite(nothing):
        raise ValueError(
            f"the output, or what is left of it when {paths} are ablated, contains NaN or infinity on the given "
            "batches; check the inputs' scale, or pass other sites="
        )
    if not nothing > 0:
        raise NoEffect(
            f"ablating {paths} altogether does not change the output on the given batches: nothing to decompose; "
            "pass inputs on which these weights matter, or other sites="
        )
    sensitivity = {}
    for index, site in enumerate(sites):
        if processes.count(index) == processes.count(index + 1):
            drawn_probes(record, divergence.name, rng)  # another process's site, whose draws ours come after
        else:
            sensitivity[site.path] = sensitivities(model, batch, site, record, divergence.name, rng)
    if not processes.total(sum(int(calls.any()) for own in sensitivity.values() for calls in own)):
        raise NoEffect(
            f"ablating {paths} changes the output, but the output has no gradient at them; call decompose outside of "
            "torch.inference_mode(), and take torch.no_grad() and rounding (argmax) out of the model's forward"
        )
    return Sample(whole, batch, held, record, sensitivity, nothing, per_input)


def dealt(sample: Sample, model: nn.Module, sites: Sequence[Site], processes: Processes) -> Sample:
    """The sample with this process's inputs at all sites.

    Raises:
        ValueError: If there are fewer inputs than processes, or rows of a site that cannot be dealt out with them.
    """
    if processes.alone:
        return sample
    fewest = min(size(sample.batch), size(sample.held))
    if fewest < processes.n:
        raise ValueError(
            f"batches leave {fewest} inputs to measure on, fewer than there are processes ({processes.n}); "
            "pass more inputs, or start fewer processes"
        )
    _check_dealable(model, sample.batch, sites)
    batch = share(sample.batch, processes)
    sensitivity = {}
    for index, site in enumerate(sites):
        whole = {str(i): x for i, x in enumerate(sample.sensitivity.get(site.path, []))}
        found, _ = processes.sent(index % processes.n, whole)
        device = site.weight.device
        sensitivity[site.path] = [
            found[str(i)][:, processes.index :: processes.n].contiguous().to(device) for i in range(len(found))
        ]
    record = recorded(model, batch, sites)
    held = share(sample.held, processes)
    return sample._replace(batch=batch, held=held, record=record, sensitivity=sensitivity)


def _check_dealable(model: nn.Module, batch: Batch, sites: Sequence[Site]) -> None:
    for n in (1, 2):
        few = select(batch, torch.arange(n, device=tensors(batch)[0].device))
        operands = recorded(model, few, sites).operands
        for site in sites:
            for call in operands[site.path]:
                found = tuple(site.read(call, site.matrix()[:1]).shape[:-1])
                if found[:1] != (n,):
                    raise ValueError(
                        f"site {site.path!r} is called with rows of shape {found} on {n} inputs: rows that do not "
                        "belong to single inputs cannot be dealt out to processes; leave it out with sites=, or run "
                        "one process"
                    )


def _held_out(batches: list[Batch]) -> tuple[list[Batch], Batch]:
    """The largest batch without its last quarter (2,048 inputs at most), and these; a few inputs are never split."""
    index = max(range(len(batches)), key=lambda i: size(batches[i]))
    n = size(batches[index])
    order = torch.arange(n, device=tensors(batches[index])[0].device)
    last = min(n // 4, _MOST_HELD)
    if not last:
        return batches, batches[index]
    kept = [*batches[:index], select(batches[index], order[: n - last]), *batches[index + 1 :]]
    return kept, select(batches[index], order[n - last :])


def _rows_per_input(model: nn.Module, batch: Batch, sites: Sequence[Site]) -> int:
    one = select(batch, torch.arange(1, device=tensors(batch)[0].device))
    operands = recorded(model, one, sites).operands
    counts = [site.read(call, site.matrix()[:1]).numel() for site in sites for call in operands[site.path]]
    return max(counts)


def site_rows(
    model: nn.Module, sample: Sample, site: Site, divergence: Divergence
) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, " row"]]:
    """Input rows of a site over all batches, and the divergence when the whole site is ablated there."""
    most = max(1, min(_MOST_ROWS, _MOST_NUMBERS // site.shape[1]))
    rows, effects, n = [], [], 0
    for batch in sample.batches:
        record = recorded(model, batch, [site])
        hit = ablated_entirely(model, batch, [site], divergence, record.output)
        for operands in record.operands[site.path]:
            found = site.vectors(operands)
            effect = _per_row(hit, found.shape[:-1])
            if record.held is not None and record.held.shape == found.shape[:2]:
                found, effect = found[record.held], effect[record.held]
            rows.append(found.reshape(-1, found.shape[-1])[: most - n])
            effects.append(effect.reshape(-1)[: most - n].to(found.dtype))
            n += len(rows[-1])
        if n >= most:
            break
    return torch.cat(rows), torch.cat(effects)


def _per_row(divergence: Tensor, shape: Iterable[int]) -> Tensor:
    """A divergence per input or position, spread over a site's rows."""
    shape = tuple(shape)
    if divergence.shape == shape:
        return divergence
    if divergence.ndim and shape and len(divergence) == shape[0]:
        per_input = divergence.reshape(len(divergence), -1).mean(1)
        return per_input.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    return divergence.mean().expand(shape)
