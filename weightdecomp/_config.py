"""Settings of a run; the defaults serve every task."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a decomposition. None of them needs tuning for a task.

    Attributes:
        steps: Gradient steps at most that refine the components after the closed-form starts; 0 keeps the starts.
        batch: Rows (inputs or positions) in a step.
        sample: Rows (inputs or positions) that thresholds are computed on.
        capacity: Most components a site may have, as a multiple of the smaller side of its matrix.
        rate: Step size of Adam, relative to the root mean square of each factor.
        adversarial: Share of a step's inputs whose sources the adversary chooses; the rest are random.
        rounds: How often the thresholds are recomputed during the steps.
    """

    steps: int = 1200
    batch: int = 1024
    sample: int = 4096
    capacity: float = 8.0
    rate: float = 0.01
    adversarial: float = 0.5
    rounds: int = 12

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        for field in fields(self):
            value, whole = getattr(self, field.name), field.type is int
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise TypeError(f"{field.name} must be a {'whole ' if whole else ''}number, got {value!r}")
        for name, least in (("steps", 0), ("batch", 1), ("sample", 1), ("capacity", 1), ("rounds", 1)):
            value = getattr(self, name)
            if not least <= value < math.inf:  # which nan is not either
                raise ValueError(f"{name} must be at least {least} and finite, got {value}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be positive and finite, got {self.rate}")
        if not 0 <= self.adversarial <= 1:
            raise ValueError(f"adversarial must be in [0, 1], got {self.adversarial}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Settings from plain values.

        Raises:
            ValueError: For names that are no setting of this version.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown settings {unknown}; this version knows {sorted(known)}")
        return cls(**values)
