"""What all tests share: a seeded generator, one thread, and the data that may be missing."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

# The packages are imported inside the fixtures: whatever is imported here, before pytest is configured, would go
# without the shape checks.
if TYPE_CHECKING:
    import weightdecomp

_DATA = Path(__file__).parents[2] / "shared" / "data"

# One thread: the tests' matrices are too small to share out, decompositions of matrices crawl when threads
# compete for two cores, and sums then have one order. The variable makes child processes agree.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# What is started in the background ignores Ctrl-C, and so would the children that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples at every run, and no verdict that hangs on how busy the machine is.
settings.register_profile(
    "suite", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Modules that a test makes without a seed of its own have the same weights in every run."""
    torch.default_generator.manual_seed(0)


@pytest.fixture
def rng() -> torch.Generator:
    """A generator with the same seed in every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def types_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations as a user has them, unchecked, so that our own checks see what came."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short attacks, few steps of a start, and one null, for runs that are not asked how good their result is."""
    from weightdecomp import _gatekeeper, _independent, _null, _trade

    monkeypatch.setattr(_gatekeeper, "REVIEW", (4, *_gatekeeper.REVIEW[1:]))
    monkeypatch.setattr(_gatekeeper, "_SCOUT", (2, *_gatekeeper._SCOUT[1:]))
    monkeypatch.setattr(_gatekeeper, "_PLAY", (2, 2))
    monkeypatch.setattr(_trade, "_ROUNDS", 4)
    monkeypatch.setattr(_null, "_DRAWS", 1)
    monkeypatch.setattr(_independent, "_STEPS", 10)


@pytest.fixture
def quick(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a null."""
    from weightdecomp import _decompose

    monkeypatch.setattr(_decompose, "null_effort", lambda *_: 1.0)


@pytest.fixture(scope="session")
def decomposed() -> "weightdecomp.Decomposition":
    """A two-layer MLP decomposed on sparse inputs; do not change it."""
    from tests.models import mlp, sparse
    from weightdecomp import Config, decompose

    config = Config(steps=20, sample=256, batch=64, rounds=2)
    return decompose(mlp(), [sparse(256, 5)], config=config, progress=False)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data and checkpoints, for tests marked `data`."""
    return _DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `data` where the data is missing."""
    if _DATA.is_dir():
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=f"there is no folder {_DATA}"))
