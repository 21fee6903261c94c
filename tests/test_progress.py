"""Progress bars: drawn often on a terminal, now and then in a file."""

import io
import sys
from collections.abc import Callable

import pytest
from tqdm import tqdm

from weightdecomp._progress import shown

Opened = Callable[[io.StringIO], tqdm]


class Terminal(io.StringIO):
    """What a bar takes for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Opens a bar on a stream; by its clock a second is a count."""

    def on(stderr: io.StringIO) -> tqdm:
        monkeypatch.setattr(sys, "stderr", stderr)
        bar = shown(True, 60)
        monkeypatch.setattr(bar, "_time", lambda: float(bar.n))
        bar.last_print_t = bar.start_t = 0.0
        return bar

    return on


@pytest.mark.parametrize(("stderr", "drawn"), [(io.StringIO(), 6), (Terminal(), 60)])
def test_a_file_is_not_flooded(opened: Opened, stderr: io.StringIO, drawn: int):
    bar = opened(stderr)
    before = stderr.getvalue().count("\r")

    for _ in range(60):
        bar.update()

    assert stderr.getvalue().count("\r") - before == drawn
    bar.close()


def test_what_changes_without_a_count_is_drawn_too(opened: Opened):
    stderr = Terminal()
    bar = opened(stderr)
    bar.update()
    bar.last_print_t = 0.0

    bar.set_postfix_str("step 7", refresh=False)
    bar.update(0)

    assert "step 7]" in stderr.getvalue()
    bar.close()
