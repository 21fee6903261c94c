"""What a fit costs: processor time of this process, and memory at its peak."""

import time
from pathlib import Path
from types import TracebackType

import torch


class Meter:
    """Measures the block it surrounds.

    Attributes:
        cpu_seconds: Processor time of all threads of this process.
        peak_bytes: Growth of the resident memory at its peak, or of the accelerator's; None where the system does
            not tell.
    """

    cpu_seconds: float = 0.0
    peak_bytes: int | None = None

    def __enter__(self) -> "Meter":
        """Start."""
        self._cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = _resident("VmRSS") if _reset() else None
        self._cpu = time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.cpu_seconds = time.process_time() - self._cpu
        if self._before is not None:
            peak = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
            self.peak_bytes = max(0, peak - self._before)


def _reset() -> bool:
    """Let the peak count from now on; only Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
