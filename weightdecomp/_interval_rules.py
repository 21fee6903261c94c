"""How intervals pass through single torch functions: one table from functions to rules."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weightdecomp._interval import SLACK, Interval, constant, ends, widened

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def _functions(names: str) -> Iterator[Any]:
    """Every torch function and tensor method of these names, in any of torch's spellings."""
    for name in names.split():
        for space in (torch, F, torch.Tensor):
            if callable(getattr(space, name, None)):
                yield getattr(space, name)


def rule(names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of every torch function and tensor method of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(_functions(names), function))
        return function

    return register


def _rules(names: str, template: Callable[..., Any], **settings: Any) -> None:
    """Make `template(function, ...)` the rule of each function of these names."""
    RULES.update({function: partial(template, function, **settings) for function in _functions(names)})


# --- functions that rise in every argument ---


def _at(end: str, value: Any) -> Any:
    """An argument with every interval in it replaced by one of its ends."""
    if isinstance(value, Interval):
        return getattr(value, end)
    if isinstance(value, list | tuple):
        return type(value)(_at(end, part) for part in value)
    # Integers and truth values are indices and masks.
    return constant(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def floating(dtype: torch.dtype | None) -> None:
    """Accept a floating point dtype, which changes nothing.

    Raises:
        TypeError: For another dtype.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"a cast to {dtype} rounds")


def _rising(function: Rule, *args: Any, slack: bool = False, magnitude: float = 0.0, **options: Any) -> Any:
    """Both ends through a non-decreasing function, which may return several tensors."""
    floating(options.pop("dtype", None))
    lo, hi = (
        function(*_at(end, args), **{key: _at(end, value) for key, value in options.items()}) for end in ("lo", "hi")
    )
    if isinstance(lo, Tensor):
        return widened(lo, hi, magnitude) if slack else Interval(lo, hi)
    if not all(part.is_floating_point() for part in lo):
        raise TypeError("indices of the largest entries are no interval")
    return tuple(map(Interval, lo, hi))


def _sum(function: Rule, x: Interval, *args: Any, **options: Any) -> Interval:
    """Sums and means: each end is widened by its own terms, so that sums of squares stay non-negative."""
    total = _rising(function, x, *args, **options)
    terms = _rising(function, Interval(-x.lo.abs(), x.hi.abs()), *args, **options)
    return Interval(total.lo + SLACK * terms.lo, total.hi + SLACK * terms.hi)


def _fact(function: Rule, x: Interval, *args: Any, **options: Any) -> Any:
    """What only the shape decides."""
    return function(x.lo, *args, **options)


_rules(
    """
    view reshape flatten unflatten permute transpose t swapaxes swapdims movedim unsqueeze squeeze view_as
    reshape_as chunk split tensor_split unbind narrow select index_select gather take_along_dim diagonal
    __getitem__ flip roll cat concat concatenate stack hstack vstack expand expand_as broadcast_to repeat
    repeat_interleave tile contiguous detach tril triu pad unfold pixel_shuffle where masked_fill relu clamp
    clamp_min clamp_max clip hardtanh relu6 maximum minimum max min amax amin max_pool1d max_pool2d max_pool3d
    adaptive_max_pool1d adaptive_max_pool2d
    """,
    _rising,
)
_rules(
    "exp expm1 log log1p log2 log10 sqrt tanh sigmoid erf atan asinh sinh logsigmoid softsign selu",
    _rising,
    slack=True,
)
# Here terms may cancel, to an error of some 50 units in the last place of 1.
_rules("hardsigmoid logsumexp", _rising, slack=True, magnitude=1.0)
_rules("sum mean cumsum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d", _sum)
_rules(
    """
    size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex get_device
    element_size zeros_like ones_like full_like new_zeros new_ones new_full
    """,
    _fact,
)


@rule("clone to type_as float double half bfloat16 cpu cuda")
def _copy(x: Interval, *args: Any, **options: Any) -> Interval:
    for target in (*args, *options.values()):
        floating(target if isinstance(target, torch.dtype) else getattr(target, "dtype", None))
    # A copy even where torch returns the tensor itself: whether a cast changes the dtype is not known here.
    return Interval(x.lo.clone(), x.hi.clone())


@rule("softplus")
def _softplus(x: Interval, beta: float | int = 1, threshold: float | int = 20) -> Interval:
    # Above beta x = threshold torch returns x, a step down by exp(-threshold) / beta: at 20 below SLACK x.
    if beta <= 0 or threshold < 20:
        raise TypeError("only with beta > 0 and threshold >= 20")
    return _rising(F.softplus, x, beta, threshold, slack=True)


@rule("leaky_relu")
def _leaky_relu(x: Interval, negative_slope: float | int = 0.01) -> Interval:
    return x.relu() - (-x).relu() * negative_slope


@rule("elu celu")
def _elu(x: Interval, alpha: float | int = 1.0) -> Interval:
    if alpha != 1:
        raise TypeError("only with alpha 1")
    return x.relu() + (-(-x).relu()).expm1()


# --- functions that fall, then rise ---


def _valley(function: Rule, bottom: float, x: Interval, magnitude: float = 0.0) -> Interval:
    lowest = torch.minimum(x.hi, x.lo.clamp_min(bottom))
    return widened(function(lowest), torch.maximum(function(x.lo), function(x.hi)), magnitude)


# The functions are flat at their bottoms, so what is missing in these digits is far below SLACK.
rule("abs absolute")(partial(_valley, torch.abs, 0.0))
rule("square")(partial(_valley, torch.square, 0.0))
rule("cosh")(partial(_valley, torch.cosh, 0.0))
rule("silu")(partial(_valley, F.silu, -1.2784645427610738, magnitude=1.0))
rule("mish")(partial(_valley, F.mish, -1.1924312145154754, magnitude=1.0))
rule("hardswish")(partial(_valley, F.hardswish, -1.5, magnitude=1.0))


@rule("gelu")
def _gelu(x: Interval, approximate: str = "none") -> Interval:
    bottom = {"none": -0.7517915246935645, "tanh": -0.7524614220710141}[approximate]
    return _valley(partial(F.gelu, approximate=approximate), bottom, x, magnitude=1.0)


@rule("pow")
def _power(x: Any, exponent: Any) -> Interval:
    if not isinstance(x, Interval) or not isinstance(exponent, int | float):
        raise TypeError("only a fixed number as exponent")
    if exponent < 0:
        return _reciprocal(_power(x, -exponent))
    if exponent % 2 == 0:
        return _valley(lambda base: base**exponent, 0.0, x)
    return _rising(torch.pow, x, exponent, slack=True)


@rule("rsqrt")
def _inverse_root(x: Interval) -> Interval:
    return _power(x, -0.5)


# --- arithmetic ---


@rule("neg negative")
def _negative(x: Interval) -> Interval:
    return Interval(-x.hi, -x.lo)


@rule("add")
def _add(x: Any, y: Any, *, alpha: float | int = 1) -> Interval:
    (x_lo, x_hi), (y_lo, y_hi) = ends(x), ends(y if alpha == 1 else y * alpha)
    return widened(x_lo + y_lo, x_hi + y_hi)


@rule("sub subtract")
def _subtract(x: Any, y: Any, *, alpha: float | int = 1) -> Interval:
    return _add(x, -(y if alpha == 1 else y * alpha))


@rule("mul multiply")
def _multiply(x: Any, y: Any) -> Interval:
    if x is y:
        return _power(x, 2)
    # A constant's two ends are one object, and count once.
    products = torch.stack([a * b for a in dict.fromkeys(ends(x)) for b in dict.fromkeys(ends(y))])
    return widened(products.amin(0), products.amax(0))


@rule("reciprocal")
def _reciprocal(x: Interval) -> Interval:
    signed = (x.lo > 0) | (x.hi < 0)
    return widened(torch.where(signed, 1 / x.hi, -torch.inf), torch.where(signed, 1 / x.lo, torch.inf))


@rule("div divide true_divide")
def _divide(x: Any, y: Any) -> Interval:
    return _multiply(x, _reciprocal(y) if isinstance(y, Interval) else 1 / constant(y))


# --- functions linear in each of their tensors ---


def _multilinear(function: Rule, *args: Any, **options: Any) -> Interval:
    r"""A function linear in each tensor, in centre and radius form.

    With :math:`x_k = c_k + d_k, |d_k| \le r_k`, and :math:`|f|` the function with every coefficient made
    positive, :math:`|f(x) - f(c)| \le |f|(|c| + r) - |f|(|c|)`. Exact where one argument is an interval; for
    the product of two at most 1.5 times too wide (S. M. Rump, Fast and parallel interval arithmetic, 1999).
    """
    center = [a.center if isinstance(a, Interval) else constant(a) for a in args]
    inner = [a.abs() if isinstance(a, Tensor) else a for a in center]
    outer = [b + a.radius if isinstance(a, Interval) else b for a, b in zip(args, inner, strict=True)]
    middle, largest = function(*center, **options), function(*outer, **options)
    radius = (largest - function(*inner, **options)).clamp_min(0) + SLACK * largest
    return Interval(middle - radius, middle + radius)


rule("einsum")(partial(_multilinear, torch.einsum))


@rule("matmul mm bmm")
def _matmul(x: Any, y: Any) -> Interval:
    if not (isinstance(x, Interval) and isinstance(y, Interval)) or min(x.ndim, y.ndim) < 2:
        return _multilinear(torch.matmul, x, y)
    # Exact for two intervals: the outer products of columns and rows, one inner index at a time.
    total = _multiply(x[..., :1], y[..., :1, :])
    for k in range(1, x.shape[-1]):
        total = _add(total, _multiply(x[..., k : k + 1], y[..., k : k + 1, :]))
    return total


@rule("linear")
def _linear(x: Any, weight: Any, bias: Any = None) -> Interval:
    rows = _matmul(x, weight.mT)
    return rows if bias is None else _add(rows, bias)


@rule("addmm baddbmm")
def _affine(bias: Any, x: Any, weight: Any) -> Interval:
    return _add(_matmul(x, weight), bias)


@rule("bilinear")
def _bilinear(x: Any, y: Any, weight: Any, bias: Any = None) -> Interval:
    rows = _multilinear(torch.einsum, "...i,oij,...j->...o", x, weight, y)
    return rows if bias is None else _add(rows, bias)


def _convolution(function: Rule, x: Any, weight: Any, bias: Any = None, *args: Any, **options: Any) -> Interval:
    maps = _multilinear(function, x, weight, None, *args, **options)
    return maps if bias is None else _add(maps, bias.reshape(-1, *[1] * (weight.ndim - 2)))


_rules("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _convolution)
