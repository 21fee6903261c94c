"""What a run was made from, so that it can be made again."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Made:
    """What a run's result depends on beside its settings, its tolerance and the target.

    Attributes:
        seed: Of every random draw.
        inputs: How many it was given.
        sha256: Of them.
        version: Of this package.
    """

    seed: int
    inputs: int
    sha256: str
    version: str


def package_version() -> str:
    """The installed version of this package."""
    try:
        return version("weightdecomp")
    except PackageNotFoundError:  # run from its folder, without being installed
        return "not installed"
