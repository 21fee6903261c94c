"""Fused matrices, such as queries, keys and values in one, as separate modules, each of which is a site by its name."""

import copy
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from weightdecomp._check import check_module

Rows = Sequence[tuple[str, int]]  # names and numbers of output rows, in the matrix' order; names may come again


class Split(nn.Module):
    """A linear map as one `nn.Linear` for each named part, with the outputs in the fused map's order."""

    order: Tensor | None
    _shell: nn.Module

    def __init__(self, whole: Any, rows: Rows) -> None:
        super().__init__()
        weight, bias = matrix(whole), whole.bias
        assert weight is not None
        shell = copy.copy(whole)
        shell._parameters = {}
        # Hidden from torch, for which it would be a part without weights.
        object.__setattr__(self, "_shell", shell)
        owner = [name for name, size in rows for _ in range(size)]
        index = {name: torch.tensor([i for i, own in enumerate(owner) if own == name]) for name, _ in rows}
        for name, own in index.items():
            self.add_module(name, _linear(_rows(weight, own), None if bias is None else _rows(bias, own)))
        order = torch.cat(list(index.values())).argsort()
        contiguous = bool((order == torch.arange(len(order))).all())
        self.register_buffer("order", None if contiguous else order.to(weight.device), persistent=False)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The fused map's output."""
        parts = torch.cat([part(x) for part in self.children()], -1)
        return parts if self.order is None else parts[..., self.order]

    def whole(self) -> nn.Module:
        """The parts' present weights as one module of the kind that was split."""
        parts: Any = list(self.children())
        order = slice(None) if self.order is None else self.order
        weight = torch.cat([part.weight for part in parts])[order]
        fused: Any = copy.copy(self._shell)
        stored = weight if isinstance(fused, nn.Linear) else weight.T.contiguous()
        fused._parameters = {"weight": nn.Parameter(stored, requires_grad=weight.requires_grad), "bias": None}
        if parts[0].bias is not None:
            bias = torch.cat([part.bias for part in parts])[order]
            fused._parameters["bias"] = nn.Parameter(bias, requires_grad=bias.requires_grad)
        return fused


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` with a module for each of its four matrices: q, k, v and out."""

    # torch's encoder layers ask for these before they take a path that would go past the modules.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        biases = [None] * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
        weights = [fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight]
        if fused._qkv_same_embed_dim:
            weights = list(fused.in_proj_weight.chunk(3))
        self.q, self.k, self.v = map(_linear, weights, biases)
        self.out = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.num_heads, self.batch_first, self.dropout = fused.num_heads, fused.batch_first, fused.dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`; `is_causal` is a hint beside `attn_mask` there too."""
        along = query.ndim == 3 and not self.batch_first
        q, k, v = (self._heads(part(x), along) for part, x in ((self.q, query), (self.k, key), (self.v, value)))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if attn_mask is not None:
            own = attn_mask.reshape(scores.shape) if attn_mask.ndim == 3 else attn_mask
            scores = scores + _as_scores(own, scores)
        if key_padding_mask is not None:
            scores = scores + _as_scores(key_padding_mask, scores)[..., None, None, :]
        weights = scores.softmax(-1)
        mixed = (F.dropout(weights, self.dropout, self.training) @ v).transpose(-3, -2).flatten(-2)
        output = self.out(mixed.transpose(0, 1) if along else mixed)
        if not need_weights:
            return output, None
        return output, weights.mean(-3) if average_attn_weights else weights

    def _heads(self, x: Tensor, along: bool) -> Float[Tensor, "*batch head position d"]:
        return (x.transpose(0, 1) if along else x).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def _as_scores(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask that is added to scores; True forbids."""
    return (
        torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
    )


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Some rows: a view where they follow one another, so that a split model needs no memory of its own."""
    first, last = int(index[0]), int(index[-1])
    return tensor[first : last + 1] if last - first + 1 == len(index) else tensor[index.to(tensor.device)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def split(model: nn.Module, rows: Mapping[str, Rows] | None = None) -> nn.Module:
    """A copy of a model in which fused matrices are separate modules, with the same outputs.

    A part called `q` of the module at `h.0.attn.c_attn` is the site `h.0.attn.c_attn.q`.

    Args:
        model: Any module; it is not changed. The copy has its own modules and the same weights in memory.
        rows: Shell-style patterns over paths of linear modules, each with names and numbers of output rows in the
            matrix' order: `[("q", 64), ("k", 32), ("v", 32)]`. A name may come again, as where each head has its own
            rows: `[("q", 8), ("k", 8), ("v", 8)] * 4`. None splits all whose layout is known: `c_attn`, `qkv_proj`,
            `query_key_value` and `gate_up_proj` of Hugging Face's GPT-2, GPTBigCode, GPT-NeoX, Bloom, Falcon and
            Phi-3, and `torch.nn.MultiheadAttention` (parts q, k, v, out).

    Raises:
        ValueError: If nothing matches, two patterns match one matrix, or the rows do not add up to the matrix.
        TypeError: For what is no module, or no dict.
    """
    check_module(model)
    if rows is not None and not isinstance(rows, Mapping):
        raise TypeError(
            f"split: rows must be a dict, as in {{'*.qkv': [('q', 64), ('k', 64)]}}, got {type(rows).__name__}"
        )
    twin = sharing_copy(model)
    found = dict(_known(twin)) if rows is None else _asked(twin, rows)
    if not found:
        raise ValueError(
            "split: no fused matrix of a known layout in this model; name its rows, as in "
            "{'*.qkv': [('q', 64), ('k', 64), ('v', 64)]} (--split '*.qkv=q:64,k:64,v:64')"
        )
    return _with(twin, found).train(model.training)


def unsplit(model: nn.Module) -> nn.Module:
    """The model with its split matrices in one piece again, as in its checkpoint; attention of torch stays split."""
    if not any(isinstance(module, Split) for module in model.modules()):
        return model
    twin = sharing_copy(model)
    with torch.no_grad():
        found = {path: module.whole() for path, module in twin.named_modules() if isinstance(module, Split)}
    return _with(twin, found).train(model.training)


def _with(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The model itself, with other modules at some paths."""
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
    return model


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same parameters and buffers."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def _asked(model: nn.Module, rows: Mapping[str, Rows]) -> dict[str, nn.Module]:
    """What the user's patterns name, split."""
    found, pattern_of = dict[str, nn.Module](), dict[str, str]()
    linear = {path: module for path, module in model.named_modules() if path and matrix(module) is not None}
    for pattern, own in rows.items():
        paths = fnmatch.filter(linear, pattern)
        if not paths:
            near = get_close_matches(pattern, linear, n=3, cutoff=0.0)
            raise ValueError(f"split: no linear module at {pattern!r}; did you mean one of {near}?")
        for path in paths:
            if path in found:
                raise ValueError(
                    f"split: {pattern_of[path]!r} and {pattern!r} both match {path!r}; name it by one of them"
                )
            _check(path, own, linear[path])
            found[path], pattern_of[path] = Split(linear[path], own), pattern
    return found


