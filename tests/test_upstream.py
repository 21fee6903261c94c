from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests.models import CASES, QUICK, Calls, case, drawn, ids, mlp, seeded
from weightdecomp import _fit
from weightdecomp._batches import call
from weightdecomp._divergence import named, output_tensor
from weightdecomp._forward import replaced
from weightdecomp._sample import taken
from weightdecomp._sites import Site, find_sites
from weightdecomp._upstream import Upstream


@torch.no_grad()
def halved(model: nn.Module, batch: Any, site: Site) -> Tensor:
    """The output where a site writes half of what it does."""
    with replaced([site], lambda one, _, rows: one.write(0.5 * one.read(rows, one.matrix()), rows)):
        return output_tensor(call(model, batch)).clone()


def assert_the_same(model: nn.Module, batch: Any) -> None:
    """What is kept changes no bit of what masking any site gives, pass after pass."""
    for site in find_sites(model, batch)[0]:
        expected = halved(model, batch, site)
        upstream = Upstream(model, batch, site)
        for _ in range(2):
            with upstream.kept():
                found = halved(model, batch, site)
            assert_close(found, expected, rtol=0, atol=0)
        assert_close(halved(model, batch, site), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_masking_a_site_gives_the_same_whether_what_comes_before_is_run_again_or_not(name: str):
    target = case(name, torch.float64)

    assert_the_same(target.model, target.batch)


def test_masking_a_site_of_a_transformer_gives_the_same():
    pytest.importorskip("transformers")
    from tests.hf_models import FAMILIES, VOCABULARY, randomised

    for name in ("llama, grouped queries, tied", "gpt2", "neox", "gemma3", "bert"):
        assert_the_same(randomised(FAMILIES[name]()), ids(VOCABULARY, 3, 7))


def blocks(write: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """Three residual blocks, each an MLP, that add with a function; the activation is one module for all of them."""

    def forward(m: Calls, x: Tensor) -> Tensor:
        for block in m.children():
            if isinstance(block, nn.Sequential):
                x = write(x, block(x))
        return x

    relu = nn.ReLU()
    return seeded(Calls(forward, **{n: nn.Sequential(nn.Linear(4, 6), relu, nn.Linear(6, 4)) for n in "abc"})).double()


def test_blocks_before_the_site_are_not_run_again():
    model, x, ran = blocks(torch.add), drawn(5, 4), list[str]()
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    site = find_sites(model, x, ["b.2"])[0][0]
    upstream = Upstream(model, x, site)
    ran.clear()

    with upstream.kept():
        halved(model, x, site)

    # A kept call still is a call, which hooks of the user's see; what is inside of it is not. The shared activation is
    # known by its first path.
    assert ran == ["", "a", "b", "b.0", "a.1", "b.2", "c", "c.0", "a.1", "c.2"]


@pytest.mark.parametrize("write", [lambda x, y: x + y, lambda x, y: y.add_(x), lambda x, y: F.relu_(y)])
def test_what_follows_may_write_into_what_is_kept(write: Callable[[Tensor, Tensor], Tensor]):
    assert_the_same(blocks(write), drawn(5, 4))


def test_outputs_may_be_nested():
    def forward(m: Calls, x: Tensor) -> Tensor:
        first, rest = m.pair(x)
        return m.read(first + rest["b"][0])

    pair = Calls(lambda m, x: (m.one(x), {"b": [m.two(x), None]}), one=nn.Linear(4, 3), two=nn.Linear(4, 3))

    assert_the_same(seeded(Calls(forward, pair=pair, read=nn.Linear(3, 2))).double(), drawn(5, 4))


def test_the_model_is_as_before():
    """T1."""
    model, x = mlp(torch.float64), drawn(5, 5)
    site = find_sites(model, x, ["2"])[0][0]

    with Upstream(model, x, site).kept():
        pass

    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_start_is_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch):
    model, x = mlp(torch.float64, widths=(5, 8, 6, 3)), drawn(256, 5)
    metric, sites = named("mse", "for a test"), find_sites(model, x)[0]
    sample = taken(model, [x], sites, metric, 256, torch.Generator().manual_seed(0))

    def start() -> _fit.Start:
        return _fit.chosen_start(model, sample, sites[1], metric, 0.02, QUICK, 0.01)

    kept = start()
    monkeypatch.setattr(Upstream, "kept", nullcontext)
    repeated = start()

    assert kept.work == repeated.work
    assert_close(kept.pieces.v, repeated.pieces.v, rtol=0, atol=0)
