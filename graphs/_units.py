"""Units: what nodes stand for at every site: components, the parts of circuits, or the units of another method."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs._trace import Event, Trace, by_position
from weightdecomp import Decomposition
from weightdecomp.baselines import Bank, Fitted
from weightdecomp.engine import Batch, Operands, Pieces, Record, Site, tensor_digest, unpadded

Gates = dict[str, list[Tensor]]  # per site and call, importances (*batch, unit)


class Units(NamedTuple):
    """What is read at one site, and written there or at later ones.

    Attributes:
        pieces: Its parts; u is all that a piece writes, at several sites side by side.
        writes: The columns of u that go to each site.
        banks: Encoders of the site's rows, in the order of the pieces; none where v of the pieces reads the rows.
        member: The unit of every component of a decomposition; None for units of another method.
        circuits: Number of every unit's circuit where units are circuits, else None.
        offset: What is written at this site always.
    """

    pieces: Pieces
    writes: Mapping[str, slice]
    banks: Sequence[Bank] = ()
    member: Int[Tensor, " component"] | None = None
    circuits: list[int] | None = None
    offset: Tensor | float = 0.0

    def inner(self, site: Site, operands: Operands) -> Float[Tensor, "*batch piece"]:
        """Inner activations.

        Raises:
            ValueError: For units that no gradient leads to.
        """
        if not self.banks:
            return site.read(operands, self.pieces.v)
        rows = site.vectors(operands)
        found = [bank.encode(rows) for bank in self.banks]
        if rows.requires_grad and not all(x.requires_grad for x in found):
            raise ValueError(
                f"units at {site.path!r} are chosen by a step, as the nearest cluster or code is, which no gradient "
                "passes; edges need units whose values follow the site's input"
            )
        return torch.cat(found, -1)


# ------------------------------------------------------------ of a decomposition


def of_components(decomposition: Decomposition, collapse: bool) -> dict[str, Units]:
    """Components, or what each circuit has at every site."""
    number = {member: i for i, group in enumerate(decomposition.groups) for member in group}
    found = {}
    for path, parts in decomposition.parts.items():
        own, everything = parts.pieces, {path: slice(None)}
        if collapse:
            every = torch.tensor([number[path, c] for c in range(own.n)], dtype=torch.long, device=own.v.device)
            circuits, member = every.unique(return_inverse=True)
            owner = member[own.owner]
            order = owner.argsort(stable=True)
            pieces = Pieces(own.v[order], own.u[order], owner[order])
            found[path] = Units(pieces, everything, member=member, circuits=circuits.tolist())
        else:
            found[path] = Units(own, everything, member=torch.arange(own.n, device=own.v.device))
    return found


def component_gates(decomposition: Decomposition, units: Mapping[str, Units], trace: Trace, batch: Batch) -> Gates:
    """Gates of components on the batch that was traced, or the largest of each circuit's."""
    operands: dict[str, list] = {site.path: [] for site in decomposition.sites}
    for event in trace.events:
        operands[event.site.path].append(tuple(x.detach() if isinstance(x, Tensor) else x for x in event.operands))
    with torch.no_grad():
        found = decomposition.gates_on(Record(trace.returned, operands, unpadded(batch)))
    return {path: [_largest(gate, units[path]) for gate in calls] for path, calls in found.items()}


def _largest(gate: Tensor, own: Units) -> Tensor:
    assert own.member is not None
    shape = (*gate.shape[:-1], own.pieces.n)
    return gate.new_zeros(shape).scatter_reduce(-1, own.member.expand(gate.shape), gate, "amax")


# ------------------------------------------------------------ of another method


def of_method(decomposition: Decomposition, fitted: Fitted) -> dict[str, Units]:
    """The units of a method that was fitted on the decomposition's target and sites.

    Raises:
        ValueError: For another model's, or units that read several sites and so have no place in the order.
    """
    if [(site.path, site.module) for site in fitted.sites] != [(s.path, s.module) for s in decomposition.sites]:
        raise ValueError(
            f"units of {fitted.name!r} were fitted on other sites than the decomposition's "
            f"{[site.path for site in decomposition.sites]}; fit them on its target and sites"
        )
    for bank in fitted.banks:
        if len(bank.reads) > 1:
            raise ValueError(
                f"units of {fitted.name!r} read {len(bank.reads)} sites at once, {', '.join(bank.reads)}, so that they "
                "have no place in the order of the model; a graph needs units that read one site"
            )
    return {site.path: _read_at(site, fitted) for site in decomposition.sites}


