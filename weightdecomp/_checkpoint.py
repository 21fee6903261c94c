"""Checkpoints: a run's progress on disk, so that a killed run ends where an unbroken one would."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightdecomp import _storage
from weightdecomp._cost import Cost, Meter
from weightdecomp._processes import ALONE, Processes

_KIND = "checkpoint"
_SHARE = 0.05  # of the run's time at most is spent on writing checkpoints
_LEAST = 0.5  # seconds between two of them


class Checkpoint:
    """Progress of one run in a folder; without a folder it keeps nothing.

    Of several processes the first one reads and writes, and all know what was read. How many there are is not part of
    what is kept: any number of processes goes on from it.

    Attributes:
        tensors: What was last loaded, and in the process that writes also what was saved.
        document: The same, for plain values.
    """

    def __init__(self, directory: str | Path | None, key: Mapping[str, Any], processes: Processes = ALONE) -> None:
        """Open a folder that is empty, new, or holds the same run.

        Raises:
            ValueError: If the folder holds another run, naming what differs, or something else.
        """
        self.directory = None if directory is None else Path(directory)
        self.key = dict(key)
        self.tensors: dict[str, Tensor] = {}
        self.document: dict[str, Any] = {}
        self._written, self._writing = time.monotonic(), 0.0
        self._meter, self._earlier = Meter(), Cost(0.0, None)
        self._processes = processes
        self._writes = self.directory is not None and processes.index == 0
        if self.directory is not None:
            self.tensors, self.document = processes.from_first(self._opened)
            self._earlier = Cost(**self.document.pop("cost", asdict(self._earlier)))

    def _opened(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the folder holds."""
        assert self.directory is not None
        _storage.check_vacant(self.directory, _KIND)
        if not _storage.exists(self.directory, _KIND):
            return {}, {}
        tensors, document = _storage.read(self.directory, _KIND)
        self._same_run(document["key"])
        return tensors, document

    def _same_run(self, saved: Mapping[str, Any]) -> None:
        different = sorted(name for name in {*saved, *self.key} if saved.get(name) != self.key.get(name))
        if different:
            raise ValueError(
                f"checkpoint={str(self.directory)!r} holds another run: {', '.join(different)} differ; "
                "choose an empty folder, or repeat that run's call to resume it"
            )

    def keep(
        self,
        tensors: Mapping[str, Tensor],
        document: Mapping[str, Any],
        now: bool = False,
        state: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        """Add to what is kept, and write it to disk when due (or at once); `state` is asked for more to write then."""
        self.document |= document
        if self._writes:
            self.tensors |= tensors
        if self.directory is None or not (now or self._due()):
            return
        changed, cost = state(), asdict(self.cost())
        if self._writes:
            self.tensors |= changed
            started = time.monotonic()
            _storage.write(self.directory, _KIND, self.tensors, {**self.document, "key": self.key, "cost": cost})
            self._written = time.monotonic()
            self._writing = self._written - started

    def _due(self) -> bool:
        """Whether it is time to write, by the clock of the process that writes."""
        due = time.monotonic() - self._written > max(_LEAST, self._writing / _SHARE)
        return bool(self._processes.total(int(self._writes and due)))

    def cost(self) -> Cost:
        """Of the run up to now in all processes, with its parts before it was resumed."""
        own = self._meter.cost
        row = [own.cpu_seconds, -1.0 if own.peak_bytes is None else own.peak_bytes]
        every = self._processes.rows(torch.tensor([row], dtype=torch.float64))
        peak = max(int(every[:, 1].max()), -1 if self._earlier.peak_bytes is None else self._earlier.peak_bytes)
        return Cost(self._earlier.cpu_seconds + float(every[:, 0].sum()), None if peak < 0 else peak)

    def forget(self) -> None:
        """Let go of what was loaded, in processes that will not write it again."""
        if not self._writes:
            self.tensors = {}

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Kept tensors whose name begins with a prefix, by the rest of their names."""
        return {name[len(prefix) :]: x for name, x in self.tensors.items() if name.startswith(prefix)}
