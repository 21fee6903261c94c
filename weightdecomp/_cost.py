"""What work costs: processor time of this process, and memory at its peak."""

import ctypes
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Cost:
    """Of a fit or a run.

    Attributes:
        cpu_seconds: Processor time of all threads; of several processes, their sum.
        peak_bytes: Growth of the resident memory at its peak, or of the accelerator's; of several processes, the
            largest. None where the system does not tell.
    """

    cpu_seconds: float
    peak_bytes: int | None


class Meter:
    """Measures what is done from when it is made."""

    def __init__(self, fresh: bool = False) -> None:
        """Start.

        Args:
            fresh: Let the system forget earlier peaks of this process; where it does not, there is no figure. Without,
                its own accounting is left alone, and a peak from before counts where it was higher.
        """
        self._cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        forgotten = self._forget() if fresh else True
        self._before = torch.cuda.memory_allocated() if self._cuda else _resident("VmRSS") if forgotten else None
        self._cpu = time.process_time()

    def _forget(self) -> bool:
        """Whether the peak counts from now on."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return True
        # Memory that was freed but is still held would hide what comes next; only glibc gives it back.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False  # only Linux forgets a peak, and not everywhere
        return True

    @property
    def cost(self) -> Cost:
        """Up to now."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
        grown = None if peak is None or self._before is None else max(0, peak - self._before)
        return Cost(time.process_time() - self._cpu, grown)


def _resident(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)
