"""The two forward passes: the target's own, recorded, and the target with masked components in its sites."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._batches import Batch, call
from weightdecomp._pieces import Pieces
from weightdecomp._sites import Site, no_fast_path

Operands = tuple[Any, ...]
SiteForward = Callable[[Site, int, Operands], Any]
Masks = Mapping[str, Sequence[Tensor]]  # per site, one (..., component) tensor for each call of its module


class Record(NamedTuple):
    """What the target did on one batch.

    Attributes:
        output: What the model returned.
        operands: Per site, the arguments of each call of its module.
    """

    output: Any
    operands: dict[str, list[Operands]]


@contextmanager
def replaced(sites: Sequence[Site], forward: SiteForward) -> Iterator[None]:
    """Let `forward(site, call, operands)` stand in for the sites' modules; everything is as before afterwards."""
    before: list[tuple[nn.Module, Any]] = []

    def stand_in(site: Site) -> Callable[..., Any]:
        names = list(inspect.signature(type(site.module).forward).parameters)[1:]
        counter = iter(range(1 << 62))

        def run(*args: Any, **kwargs: Any) -> Any:
            extra = tuple(kwargs[name] for name in names[len(args) :] if name in kwargs)
            return forward(site, next(counter), args + extra)

        return run

    try:
        for site in sites:
            before.append((site.module, site.module.__dict__.get("forward")))
            site.module.forward = stand_in(site)
        with no_fast_path():
            yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def recorded(model: nn.Module, batch: Batch, sites: Sequence[Site]) -> Record:
    """Run the target as it is and keep what its sites were called with."""
    operands: dict[str, list[Operands]] = {site.path: [] for site in sites}
    originals = {site.path: site.module.forward for site in sites}

    def forward(site: Site, index: int, arguments: Operands) -> Any:
        operands[site.path].append(arguments)
        return originals[site.path](*arguments)

    with torch.no_grad(), replaced(sites, forward):
        output = call(model, batch)
    return Record(output, operands)


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

    def forward(site: Site, index: int, operands: Operands) -> Any:
        own = pieces[site.path]
        rows = own.contract(site.read(operands, own.v), masks[site.path][index])
        if remainders and site.path in remainders:
            matrix, mask = remainders[site.path]
            rows = rows + mask * site.read(operands, matrix)
        return site.write(rows, operands)

    with replaced(sites, forward):
        return call(model, batch)


def inner_activations(
    record: Record, site: Site, pieces: Pieces
) -> list[Float[Tensor, "*batch piece"]]:
    """Inner activations of a site's pieces on the target's own inputs, one tensor a call."""
    return [site.read(operands, pieces.v) for operands in record.operands[site.path]]
