"""Sharded pieces: components of which every process keeps some, and which come together a site at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from torch import is_grad_enabled
from torch.utils.checkpoint import checkpoint

from weightdecomp._pieces import Pieces
from weightdecomp._processes import Processes

_Found = TypeVar("_Found")


class OnDemand(Mapping[str, Pieces]):
    """Components by site, made anew each time they are asked for, so that one site's are there at a time."""

    def __init__(self, paths: Iterable[str], made: Callable[[str], Pieces]) -> None:
        """Remember how to make them; every process must ask for the same sites in the same order."""
        self._paths, self._made = tuple(paths), made

    def __getitem__(self, path: str) -> Pieces:
        """All components of one site."""
        return self._made(path)

    def __iter__(self) -> Iterator[str]:
        """Paths of the sites."""
        return iter(self._paths)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self._paths)


def stored(pieces: Iterable[tuple[str, Pieces]], processes: Processes) -> Mapping[str, Pieces]:
    """Components to keep for long; where processes shard, each keeps its share of the pieces of every site."""
    if not processes.shards:
        return dict(pieces)
    own = {path: Pieces(processes.sharded(v), processes.sharded(u), owner) for path, (v, u, owner) in pieces}

    def made(path: str) -> Pieces:
        v, u, owner = own[path]
        return Pieces(processes.whole(v), processes.whole(u), owner)

    return OnDemand(own, made)


def overlaid(pieces: Mapping[str, Pieces], some: Mapping[str, Pieces]) -> Mapping[str, Pieces]:
    """The components of all sites, of some sites others; nothing is copied."""
    if not isinstance(pieces, OnDemand):
        return {**pieces, **some}
    return OnDemand(pieces, lambda path: (some if path in some else pieces)[path])


def applied(pieces: Mapping[str, Pieces], path: str, function: Callable[[Pieces], _Found]) -> _Found:
    """A function of one site's components; its backward pass makes them again where they are made on demand."""
    if not isinstance(pieces, OnDemand) or not is_grad_enabled():
        return function(pieces[path])
    return checkpoint(lambda: function(pieces[path]), use_reentrant=False, preserve_rng_state=False)