def _read_at(site: Site, fitted: Fitted) -> Units:
    """All units that read one site, of one bank after the other."""
    banks = [bank for bank in fitted.banks if bank.reads == (site.path,)]
    d_out, d_in = site.shape
    like = site.matrix()
    offset = sum((bank.offsets[site.path] for bank in fitted.banks if site.path in bank.offsets), like.new_zeros(d_out))
    written = dict.fromkeys(path for bank in banks for path in bank.writes)
    widths = {path: next(one.shape[0] for one in fitted.sites if one.path == path) for path in written}
    blocks, owners, n = [like.new_zeros(0, sum(widths.values()))], [like.new_zeros(0, dtype=torch.long)], 0
    for bank in banks:
        pieces = _n_pieces(bank)
        parts = [bank.writes.get(path, like.new_zeros(pieces, width)) for path, width in widths.items()]
        blocks.append(torch.cat(parts, -1))
        owner = torch.arange(pieces, device=like.device) if bank.owner is None else bank.owner
        owners.append(owner + n)
        n += bank.n
    u, owner = torch.cat(blocks), torch.cat(owners)
    stops = torch.tensor([0, *widths.values()]).cumsum(0).tolist()
    writes = {path: slice(a, b) for path, a, b in zip(widths, stops, stops[1:], strict=False)}
    return Units(Pieces(like.new_zeros(len(u), d_in), u, owner), writes, banks, offset=offset)


def _n_pieces(bank: Bank) -> int:
    return len(next(iter(bank.writes.values())))


@torch.no_grad()
def unit_gates(units: Mapping[str, Units], trace: Trace) -> Gates:
    """How far each unit is on, as its method says."""
    found: Gates = {path: [] for path in units}
    for event in trace.events:
        own, inner = units[event.site.path], event.inner.detach()
        parts = inner.split([_n_pieces(bank) for bank in own.banks], -1) if own.banks else ()
        gates = [bank.importances(x) for bank, x in zip(own.banks, parts, strict=True)]
        found[event.site.path].append(torch.cat([inner[..., :0], *gates], -1))
    return found


def digest_of(fitted: Fitted) -> str:
    """The sha256 of all that units write."""
    found = {}
    for i, bank in enumerate(fitted.banks):
        found |= {f"{i}|writes|{path}": x for path, x in bank.writes.items()}
        found |= {f"{i}|offset|{path}": x for path, x in bank.offsets.items()}
    return tensor_digest(found)


# ------------------------------------------------------------ where they write


class Written(NamedTuple):
    """All units that write at one call of a site.

    Attributes:
        pieces: Theirs, of which u is what they write there.
        inner: Inner activations.
        open: Which of them are shown where.
        names: The site that each reads, and its number there.
        offset: What is written there always.
    """

    pieces: Pieces
    inner: Float[Tensor, "input position piece"]
    open: Bool[Tensor, "input position unit"]
    names: list[tuple[str, int]]
    offset: Tensor | float


def written_at(
    event: Event, trace: Trace, units: Mapping[str, Units], shown: Mapping[str, Sequence[Tensor]]
) -> Written:
    """The units that write at a call of a site, whatever site they read.

    Args:
        event: The call.
        trace: Its pass.
        units: Of every site.
        shown: Per site and call, which units are shown, (input, position, unit).
    """
    path = event.site.path
    n = len(next(iter(shown.values()))[0])
    rows = by_position(event.rows.detach(), n)
    none = rows[..., :0]
    us, owners, inner, opened = [rows[0, :0]], [none.new_zeros(0, dtype=torch.long)], [none], [none.bool()]
    names: list[tuple[str, int]] = []
    for reader, own in units.items():
        if path not in own.writes:
            continue
        read = next(one for one in trace.events if (one.site.path, one.call) == (reader, event.call))
        us.append(own.pieces.u[:, own.writes[path]])
        owners.append(own.pieces.owner + len(names))
        inner.append(by_position(read.inner.detach(), n))
        opened.append(shown[reader][event.call])
        names += [(reader, i) for i in range(own.pieces.n)]
    u = torch.cat(us)
    pieces = Pieces(u[:, :0], u, torch.cat(owners))
    return Written(pieces, torch.cat(inner, -1), torch.cat(opened, -1), names, units[path].offset)
