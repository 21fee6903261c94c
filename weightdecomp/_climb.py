"""The climb: how sources move uphill, in many searches side by side. Knows tensors only, no models."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

GAIN = 1e-3  # relative improvement below which a step counts as failed, and a whole search as standing still
_TRIES = 3  # failed steps in a row that end a climb
_FRESH = 0.3  # share of climbs that start anywhere; the others start near the best sources so far
_FLIPPED = 0.2  # at most this share of the best sources is flipped for such a start


class Climb:
    """Sources of every restart and group of inputs, with what they found and what they try next.

    A climb goes from vertex to vertex of the box: each step goes to the vertex that the gradient points at,
    which never loses where the value is convex in the sources. A step that fails is tried again with a random
    half of its changes, then a quarter; then a new climb begins, anywhere or near the best sources of the
    group's restarts.

    Attributes:
        sources: Where the value and its gradient are wanted next.
        best: Highest value of each restart so far.
    """

    sources: Float[Tensor, "restart group source"]
    best: Float[Tensor, "restart group"]

    def __init__(self, restarts: int, groups: int, width: int, like: Tensor, rng: torch.Generator) -> None:
        """Start from uniform sources, from zeros, and from further uniform sources."""
        self.rng, self.device = rng, like.device
        self.sources = self._rand((restarts, groups, width)).to(like)
        self.sources[1:2] = 0
        self.best = self.sources.new_full((restarts, groups), -1.0)
        self._best_sources = self.sources.clone()
        # The highest value of the present climb, its sources, and the vertex to go to from there.
        self._top, self._base, self._goal = self.best.clone(), self.sources.clone(), self.sources.clone()
        self._failed = torch.zeros_like(self.best, dtype=torch.long)

    def step(self, value: Float[Tensor, "restart group"], grad: Float[Tensor, "restart group source"]) -> None:
        """Take in what the present sources do, and choose the next ones."""
        # An undefined output is the worst there is; the sign of its undefined gradient is 0.
        value = value.nan_to_num(nan=torch.inf, posinf=torch.inf)
        risen, record = value > self._top * (1 + GAIN), value > self.best
        self._failed = torch.where(risen, 0, self._failed + 1)
        self._top = torch.where(risen, value, self._top)
        self.best = torch.where(record, value, self.best)
        self._best_sources = torch.where(record[..., None], self.sources, self._best_sources)
        self._base = torch.where(risen[..., None], self.sources, self._base)
        goal = (self.sources + grad.sign()).clamp(0, 1)
        self._goal = torch.where(risen[..., None], goal, self._goal)
        again, over = (self._failed > 0) & (self._failed < _TRIES), self._failed >= _TRIES
        self.sources = self._goal.clone()
        self.sources[again] = self._partial(again)
        self.sources[over] = self._start(over)
        self._top[over], self._failed[over] = -1.0, 0

    def worst(self) -> Float[Tensor, "group source"]:
        """The sources with the highest value so far of all restarts, for each group."""
        groups = torch.arange(self.best.shape[1], device=self.best.device)
        return self._best_sources[self.best.argmax(0), groups]

    def _partial(self, rows: Bool[Tensor, "restart group"]) -> Float[Tensor, "row source"]:
        """A random half, quarter ... of the changes that failed together."""
        base, goal = self._base[rows], self._goal[rows]
        return torch.where(self._rand(base.shape) < 0.5 ** self._failed[rows][:, None], goal, base)

    def _start(self, rows: Bool[Tensor, "restart group"]) -> Float[Tensor, "row source"]:
        """A vertex anywhere, with a random share of ones, or one near the best of all restarts."""
        group = rows.nonzero()[:, 1]
        near = self.worst()[group]
        near = torch.where(self._rand(near.shape) < _FLIPPED * self._rand((len(group), 1)), 1 - near, near)
        anywhere = (self._rand(near.shape) < self._rand((len(group), 1))).to(near.dtype)
        return torch.where(self._rand((len(group), 1)) < _FRESH, anywhere, near)

    def _rand(self, shape: Sequence[int]) -> Tensor:
        drawn = torch.rand(tuple(shape), generator=self.rng, device=self.rng.device, dtype=torch.float32)
        return drawn.to(self.device)
