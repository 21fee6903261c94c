import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import Calls, drawn, ids, mlp, seeded
from weightdecomp._sites import find_sites
from weightdecomp._split import Split, SplitAttention, split, unsplit

ROWS = [("q", 4), ("k", 2), ("v", 2)]


def fused(d_out: int = 8) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, d_out), nn.Tanh(), nn.Linear(d_out, 3))).double()


@given(
    sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), min_size=1, max_size=8),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50)
def test_any_division_of_the_rows_computes_what_the_matrix_does(sizes: list[tuple[str, int]], bias: bool, seed: int):
    layer = seeded(nn.Linear(4, sum(size for _, size in sizes), bias=bias), seed).double()
    x = drawn(3, 2, 4, seed=seed)

    parts: Any = split(nn.Sequential(layer), {"0": sizes}).get_submodule("0")

    assert_close(parts(x), layer(x), rtol=0, atol=1e-12)
    owner = [name for name, size in sizes for _ in range(size)]
    for name, part in parts.named_children():
        rows = [i for i, own in enumerate(owner) if own == name]
        assert_close(part.weight, layer.weight[rows], rtol=0, atol=0)


def test_parts_are_sites_by_their_names():
    sites, _ = find_sites(split(fused(), {"0": ROWS}), drawn(6, 4), ["0.*"])

    assert [site.path for site in sites] == ["0.q", "0.k", "0.v"]


def test_a_split_leaves_the_model_alone_and_shares_its_memory():
    model = fused()
    before = [id(p) for p in model.parameters()]

    twin = split(model, {"0": ROWS})

    assert [id(p) for p in model.parameters()] == before
    assert isinstance(model.get_submodule("0"), nn.Linear)
    assert twin.get_submodule("0.k").weight.data_ptr() == model.get_submodule("0").weight[4:].data_ptr()
    assert twin.get_parameter("2.weight") is model.get_parameter("2.weight")
    assert not twin.training


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"0": [("q", 4), ("k", 2)]}, "split of '0': q 4, k 2 are 6 rows, but the matrix has 8; they must add up"),
        ({"0": [("q", 3), ("k", 3), ("v", 3)]}, "are 9 rows, but the matrix has 8"),
        ({"0": []}, "are 0 rows, but the matrix has 8"),
        ({"0": [("q", 8), ("k", 0)]}, "numbers of rows must be whole and at least 1, got q 8, k 0"),
        ({"0": [("forward", 4), ("k", 4)]}, "a part cannot be called 'forward'; use a word such as 'q'"),
        ({"0": [("a.b", 4), ("k", 4)]}, "a part cannot be called 'a.b'"),
        ({"qkv": ROWS}, r"no linear module at 'qkv'; did you mean one of \['[02]', '[02]'\]"),
        # Of a dict the first entry alone is checked by its annotation.
        ({"0": ROWS, "2": ["q", "k"]}, r"split of '2': expected pairs of a name and a number .* got \['q', 'k'\]"),
        ({"0": ROWS, "2": {"q": 2, "k": 1}}, r"expected pairs .*, as in \[\('q', 64\).* got {'q': 2, 'k': 1}"),
    ],
)
def test_a_split_that_does_not_divide_the_matrix_is_refused(rows: Any, message: str):
    with pytest.raises(ValueError, match=message):
        split(fused(), rows)


def test_a_model_without_known_fused_matrices_is_refused():
    with pytest.raises(ValueError, match="no fused matrix of a known layout in this model; name its rows"):
        split(mlp())


# ------------------------------------------------------------------------------------------ torch's attention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head", "padding"])
@torch.no_grad()
def test_attention_in_four_modules_is_torchs(batch_first: bool, bias: bool, mask: str):
    own = {"batch_first": batch_first, "bias": bias, "dtype": torch.float64}
    attention: Any = seeded(nn.MultiheadAttention(8, 2, kdim=6, vdim=5, **own))
    query, key, value = drawn(3, 4, 8), drawn(3, 5, 6), drawn(3, 5, 5)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    forbidden = drawn(4, 5) > 0.8
    masks: dict[str, dict[str, Tensor]] = {
        "none": {},
        "bool": {"attn_mask": forbidden},
        "float": {"attn_mask": drawn(4, 5)},
        "per head": {"attn_mask": drawn(6, 4, 5) > 1},
        "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])},
    }

    parts = SplitAttention(attention)

    for options in ({}, {"average_attn_weights": False}):
        expected = attention(query, key, value, **masks[mask], **options)
        assert_close(parts(query, key, value, **masks[mask], **options), expected, rtol=0, atol=1e-12)
    assert parts(query, key, value, need_weights=False)[1] is None


