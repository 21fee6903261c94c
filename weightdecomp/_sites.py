"""Sites: the weight matrices of a target, one uniform view of every module type that holds one."""

import difflib
import fnmatch
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from weightdecomp._batches import Batch, call, select, tensors
from weightdecomp._batches import size as n_inputs

NO_PATTERN = "matches none of the given patterns in sites="
"""Why a matrix that the user left out is not decomposed."""
_HALF = (torch.float16, torch.bfloat16)
_WIDEST = 8192  # numbers in a site's input row, whose second moment is diagonalised


class Skipped(NamedTuple):
    """A parameter that is not decomposed, with the reason and what to do about it."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Site:
    """One weight matrix of the target, named by its module path.

    A call of the module is seen as `y = x W^T + bias` on row vectors x. `read` and `write` translate between the
    module's own layout and these rows, so that nothing else in the package knows module types.

    Attributes:
        path: Module path, as in `model.get_submodule(path)`.
        module: The target's module; its parameters are read, never written.
        n_calls: How often one forward pass of the target calls the module.
    """

    path: str
    module: Any
    n_calls: int = 1

    @property
    def weight(self) -> Tensor:
        """The target's parameter, in its own layout."""
        return self.module.weight

    @property
    def dtype(self) -> torch.dtype:
        """Components are kept in the target's dtype, half precision targets in float32."""
        return torch.float32 if self.weight.dtype in _HALF else self.weight.dtype

    def matrix(self) -> Float[Tensor, "d_out d_in"]:
        """W as a detached matrix that maps input rows to output rows."""
        return self._matrix(self.weight).detach().to(self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the matrix."""
        d_out, d_in = self._matrix(self.weight).shape
        return d_out, d_in

    def as_weight(self, matrix: Float[Tensor, "d_out d_in"]) -> Tensor:
        """The matrix in the layout of the module's own parameter."""
        return matrix.reshape(self.weight.shape)

    def vectors(self, operands: Sequence[Tensor]) -> Float[Tensor, "*batch d_in"]:
        """The input rows themselves; large for convolutions and embeddings."""
        eye = torch.eye(self.shape[1], dtype=self.dtype, device=self.weight.device)
        return self.read(operands, eye)

    def read(
        self, operands: Sequence[Tensor], directions: Float[Tensor, "piece d_in"]
    ) -> Float[Tensor, "*batch piece"]:
        """Inner products of the call's input rows with the given directions."""
        return operands[0].to(self.dtype) @ directions.T

    def write(self, rows: Float[Tensor, "*batch d_out"], operands: Sequence[Tensor]) -> Tensor:
        """The module's output for given output rows: bias, layout and dtype as the module's own."""
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            rows = rows + bias.to(self.dtype)
        return rows.to(self.weight.dtype)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight


class _Linear(Site):
    def vectors(self, operands: Sequence[Tensor]) -> Tensor:
        return operands[0].to(self.dtype)


class _Transposed(_Linear):
    """Transformers' Conv1D: a linear map that stores its weight as (d_in, d_out)."""

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T


class _Embedding(Site):
    """A lookup is a product with one-hot rows: d_in is the vocabulary."""

    def read(self, operands: Sequence[Tensor], directions: Tensor) -> Tensor:
        return F.embedding(operands[0], directions.T)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T


class _ScaledEmbedding(_Embedding):
    """A lookup times a constant, as in Gemma; W holds the constant, the parameter does not."""

    def as_weight(self, matrix: Tensor) -> Tensor:
        return super().as_weight(matrix) / self.module.embed_scale

    def _matrix(self, weight: Tensor) -> Tensor:
        return super()._matrix(weight) * self.module.embed_scale


class _Bilinear(Site):
    """nn.Bilinear is linear in the outer product of its two inputs."""

    def read(self, operands: Sequence[Tensor], directions: Tensor) -> Tensor:
        left, right = (x.to(self.dtype) for x in operands[:2])
        kernel = directions.reshape(-1, left.shape[-1], right.shape[-1])
        return torch.einsum("...i,pij,...j->...p", left, kernel, right)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)


class _Conv(Site):
    """A convolution is linear in its patches; the rows are (batch, flattened output positions)."""

    def read(self, operands: Sequence[Tensor], directions: Tensor) -> Tensor:
        x, padding = operands[0].to(self.dtype), self.module.padding
        if self.module.padding_mode != "zeros":
            x = F.pad(x, self.module._reversed_padding_repeated_twice, mode=self.module.padding_mode)
            padding = 0
        kernel = directions.reshape(-1, *self.weight.shape[1:])
        convolve = F.conv1d if self._n_spatial == 1 else F.conv2d
        maps = convolve(x, kernel, None, self.module.stride, padding, self.module.dilation)
        return maps.flatten(-self._n_spatial).mT

    def write(self, rows: Tensor, operands: Sequence[Tensor]) -> Tensor:
        return super().write(rows, operands).mT.unflatten(-1, self._positions(operands[0]))

    @property
    def _n_spatial(self) -> int:
        return self.weight.ndim - 2

    def _positions(self, x: Tensor) -> list[int]:
        module, sizes = self.module, []
        total = module._reversed_padding_repeated_twice
        for axis, size in enumerate(x.shape[-self._n_spatial :]):
            # torch keeps the two-sided padding per axis, last axis first.
            both = sum(total[2 * (self._n_spatial - 1 - axis) :][:2])
            reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
            sizes.append((size + both - reach - 1) // module.stride[axis] + 1)
        return sizes

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)


