"""The beginning of a run: the starts of all sites, made and kept, and opened together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from weightdecomp._attack import Ablation
from weightdecomp._checkpoint import Checkpoint
from weightdecomp._config import Config
from weightdecomp._divergence import Divergence
from weightdecomp._fit import Start, chosen_start
from weightdecomp._frame import Frame, frame
from weightdecomp._gatekeeper import Gated, Gatekeeper
from weightdecomp._pieces import Pieces
from weightdecomp._portfolio import READINGS
from weightdecomp._processes import Processes
from weightdecomp._progress import Progress
from weightdecomp._sample import Sample
from weightdecomp._sharded import overlaid, stored
from weightdecomp._sites import Site


def site_starts(
    bar: Progress,
    saved: Checkpoint,
    model: nn.Module,
    sample: Sample,
    sites: Sequence[Site],
    divergence: Divergence,
    tolerance: float,
    config: Config,
    processes: Processes,
) -> Iterator[tuple[Site, Start]]:
    """The start of every site, from the checkpoint where it is there already; processes make theirs side by side."""
    for first in range(0, len(sites), processes.n):
        turn = sites[first : first + processes.n]
        made, document = dict[str, Tensor](), None
        for site in processes.own(turn):
            bar.now(f"start of {site.path or 'the model'}", len(turn))
            if site.path not in saved.document.get("starts", {}):
                start = chosen_start(model, sample, site, divergence, tolerance, config, tolerance / len(sites))
                # Contiguous as when read back from disk, since sums over another layout round differently (R1).
                made = {name: x.contiguous() for name, x in _values(start).items()}
                document = [start.name, start.bits, start.work, start.gain]
        for source, site in enumerate(turn):
            prefix, known = f"start|{site.path}|", saved.document.get("starts", {})
            if site.path in known:
                values, told = saved.under(prefix), known[site.path]
            else:
                values, told = processes.sent(source, made, document)
                saved.keep({prefix + name: x for name, x in values.items()}, {"starts": {**known, site.path: told}})
            yield site, _start(site, values, *told)


def _values(start: Start) -> dict[str, Tensor]:
    """Tensors of a start as a checkpoint keeps them."""
    values = {**start.pieces._asdict(), **start.origin}
    if start.readings is not None:
        pieces, held = start.readings
        values |= {f"{READINGS}.{name}": x for name, x in {**pieces._asdict(), "held": held}.items()}
    return values


def _start(
    site: Site, kept: Mapping[str, Tensor], name: str, bits: float, work: dict[str, float], gain: float
) -> Start:
    """The start of one site from what a checkpoint keeps."""
    values = {name: x.to(site.weight.device) for name, x in kept.items()}
    pieces, origin = _pieces(values, ""), {name: values[name] for name in ("basis", "power", "held")}
    read = f"{READINGS}."
    readings = (_pieces(values, read), values[f"{read}held"]) if f"{read}held" in values else None
    return Start(name, pieces, bits, work, origin, readings, gain)


def _pieces(values: Mapping[str, Tensor], prefix: str) -> Pieces:
    return Pieces(*[values[prefix + name] for name in Pieces._fields])


class Begun(NamedTuple):
    """One start of every site.

    Attributes:
        pieces: Components.
        frames: Where they may move.
        names: Of the starts.
        bits: Naming and values per input of the cheapest starts there are, summed over sites.
    """

    pieces: Mapping[str, Pieces]
    frames: dict[str, Frame]
    names: dict[str, str]
    bits: float


def begun(starts: Iterable[tuple[Site, Start]], processes: Processes) -> list[Begun]:
    """The chosen starts and, where sites have readings that do little more work, the same with readings there.

    Opening gates takes time, so that readings must cost less one by one to begin with, all these sites together.
    """
    frames, names, bits = dict[str, Frame](), dict[str, str](), list[float]()
    read = list[tuple[Site, Start]]()

    def pieces() -> Iterator[tuple[str, Pieces]]:
        for site, start in starts:
            frames[site.path], names[site.path] = _frame(site, start), start.name
            bits.append(start.bits)
            if start.readings is not None:
                read.append((site, start.read()))
            yield site.path, start.pieces

    plain = Begun(stored(pieces(), processes), frames, names, sum(bits))
    if sum(start.gain for _, start in read) <= 0:
        return [plain]
    other = stored(((site.path, start.pieces) for site, start in read), processes)
    other_frames = {site.path: _frame(site, start) for site, start in read}
    other_names = {site.path: start.name for site, start in read}
    return [plain, Begun(overlaid(plain.pieces, other), frames | other_frames, names | other_names, plain.bits)]


def _frame(site: Site, start: Start) -> Frame:
    return frame(**start.origin, matrix=site.matrix(), pieces=start.pieces)


def opened(
    ablation: Ablation, choice: Sequence[Begun], sample: Sample, tolerance: float, seed: int, saved: Checkpoint
) -> tuple[Begun, Gated | None]:
    """The beginning whose gates are the cheaper under attack, and these gates where they had to be opened for that.

    A site by itself tells little about readings: closed ones leave nothing that attacks could add up over sites. Their
    number is their own, so that the dictionary counts.
    """
    if len(choice) == 1 or "read" in saved.document:
        return choice[saved.document.get("read", 0)], None
    plain, read = (Gatekeeper(ablation._replace(pieces=one.pieces), sample, tolerance, seed).gates() for one in choice)
    fewer = read.ledger.total < plain.ledger.total
    wins = fewer and not read.damage > tolerance >= plain.damage
    saved.keep({}, {"read": int(wins)})
    return (choice[1], read) if wins else (choice[0], plain)