def _check(path: str, rows: Any, module: nn.Module) -> None:
    """Refuse rows that do not divide the matrix into named parts."""
    fused = matrix(module)
    assert fused is not None
    pairs = isinstance(rows, Sequence) and all(isinstance(one, tuple | list) and len(one) == 2 for one in rows)
    if not pairs or not all(isinstance(name, str) for name, _ in rows):
        raise ValueError(
            f"split of {path!r}: expected pairs of a name and a number of rows, as in [('q', 64), ('k', 32)], got "
            f"{rows!r}"
        )
    told = ", ".join(f"{name} {size}" for name, size in rows[:6]) + (", ..." if len(rows) > 6 else "")
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for _, size in rows):
        raise ValueError(f"split of {path!r}: numbers of rows must be whole and at least 1, got {told}")
    if (total := sum(size for _, size in rows)) != len(fused):
        raise ValueError(
            f"split of {path!r}: {told} are {total} rows, but the matrix has {len(fused)}; they must add up "
            "(repeat the names where every head has its own rows)"
        )
    taken = [
        name for name, _ in rows if not name.isidentifier() or hasattr(Split, name) or name in ("order", "training")
    ]
    if taken:
        raise ValueError(f"split of {path!r}: a part cannot be called {taken[0]!r}; use a word such as 'q'")


def matrix(module: Any) -> Tensor | None:
    """The matrix (d_out, d_in) of a linear module."""
    if isinstance(module, nn.Linear):
        return module.weight
    return module.weight.T if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module whose layout is known, split."""
    for path, module in model.named_modules():
        # Rows that it adds to keys and values belong to none of the four matrices.
        if isinstance(module, nn.MultiheadAttention) and path and module.bias_k is None and not module.add_zero_attn:
            yield path, SplitAttention(module)
        for name, child in module.named_children():
            layout = _LAYOUTS.get((type(module).__name__, name))
            # Layers that read another sequence have matrices of other layouts under the same names.
            if layout is not None and matrix(child) is not None and not getattr(module, "is_cross_attention", False):
                yield f"{path}.{name}".lstrip("."), Split(child, layout(module))


def _per_head(n_heads: int, d_head: int) -> Rows:
    return [("q", d_head), ("k", d_head), ("v", d_head)] * n_heads


def _bigcode(own: Any) -> Rows:
    if own.multi_query:
        return [("q", own.embed_dim), ("k", own.kv_dim), ("v", own.kv_dim)]
    return _per_head(own.num_heads, own.head_dim)


def _falcon(own: Any) -> Rows:
    if own.new_decoder_architecture:
        shared = own.num_heads // own.num_kv_heads
        return [("q", shared * own.head_dim), ("k", own.head_dim), ("v", own.head_dim)] * own.num_kv_heads
    if own.multi_query:
        return [("q", own.num_heads * own.head_dim), ("k", own.head_dim), ("v", own.head_dim)]
    return _per_head(own.num_heads, own.head_dim)


def _phi3(own: Any) -> Rows:
    shared = own.num_key_value_heads * own.head_dim
    return [("q", own.config.num_attention_heads * own.head_dim), ("k", shared), ("v", shared)]


def _gated(own: Any) -> Rows:
    half = len(own.gate_up_proj.weight) // 2
    return [("gate", half), ("up", half)]


# Class of the module that holds the fused one, and its name there; read from transformers' forward functions.
_LAYOUTS: dict[tuple[str, str], Callable[[Any], Rows]] = {
    ("GPT2Attention", "c_attn"): lambda own: [(name, own.split_size) for name in "qkv"],
    ("GPTBigCodeAttention", "c_attn"): _bigcode,
    ("GPTNeoXAttention", "query_key_value"): lambda own: _per_head(own.config.num_attention_heads, own.head_size),
    ("BloomAttention", "query_key_value"): lambda own: _per_head(own.num_heads, own.head_dim),
    ("FalconAttention", "query_key_value"): _falcon,
    ("Phi3Attention", "qkv_proj"): _phi3,
    ("Phi3MLP", "gate_up_proj"): _gated,
}
