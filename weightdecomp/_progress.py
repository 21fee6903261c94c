"""Progress: one bar with the time left, and the caller's own callback."""

import sys
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

_OFTEN, _RARELY = 0.1, 10.0  # seconds between two pictures of a bar, on a terminal and in a file or notebook


def shown(visible: bool, total: int | None = None, doing: str | None = None) -> tqdm:
    """A bar on stderr with the time left; `update(0)` shows what else has changed, no more often than counts do."""
    every = _OFTEN if sys.stderr.isatty() else _RARELY
    return tqdm(
        total=total,
        desc=doing,
        disable=not visible,
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
        mininterval=every,
        miniters=0,
    )


class Progress:
    """A progress bar over the work units of a run: sites to start, steps to refine, and the closing computations."""

    def __init__(self, total: int, on_step: Callable[[int, dict[str, float]], None] | None, visible: bool) -> None:
        """Open the bar on stderr; an invisible one still calls `on_step`."""
        self.on_step = on_step
        self.bar = shown(visible, total)

    def __enter__(self) -> "Progress":
        """Enter with the bar open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar."""
        self.bar.close()

    def now(self, doing: str, units: int = 1) -> None:
        """Say what is being done, and count finished units."""
        self.bar.set_description_str(doing)
        self.bar.update(units)

    def step(self, step: int, terms: dict[str, float]) -> None:
        """Count a refinement step and pass its terms on."""
        self.bar.set_description_str("refining", refresh=False)
        self.bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in terms.items()), refresh=False)
        self.bar.update()
        if self.on_step is not None:
            self.on_step(step, terms)
