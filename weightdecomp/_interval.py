"""Interval: a box of tensors that runs through a model's own forward code.

An `Interval` has a lower and an upper end for every entry of a tensor and stands in for that tensor in a
module's `forward`. For each torch function a rule says how boxes pass through it, so that every value the
function takes on the input box lies in the output box. A function without a rule raises
`UnsupportedOperation`; nothing is guessed.

Rounding. All ends are float64, and every rule that rounds widens its result by `SLACK` of the sum of the
absolute values of the terms it adds. A float64 sum of n terms, in any order, errs by at most n 2^-53 of that
sum (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2) and elementary functions by a few
units in the last place, so 1e-9 covers sums of four million terms. Underflow (below 1e-307) is not counted.
The model is meant as a function of real numbers: what the target itself rounds away in its own dtype is not
part of a box.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

SLACK = 1e-9
_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "requires_grad"} | {
    f"is_{kind}" for kind in ("cuda", "nested", "sparse", "quantized", "meta")
}


class UnsupportedOperation(ValueError):
    """A torch function that intervals have no rule for, so that there is no bound.

    Attributes:
        operation: The function's name.
    """

    def __init__(self, operation: str, reason: str = "intervals have no rule for it"):
        super().__init__(f"no bound: operation '{operation}' ({reason})")
        self.operation = operation


def _method(name: str) -> Callable[..., Any]:
    member = getattr(torch.Tensor, name)

    def method(self: "Interval", *args: Any, **kwargs: Any) -> Any:
        return Interval.__torch_function__(member, (), (self, *args), kwargs)

    return method


class Interval:
    """A box of tensors, `lo <= x <= hi` entry by entry, usable where a module's forward expects a tensor.

    Entries are independent of one another: two entries that move together in truth are bounded as if they did
    not. An undefined end (NaN, such as the root of a negative number) makes its entry unbounded. The interval
    owns its ends: in-place operations write to them, through views too. Casts to a floating point dtype
    change nothing, so `dtype` is always float64.

    Attributes:
        lo: Lower ends, float64.
        hi: Upper ends, float64.

    Raises:
        ValueError: If the ends differ in shape or a lower end is above its upper end.
    """

    def __init__(self, lo: Tensor, hi: Tensor):
        if lo.shape != hi.shape:
            raise ValueError(f"ends of an interval must agree in shape, got {(*lo.shape,)} and {(*hi.shape,)}")
        self.lo, self.hi = constant(lo), constant(hi)
        if self.hi.data_ptr() == self.lo.data_ptr():
            self.hi = self.hi.clone()
        undefined = self.lo.isnan() | self.hi.isnan()
        if undefined.any():
            self.lo = self.lo.masked_fill(undefined, -torch.inf)
            self.hi = self.hi.masked_fill(undefined, torch.inf)
        if (self.lo > self.hi).any():
            raise ValueError("a lower end of the interval is above its upper end; pass Interval(lo, hi), lo <= hi")

    @staticmethod
    def of(value: "Interval | Tensor") -> "Interval":
        """The interval itself, or the box that holds just this tensor."""
        return value if isinstance(value, Interval) else Interval(value.clone(), value.clone())

    @property
    def center(self) -> Tensor:
        """Midpoints, to rounding."""
        return self.lo / 2 + self.hi / 2

    @property
    def radius(self) -> Tensor:
        """Half widths: the larger distance of the two ends from `center`."""
        return torch.maximum(self.hi - self.center, self.center - self.lo)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass boxes through one torch function by its rule."""
        from weightdecomp._interval_layers import (
            RULES,
        )  # the rules build intervals, so they import this module

        options, name = dict(kwargs or {}), str(getattr(func, "__name__", func))
        in_place = options.pop("inplace", False)
        if name.endswith("_") and not name.endswith("__"):
            in_place, func = True, getattr(torch.Tensor, name[:-1], None)
        if func not in RULES or (in_place and not isinstance(args[0], Interval)):
            raise UnsupportedOperation(name)
        try:
            result = RULES[func](*args, **options)
        except (IndexError, KeyError, TypeError) as error:  # an argument that the rule does not take
            raise UnsupportedOperation(name, f"with these arguments: {error}") from error
        if not in_place:
            return result
        args[0].lo.copy_(result.lo)
        args[0].hi.copy_(result.hi)
        return args[0]

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:
            return getattr(self.lo, name)
        if name in ("T", "mT"):
            return Interval(getattr(self.lo, name), getattr(self.hi, name))
        # Double underscores are Python's own questions (copying, array protocols), to which the answer is no.
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"an Interval has no attribute '{name}'")
        if not callable(getattr(torch.Tensor, name)):
            raise UnsupportedOperation(name)
        return partial(_method(name), self)

    def __setitem__(self, index: Any, value: "Interval | Tensor | float") -> None:
        self.lo[index], self.hi[index] = ends(value)

    def __iter__(self) -> Iterator["Interval"]:
        return iter(self.unbind(0))

    def __len__(self) -> int:
        return len(self.lo)

    def __repr__(self) -> str:
        return f"Interval(lo={self.lo}, hi={self.hi})"

    def __rsub__(self, other: Any) -> "Interval":
        return -self + other

    def __rtruediv__(self, other: Any) -> "Interval":
        return self.reciprocal() * other

    def __rmatmul__(self, other: Tensor) -> "Interval":
        return torch.matmul(other, self)  # type: ignore[reportArgumentType]

    __add__ = __radd__ = _method("add")
    __sub__, __truediv__, __pow__, __matmul__ = map(_method, ("sub", "div", "pow", "matmul"))
    __mul__ = __rmul__ = _method("mul")
    __neg__, __abs__, __getitem__ = map(_method, ("neg", "abs", "__getitem__"))
    __iadd__, __isub__, __imul__, __itruediv__ = map(_method, ("add_", "sub_", "mul_", "div_"))
    # Branches on values and rounding have no interval form: every one of these raises UnsupportedOperation.
    __eq__, __ne__, __lt__, __le__, __gt__, __ge__ = map(_method, ("eq", "ne", "lt", "le", "gt", "ge"))
    __bool__, __float__, __int__, __index__ = map(_method, ("__bool__", "__float__", "__int__", "__index__"))
    __rpow__, __floordiv__, __rfloordiv__, __mod__ = map(
        _method, ("__rpow__", "floor_divide", "__rfloordiv__", "remainder")
    )
    __hash__ = object.__hash__


def constant(value: Any) -> Any:
    """Tensors in float64 without a gradient, everything else as it is.

    Raises:
        UnsupportedOperation: For complex tensors.
    """
    if not isinstance(value, Tensor):
        return value
    if value.is_complex():
        raise UnsupportedOperation("complex", "intervals are real")
    return value.detach().to(torch.float64)


def ends(value: Any) -> tuple[Any, Any]:
    """Lower and upper end of an operand: of an interval its own, of a tensor or number that itself twice."""
    return (value.lo, value.hi) if isinstance(value, Interval) else (constant(value),) * 2


def widened(lo: Tensor, hi: Tensor, magnitude: Tensor | float = 0.0) -> Interval:
    """The box of two rounded ends, moved outward by SLACK of themselves and of a magnitude."""
    # An infinite end times (1 +- SLACK) stays itself, where adding an infinite widening would be undefined.
    return Interval(lo * (1 - SLACK * lo.sign()) - SLACK * magnitude, hi * (1 + SLACK * hi.sign()) + SLACK * magnitude)
