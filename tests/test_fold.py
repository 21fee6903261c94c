import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import Calls, drawn, ids, mlp, seeded
from weightdecomp._divergence import output_tensor


def normed(norm: nn.Module, bias: bool = True) -> nn.Module:
    """Two matrices that read one norm, with a residual path around them."""
    return seeded(
        Calls(
            lambda m, x: x + m.down(m.gate(y := m.norm(x)).tanh() * m.up(y)),
            norm=norm,
            gate=nn.Linear(4, 6, bias=bias),
            up=nn.Linear(4, 6, bias=bias),
            down=nn.Linear(6, 4),
        )
    ).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.RMSNorm(4)])
@torch.no_grad()
def test_a_folded_norm_has_no_gain_and_the_output_is_the_same(norm: nn.Module, bias: bool):
    model, x = normed(norm, bias), drawn(3, 5, 4)
    before = [p.clone() for p in model.parameters()]

    folded: Any = wd.fold_norms(model, x)

    assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    assert_close(folded.norm.weight, torch.ones(4).double(), rtol=0, atol=0)
    if getattr(norm, "bias", None) is not None:
        assert not folded.norm.bias.any()
    assert folded.down.weight is model.get_parameter("down.weight")
    assert_close(list(model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "gemma, one key, tied"])
@torch.no_grad()
def test_in_half_precision_folding_changes_as_much_as_the_precision_does(family: str, dtype: torch.dtype):
    pytest.importorskip("transformers")
    from tests.hf_models import FAMILIES, inputs, randomised

    whole: Any = randomised(FAMILIES[family]())
    half, x = copy.deepcopy(whole).to(dtype), inputs(family)

    folded: Any = wd.fold_norms(half, x)

    rounding = (half(x).logits - whole(x).logits).abs().max()
    assert (folded(x).logits - half(x).logits).abs().max() < 3 * rounding
    norms = [module for module in folded.modules() if type(module).__name__.endswith("Norm")]
    assert all(bool((module.weight == (0 if "gemma" in family else 1)).all()) for module in norms)


def test_what_would_change_more_than_rounding_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weightdecomp._fold._reset", lambda *_: None)
    model, x = normed(nn.LayerNorm(4)), drawn(3, 4)
    with torch.no_grad():
        model.get_parameter("norm.weight").mul_(3)

    with pytest.raises(ValueError, match="output would change by .* of its size; leave the norms$"):
        wd.fold_norms(model, x)
    with pytest.raises(ValueError, match="of its size; leave the norms or load the model in float32"):
        wd.fold_norms(model.half(), x.half())


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.read(y := m.norm(x)) + y,
        lambda m, x: m.read(m.norm(x)) * m.norm(x).mean(),
        lambda m, x: m.read(m.norm(x)[:, :1]),
        lambda m, x: m.read(m.norm(x)) + m.read(x),
        lambda m, x: m.norm(m.read(x)),
        lambda m, x: m.norm(x) + m.read(x),
        lambda m, x: m.read(m.norm(x).chunk(1, -1)[0]),
    ],
    ids=["residual", "another use", "a part", "another input", "the output", "no reader", "chunks"],
)
def test_a_norm_that_is_read_in_other_ways_is_left_alone(forward: Any):
    model = seeded(Calls(forward, norm=nn.LayerNorm(4), read=nn.Linear(4, 4))).double()

    with pytest.raises(ValueError, match="no layer norm is read by linear modules alone; leave the norms"):
        wd.fold_norms(model, drawn(3, 5, 4))


@torch.no_grad()
def test_a_view_of_all_of_a_norms_output_is_the_output():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.read(m.norm(x)[:, slice(0, None)])

    model, x = seeded(Calls(forward, norm=nn.LayerNorm(4), read=nn.Linear(4, 4))).double(), drawn(3, 5, 4)

    folded: Any = wd.fold_norms(model, x)

    assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    assert not folded.norm.bias.any()


def test_a_model_without_norms_is_refused():
    with pytest.raises(ValueError, match="no layer norm is read by linear modules alone"):
        wd.fold_norms(mlp(), drawn(8, 5).float())


@pytest.mark.parametrize(
    "model, batch, error, message",
    [
        (normed(nn.LayerNorm(4)), "text", TypeError, "batch must be a tensor, a tuple or a dict of them, got str"),
        (normed(nn.LayerNorm(4)), drawn(3, 4)[:0], ValueError, "batch holds no inputs"),
        (normed(nn.LayerNorm(4)), [drawn(3, 4)] * 2, ValueError, "the model fails on the first batch: .* as the model"),
        (normed(nn.LayerNorm(4)), drawn(3, 5), ValueError, "the model fails on the first batch"),
        (normed(nn.LayerNorm(4)), drawn(3, 4).log(), ValueError, "batch contains NaN"),
        (nn.Sequential(nn.LayerNorm(4), nn.Dropout(), nn.Linear(4, 4)), drawn(3, 4), ValueError, "training mode"),
    ],
    ids=["text", "no inputs", "a list of batches", "another width", "NaN", "training mode"],
)
def test_what_decompose_refuses_is_refused_before_anything_is_folded(
    model: Any, batch: Any, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        wd.fold_norms(model, batch)


def test_weights_that_are_not_finite_are_refused_by_name():
    model = normed(nn.LayerNorm(4))
    with torch.no_grad():
        model.get_parameter("down.weight")[1, 1] = torch.nan

    with pytest.raises(ValueError, match="parameter 'down.weight' contains NaN or infinity"):
        wd.fold_norms(model, drawn(3, 4))


def test_folding_leaves_no_hook_behind():
    model = normed(nn.LayerNorm(4))

    folded = wd.fold_norms(model, drawn(3, 4))

    hooks = [m._forward_hooks or m._forward_pre_hooks for one in (model, folded) for m in one.modules()]
    assert not any(hooks)


# Norms that stay as they are: in each of two layers those of heads and those after a block, or the one that is read at
# its first position alone.
KEPT = {"gemma3": 2 * (2 + 2), "qwen3, norms of heads": 2 * 2, "vit": 1}


@pytest.mark.parametrize("family", [
    "llama, grouped queries, tied", "gpt2", "neox", "gemma, one key, tied", "gemma3", "qwen2, biases",
    "qwen3, norms of heads", "vit",
])  # fmt: skip
@torch.no_grad()
def test_families_give_the_same_output_with_their_gains_folded(family: str):
    pytest.importorskip("transformers")
    from tests.hf_models import FAMILIES, inputs, randomised

    model: Any = randomised(FAMILIES[family]()).double()
    x = inputs(family)
    x = x.double() if x.is_floating_point() else x
    if hasattr(model, "lm_head"):
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings

    folded: Any = wd.fold_norms(model, x)

    expected = output_tensor(model(x))
    # The norms of transformers compute in single precision even here.
    assert_close(output_tensor(folded(x)), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    norms = [module for module in folded.modules() if type(module).__name__.endswith("Norm")]
    neutral = 0.0 if "gemma" in family else 1.0
    kept = [module for module in norms if not bool((module.weight == neutral).all())]
    assert len(kept) == KEPT.get(family, 0)
    if "tied" in family:
        assert folded.lm_head.weight is not folded.get_input_embeddings().weight


def test_norms_whose_output_is_the_residual_stream_stay_as_they_are():
    pytest.importorskip("transformers")
    from tests.hf_models import FAMILIES, randomised

    with pytest.raises(ValueError, match="no layer norm is read by linear modules alone"):
        wd.fold_norms(randomised(FAMILIES["bert"]()), ids(61, 6, 7))
