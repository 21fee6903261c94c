"""Small targets for the tests: every kind of site, with seeded weights and inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightdecomp import Config

QUICK = Config(steps=4, sample=64, batch=16, rounds=2, capacity=2.0)  # enough to run every part of a run once


class Calls(nn.Module):
    """A model whose forward is a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Case(NamedTuple):
    """A target in eval mode, one batch of inputs, and what `find_sites` shall find there."""

    model: nn.Module
    batch: Any
    n_calls: dict[str, int]
    skipped: set[str] = set()


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with parameters that depend on the seed alone."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) / fan_in**0.5)
    return model.eval()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(n: int, *shape: int) -> Tensor:
    """Token ids below n."""
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(1))


def mlp(dtype: torch.dtype = torch.float32, widths: tuple[int, ...] = (5, 8, 3), seed: int = 0) -> nn.Module:
    """Linear layers with ReLUs between."""
    layers: list[nn.Module] = []
    for d_in, d_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return seeded(nn.Sequential(*layers[:-1]), seed).to(dtype)


def sparse(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Inputs with few active features, as toy models of superposition are trained on."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(n, d, generator=rng, dtype=torch.float64)
    return (values * (torch.rand(n, d, generator=rng) < 0.3)).to(dtype)


def _tied() -> Calls:
    model = Calls(lambda m, x: m.head(torch.tanh(m.embed(x))), embed=nn.Embedding(7, 4), head=nn.Linear(4, 7))
    model.head.weight = model.embed.weight
    return model


def _conv(layer: nn.Module, d_in: int) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(d_in, 2))


def _attention(m: Calls, x: Tensor) -> Tensor:
    return m.read(m.attend(x, x, x)[0])


def _transposed(d_out: int, d_in: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(d_out, d_in)


def _once(*paths: str) -> dict[str, int]:
    return dict.fromkeys(paths, 1)


CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: Case(mlp(torch.float64), drawn(24, 5), _once("0", "2")),
    "no bias": lambda: Case(
        nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)),
        drawn(24, 5),
        _once("0", "2"),
    ),
    "leading dimensions": lambda: Case(mlp(torch.float64), drawn(8, 3, 2, 5), _once("0", "2")),
    "the model is the site": lambda: Case(nn.Linear(4, 3), drawn(24, 4), _once("")),
    "transformers Conv1D": lambda: Case(
        nn.Sequential(_transposed(6, 5), nn.GELU(), _transposed(3, 6)), drawn(24, 5), _once("0", "2")
    ),
    "conv1d": lambda: Case(_conv(nn.Conv1d(2, 3, 3, dilation=2, padding=1), 12), drawn(16, 2, 6), _once("0", "3")),
    "conv2d": lambda: Case(
        _conv(nn.Conv2d(2, 3, 3, stride=2, padding=(1, 2), padding_mode="reflect"), 36),
        drawn(16, 2, 6, 5),
        _once("0", "3"),
    ),
    "conv2d, padding by name": lambda: Case(
        _conv(nn.Conv2d(2, 2, (3, 2), padding="same", dilation=2, bias=False), 24),
        drawn(16, 2, 4, 3),
        _once("0", "3"),
    ),
    "embedding": lambda: Case(
        nn.Sequential(nn.Embedding(7, 4), nn.ReLU(), nn.Linear(4, 3)), ids(7, 24, 5), _once("0", "2")
    ),
    "tied embedding and head": lambda: Case(_tied(), ids(7, 24, 5), _once("embed", "head")),
    "bilinear": lambda: Case(
        Calls(lambda m, a, b: m.read(F.relu(m.meet(a, b))), meet=nn.Bilinear(3, 2, 4), read=nn.Linear(4, 2)),
        (drawn(24, 3), drawn(24, 2, seed=2)),
        _once("meet", "read"),
    ),
    "bilinear, no bias": lambda: Case(nn.Bilinear(3, 2, 4, bias=False), (drawn(8, 3, 3), drawn(8, 3, 2)), _once("")),
    "one module twice": lambda: Case(
        Calls(lambda m, x: m.read(m.mix(F.relu(m.mix(x)))), mix=nn.Linear(4, 4), read=nn.Linear(4, 2)),
        drawn(24, 4),
        {"mix": 2, "read": 1},
    ),
    "one module at two paths": lambda: Case(
        (lambda layer: nn.Sequential(layer, nn.Tanh(), layer))(nn.Linear(4, 4)), drawn(24, 4), {"0": 2}
    ),
    "dict": lambda: Case(
        Calls(lambda m, x, y: m.a(x) * m.b(input=y), a=nn.Linear(3, 2), b=nn.Linear(4, 2)),
        {"x": drawn(24, 3), "y": drawn(24, 4)},
        _once("a", "b"),
    ),
    "grouped convolution": lambda: Case(
        _conv(nn.Conv1d(4, 4, 3, groups=2), 16), drawn(16, 4, 6), _once("3"), {"0.weight"}
    ),
    "attention": lambda: Case(
        Calls(_attention, attend=nn.MultiheadAttention(4, 2, batch_first=True), read=nn.Linear(4, 2)),
        drawn(16, 3, 4),
        _once("read"),
        {"attend.in_proj_weight", "attend.out_proj.weight"},
    ),
    "encoder layer": lambda: Case(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
        drawn(16, 3, 4),
        _once("linear1", "linear2"),
        {"self_attn.in_proj_weight", "self_attn.out_proj.weight"},
    ),
    "functional use": lambda: Case(
        Calls(lambda m, x: F.linear(m.a(x), m.w), a=nn.Linear(4, 4), w=nn.Parameter(torch.zeros(2, 4))),
        drawn(16, 4),
        _once("a"),
        {"w"},
    ),
    "weight norm": lambda: Case(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 2)),
        drawn(24, 4),
        _once("0", "2"),
    ),
}


def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """One of the cases with seeded weights, in a floating point type."""
    if name == "transformers Conv1D":
        import pytest

        pytest.importorskip("transformers")
    model, batch, n_calls, skipped = CASES[name]()
    return Case(seeded(model).to(dtype), _cast(batch, dtype), n_calls, skipped)


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, dict):
        return {name: _cast(x, dtype) for name, x in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_cast(x, dtype) for x in batch)
    return batch.to(dtype) if batch.is_floating_point() else batch