def _site_class(module: nn.Module) -> type[Site] | None:
    if isinstance(module, nn.Linear):
        return _Linear
    if isinstance(module, nn.Embedding):
        scaled = hasattr(module, "embed_scale") and type(module).forward is not nn.Embedding.forward
        return _ScaledEmbedding if scaled else _Embedding
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _Conv
    if isinstance(module, nn.Bilinear):
        return _Bilinear
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return _Transposed
    return None


def _refusal(module: Any) -> str | None:
    """Why a module of a known type cannot be a site, or None."""
    if module.weight.numel() == 0:
        return "has no entries; nothing to decompose"
    if not module.weight.is_floating_point():
        return f"is {module.weight.dtype}, not floating point; dequantise it first"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1:
        return f"belongs to a convolution with groups={module.groups}; replace it by one convolution per group"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "is renormalised in place at every call (max_norm); set max_norm=None after training"
    if not isinstance(module.weight, nn.Parameter) and not parametrize.is_parametrized(module, "weight"):
        return "is computed anew before every call by a hook; remove it (torch.nn.utils.remove_weight_norm) first"
    if not module.weight.any():
        return "is zero everywhere; nothing to decompose"
    kind = _site_class(module)
    assert kind is not None
    if (d_in := kind("", module, 1).shape[1]) > _WIDEST:
        return (
            f"reads rows of {d_in:,} numbers, more than {_WIDEST:,}: their second moment alone would take "
            f"{d_in**2 * 8 / 2**30:.1f} GiB; decompose the matrices that read its output instead"
        )
    return None


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Keep torch from running fused encoder layers that never call their inner modules."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _UseWatcher(TorchFunctionMode):
    """Notes which parameters torch functions receive while no candidate module is running."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.depth, self.uses = names, 0, dict[str, str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.depth:
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, nn.Parameter) and id(value) in self.names:
                    name = getattr(func, "__name__", str(func))
                    if name not in ("__get__", "dim", "size", "is_floating_point"):
                        self.uses.setdefault(self.names[id(value)], name)
        return func(*args, **(kwargs or {}))


def _writes_its_own_forward(module: nn.Module) -> bool:
    known = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Bilinear)
    return isinstance(module, known) and all(type(module).forward is not kind.forward for kind in known)


def _is_matrix_product(module: Any, operands: Sequence[Any], output: Any) -> bool:
    """Whether a call of the module returned what its site would."""
    kind = _site_class(module)
    assert kind is not None
    site = kind("", module)
    try:
        own = site.write(site.read(operands, site.matrix()), operands)
    except (TypeError, RuntimeError, IndexError):  # its arguments are no input rows
        return False
    # Far above rounding in half precision, far below another function.
    return own.shape == output.shape and bool((own - output).abs().max() <= 1e-2 * output.abs().max())


def _observe(model: nn.Module, candidates: dict[str, nn.Module], batch: Batch) -> tuple[dict, dict, set[str]]:
    """Shapes of every candidate's calls, parameters used outside them, and who computes something else, in one pass."""
    shapes: dict[str, list[torch.Size]] = {path: [] for path in candidates}
    others = set[str]()
    watcher = _UseWatcher({id(p): name for name, p in model.named_parameters()})

    def before(path: str, args: tuple, kwargs: dict) -> None:
        watcher.depth += 1
        shapes[path].append((*args, *kwargs.values())[0].shape)

    def after(path: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if _writes_its_own_forward(module) and not _is_matrix_product(module, (*args, *kwargs.values()), output):
            others.add(path)
        watcher.depth -= 1

    handles = []
    for path, module in candidates.items():
        handles.append(
            module.register_forward_pre_hook(lambda m, a, k, path=path: before(path, a, k), with_kwargs=True)
        )
        handles.append(
            module.register_forward_hook(lambda m, a, k, o, path=path: after(path, m, a, k, o), with_kwargs=True)
        )
    try:
        with torch.no_grad(), no_fast_path(), watcher:
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return shapes, watcher.uses, others


def _shared_tables(model: nn.Module, candidates: dict[str, nn.Module], batch: Batch, shapes: dict) -> set[str]:
    """Embeddings that are looked up once for all inputs together: one input alone gives calls of the same shapes."""
    tables: dict[str, nn.Module] = {
        path: module for path, module in candidates.items() if isinstance(module, nn.Embedding)
    }
    if not tables or n_inputs(batch) == 1:
        return set()
    first = select(batch, torch.arange(1, device=tensors(batch)[0].device))
    alone = _observe(model, tables, first)[0]
    return {path for path in tables if alone[path] and alone[path] == shapes[path]}


def _parameter_reason(name: str, ndim: int, uses: dict[str, str]) -> str:
    if ndim < 2:
        return "is a vector (bias or gain); kept as in the target"
    if name in uses:
        return (
            f"is used by {uses[name]!r} outside a module call, where components cannot be put in its place; "
            "rewrite that use as an nn.Linear call to decompose it"
        )
    return "is in no module call that takes one weight matrix; rewrite its use as an nn.Linear call to decompose it"


def find_sites(
    model: nn.Module, batch: Batch, patterns: Sequence[str] | None = None
) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Every site of the model in the model's own order, and every parameter that is not one.

    Args:
        model: The target, in eval mode.
        batch: One batch, to see which modules are called, how often and on what shapes.
        patterns: Shell-style patterns over module paths; None takes all.

    Returns:
        The sites that match, and all other parameters by name with the reason.

    Raises:
        ValueError: If a pattern matches nothing (names the nearest paths) or no site is left.
    """
    candidates = {
        path: module for path, module in model.named_modules() if _site_class(module) and hasattr(module, "weight")
    }
    shapes, uses, others = _observe(model, candidates, batch)
    shared = _shared_tables(model, candidates, batch, shapes)
    chosen = _matching(list(candidates), patterns)
    sites, skipped = [], []
    covered: set[str] = set()
    for path, module in candidates.items():
        name = f"{path}.weight" if path else "weight"
        reason = _refusal(module)
        if reason is None and not shapes[path]:
            how = f"is used by {uses[name]!r} outside" if name in uses else "is not used in"
            reason = f"{how} a call of its module; rewrite the use as a module call to decompose it"
        if reason is None and path in others:
            reason = f"is not all that the forward of its {type(module).__name__} applies; use a plain module there"
        if reason is None and path in shared:
            reason = (
                "is applied to the same rows for all inputs together, as a table of positions is; pass these rows for "
                "every input (such as position_ids) to decompose it"
            )
        if reason is None and len(set(shapes[path])) > 1:
            reason = "belongs to a module called with several input shapes in one forward; split it in two modules"
        if reason is None and path not in chosen:
            reason = NO_PATTERN
        covered.add(name)
        if reason is not None:
            skipped.append(Skipped(name, reason))
            continue
        kind = _site_class(module)
        assert kind is not None
        sites.append(kind(path, module, len(shapes[path])))
        if name in uses:
            skipped.append(Skipped(name, f"is also used by {uses[name]!r}; that use stays as in the target"))
    used_by_sites = {id(module.weight) for module in candidates.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # What parametrizations compute a weight from belongs to that weight's site.
        plain = re.sub(r"parametrizations\.(\w+)\..+", r"\1", name)
        if name not in covered and plain not in covered and id(parameter) not in used_by_sites:
            skipped.append(Skipped(name, _parameter_reason(name, parameter.ndim, uses)))
    if not sites:
        reasons = "; ".join(f"{s.name} {s.reason}" for s in skipped if "vector" not in s.reason) or "no parameters"
        raise ValueError(f"model has no weight matrix to decompose: {reasons}")
    return tuple(sites), tuple(skipped)


def bound_site(model: nn.Module, path: str, n_calls: int) -> Site | None:
    """The site at a module path of a model, or None where there is no weight matrix."""
    module = dict(model.named_modules()).get(path)
    kind = _site_class(module) if module is not None else None
    return kind(path, module, n_calls) if kind else None


def put_weight(model: nn.Module, site: Site, matrix: Float[Tensor, "d_out d_in"]) -> None:
    """Give the site's module in a copy of the model this matrix as a parameter of its own.

    A weight that is tied to another module, or computed by a parametrization, is so no longer.
    """
    module = model.get_submodule(site.path)
    if parametrize.is_parametrized(module):
        _make_plain(module)
    weight = site.as_weight(matrix).to(site.weight.dtype).clone()
    module.weight = nn.Parameter(weight, requires_grad=site.weight.requires_grad)


def _make_plain(module: Any) -> None:
    """Turn parametrized tensors of a copied module into parameters with their present values.

    torch's own remove_parametrizations would change the class, which the copy shares with the target.
    """
    values = {name: getattr(module, name).detach() for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value))


def _matching(paths: Sequence[str], patterns: Sequence[str] | None) -> set[str]:
    if patterns is None:
        return set(paths)
    if isinstance(patterns, str):
        raise TypeError(f"sites must be a list of patterns, got the string {patterns!r}; write sites=[{patterns!r}]")
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(paths, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise ValueError(f"sites: no decomposable module at {pattern!r}; did you mean one of {near}?")
        chosen.update(found)
    return chosen


def n_rows(shape: torch.Size) -> int:
    """Number of rows (inputs or positions) in a leading shape."""
    return math.prod(shape)