@torch.no_grad()
def test_attention_takes_a_single_input_without_a_batch():
    attention: Any = seeded(nn.MultiheadAttention(8, 2)).double()
    x = drawn(4, 8)

    assert_close(SplitAttention(attention)(x, x, x), attention(x, x, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_an_encoder_keeps_its_output_and_gains_the_sites_of_its_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)
    model = seeded(nn.TransformerEncoder(layer, 2)).double()
    x = drawn(3, 4, 8)

    twin = split(model)

    assert_close(twin(x), model(x), rtol=0, atol=1e-10)
    sites, skipped = find_sites(twin, x)
    attention = [site.path for site in sites if "self_attn" in site.path]
    assert attention == [f"layers.{i}.self_attn.{part}" for i in (0, 1) for part in ("q", "k", "v", "out")]
    assert all("vector" in one.reason for one in skipped)


def test_attention_with_rows_of_its_own_for_keys_is_left_as_it_is():
    model = Calls(lambda m, x: m.mix(x, x, x)[0], mix=nn.MultiheadAttention(4, 2, add_bias_kv=True)).eval()

    with pytest.raises(ValueError, match="no fused matrix of a known layout"):
        split(model)


# ------------------------------------------------------------------------------------------ Hugging Face


def of_family(name: str) -> nn.Module:
    pytest.importorskip("transformers")
    from tests.hf_models import FUSED, randomised

    return randomised(FUSED[name]())


FAMILIES = ["gpt2", "neox", "phi3", "bigcode, one key", "bigcode", "bloom", "falcon", "falcon, one key", "falcon, new"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_known_layout_keeps_the_models_output(family: str):
    model, x = of_family(family), ids(61, 6, 7)

    output = split(model)(x).logits

    expected = model(x).logits
    assert_close(output, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def scaled(model: nn.Module, **factors: float) -> nn.Module:
    """The model with the parts of these names scaled in every layer, biases and all."""
    for module in model.modules():
        if isinstance(module, Split):
            for name, factor in factors.items():
                if name in dict(module.named_children()):
                    for parameter in module.get_submodule(name).parameters():
                        parameter.data = parameter * factor
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_names_of_a_known_layout_are_true(family: str):
    """Scores are products of queries and keys, so a factor may move between them, and to nowhere else."""
    model, x = of_family(family), ids(61, 6, 7)
    expected = model(x).logits
    tolerance = 1e-4 * float(expected.abs().max())

    moved = scaled(split(model), q=2.0, k=0.5)(x).logits
    wrong = scaled(split(model), q=2.0, v=0.5)(x).logits

    assert_close(moved, expected, rtol=0, atol=tolerance)
    assert (wrong - expected).abs().max() > 100 * tolerance


@torch.no_grad()
def test_the_gate_of_a_fused_pair_is_the_one_that_is_bent():
    """The other one is linear: twice of it is twice the product."""
    model = of_family("phi3")
    layer, x = "model.layers.0.mlp", drawn(5, 16).float()
    expected = model.get_submodule(layer)(x)

    doubled = scaled(split(model), up=2.0).get_submodule(layer)(x)
    bent = scaled(split(model), gate=2.0).get_submodule(layer)(x)

    assert_close(doubled, 2 * expected)
    assert (bent - 2 * expected).abs().max() > 0.1 * expected.abs().max()


def test_a_split_model_decomposes_by_the_names_of_its_parts(quick: None):
    model = of_family("gpt2")
    config = wd.Config(steps=0, sample=64, batch=16, rounds=1)

    found = wd.decompose(split(model), [ids(61, 32, 7)], sites=["*.0.attn.c_attn.v"], config=config, progress=False)

    assert [site.path for site in found.sites] == ["transformer.h.0.attn.c_attn.v"]
    assert found.component("transformer.h.0.attn.c_attn.v", 0).weight.shape == (16, 16)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parts_go_back_into_the_matrix_that_they_came_from(family: str):
    model = of_family(family)

    again = unsplit(split(model))

    assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert unsplit(model) is model


def test_what_is_split_already_has_no_fused_matrix_left():
    with pytest.raises(ValueError, match="split: no fused matrix of a known layout in this model"):
        split(split(of_family("gpt2")))


@torch.no_grad()
def test_a_changed_part_is_saved_in_its_matrix(tmp_path: Path):
    pytest.importorskip("transformers")
    from tests.hf_models import saved

    saved("gpt2", tmp_path / "before")
    model, x = copy.deepcopy(split(wd.load_hf(tmp_path / "before"))), ids(61, 6, 7)
    model.get_submodule("transformer.h.1.attn.c_attn.k").weight.zero_()

    wd.save_hf(model, tmp_path / "after")

    after = wd.load_hf(tmp_path / "after")
    assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)
    assert not after.get_submodule("transformer.h.1.attn.c_attn").weight[:, 16:32].any()
