"""The two forward passes: the target's own, recorded, and the target with masked components in its sites."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, call, unpadded, without_padding
from weightdecomp._pieces import Pieces
from weightdecomp._sharded import applied
from weightdecomp._sites import Site, no_fast_path

Operands = tuple[Any, ...]
SiteForward = Callable[[Site, int, Operands], Any]
Masks = Mapping[str, Sequence[Tensor]]  # per site, one (..., component) tensor for each call of its module


class Record(NamedTuple):
    """What the target did on one batch.

    Attributes:
        output: What the model returned.
        operands: Per site, the arguments of each call of its module.
        held: Which positions of the inputs hold a token; None where all do.
    """

    output: Any
    operands: dict[str, list[Operands]]
    held: Bool[Tensor, "input position"] | None = None


class _StandIn:
    """Called in place of a site's module: counts the calls and puts keyword arguments in their positions."""

    def __init__(self, site: Site, forward: SiteForward) -> None:
        self.site, self.forward, self.n_calls = site, forward, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = _argument_names(type(self.site.module))[len(args) :] if kwargs else ()
        operands = args + tuple(kwargs[name] for name in names if name in kwargs)
        self.n_calls += 1
        return self.forward(self.site, self.n_calls - 1, operands)


@cache
def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


@contextmanager
def replaced(sites: Sequence[Site], forward: SiteForward) -> Iterator[None]:
    """Let `forward(site, call, operands)` stand in for the sites' modules; everything is as before afterwards."""
    with forwards({site.module: _StandIn(site, forward) for site in sites}):
        yield


@contextmanager
def forwards(own: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let functions stand in for modules' forward methods; everything is as before afterwards."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in own.items():
            before.append((module, module.__dict__.get("forward")))
            module.forward = forward
        with no_fast_path():
            yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def recorded(model: nn.Module, batch: Batch, sites: Sequence[Site]) -> Record:
    """Run the target as it is and keep what its sites were called with."""
    recorder = _Recorder({site.path: [] for site in sites}, {site.path: site.module.forward for site in sites})
    with torch.no_grad(), replaced(sites, recorder):
        output = call(model, batch)
    return Record(output, recorder.operands, unpadded(batch))


class _Recorder(NamedTuple):
    """Runs a site's module as it is and keeps its arguments."""

    operands: dict[str, list[Operands]]
    originals: dict[str, Callable[..., Any]]

    def __call__(self, site: Site, index: int, operands: Operands) -> Any:
        self.operands[site.path].append(operands)
        return self.originals[site.path](*operands)


def masked(
    model: nn.Module,
    batch: Batch,
    sites: Sequence[Site],
    pieces: Mapping[str, Pieces],
    masks: Masks,
    remainders: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Any:
    """The target's output with every site's components multiplied by their masks.

    Args:
        model: The target.
        batch: One batch.
        sites: The sites that have pieces.
        pieces: Components of each site.
        masks: Per site and call, one mask in [0, 1] per component, broadcast over the site's leading shape.
        remainders: Per site, a remainder matrix (d_out, d_in) and its mask (a number, or the leading shape and 1);
            sites that are missing have it off.
    """
    with replaced(sites, _Masked(pieces, masks, remainders or {})):
        return call(model, batch)


class _Masked(NamedTuple):
    """Runs a site's masked components in place of its module."""

    pieces: Mapping[str, Pieces]
    masks: Masks
    remainders: Mapping[str, tuple[Tensor, Tensor]]

    def __call__(self, site: Site, index: int, operands: Operands) -> Any:
        mask = self.masks[site.path][index]
        rows = applied(self.pieces, site.path, lambda own: own.contract(site.read(operands, own.v), mask))
        if site.path in self.remainders:
            matrix, mask = self.remainders[site.path]
            rows = rows + mask * site.read(operands, matrix)
        return site.write(rows, operands)


def inner_activations(record: Record, site: Site, pieces: Pieces) -> list[Float[Tensor, "*batch piece"]]:
    """Inner activations of a site's pieces on the target's own inputs, one tensor a call; zeros at padded positions."""
    return [without_padding(site.read(operands, pieces.v), record.held) for operands in record.operands[site.path]]
