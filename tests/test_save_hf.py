from pathlib import Path

import pytest
import torch
from torch import nn

import weightdecomp as wd
from tests.models import QUICK, Calls, ids, seeded

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny Llama with grouped-query attention."""
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(config)
    return seeded(model).to(dtype)


def loaded(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return transformers.LlamaForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def edited(model: nn.Module, site: str) -> nn.Module:
    decomposition = wd.decompose(model, [ids(11, 12, 6)], sites=[site], config=QUICK, progress=False)
    return decomposition.edit(remove=[(decomposition.sites[0].path, 0)])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edited_model_comes_back_as_it_was_saved(tmp_path: Path, quick: None, dtype: torch.dtype):
    model = llama(dtype=dtype)
    changed = edited(model, "model.layers.0.mlp.down_proj")

    wd.save_hf(changed, tmp_path / "edited")

    again, inputs = loaded(tmp_path / "edited", dtype), ids(11, 3, 6)
    assert torch.equal(again(inputs).logits, changed(inputs).logits)
    assert not torch.equal(again(inputs).logits, model(inputs).logits)
    assert {path.suffix for path in (tmp_path / "edited").iterdir()} == {".json", ".safetensors"}


@torch.no_grad()
def test_a_head_that_an_edit_unties_is_saved_untied(tmp_path: Path, quick: None):
    model = llama(tied=True)
    changed = edited(model, "lm_head")

    wd.save_hf(changed, tmp_path / "edited")

    again = loaded(tmp_path / "edited")
    assert torch.equal(again.lm_head.weight, changed.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert changed.config.tie_word_embeddings


@torch.no_grad()
def test_a_tied_head_stays_tied(tmp_path: Path, quick: None):
    changed = edited(llama(tied=True), "model.layers.1.mlp.up_proj")

    wd.save_hf(changed, tmp_path / "edited")

    again = loaded(tmp_path / "edited")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_wrapped_model_is_saved_without_its_wrapper(tmp_path: Path):
    inner = llama()

    wd.save_hf(Calls(lambda m, x: m.inner(x).logits, inner=inner), tmp_path / "model")

    assert torch.equal(loaded(tmp_path / "model").lm_head.weight, inner.lm_head.weight)


def test_saving_leaves_the_model_and_the_random_state_alone(tmp_path: Path):
    model, state = llama(), torch.get_rng_state()
    config = model.config.to_dict()

    wd.save_hf(model, tmp_path / "model")

    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)


def test_a_directory_in_use_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(ValueError, match="is not an empty directory; choose a new or an empty one"):
        wd.save_hf(llama(), tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = llama()
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, part: (part / "half").write_text("") and 1 / 0)

    with pytest.raises((ZeroDivisionError, OSError)):
        wd.save_hf(model, tmp_path / "model")

    assert list(tmp_path.iterdir()) == []


def test_what_would_not_load_as_the_same_model_is_not_written(tmp_path: Path):
    model = llama()
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.ones(12))

    with pytest.raises(ValueError, match="LlamaForCausalLM does not load from what it saves"):
        wd.save_hf(model, tmp_path / "model")

    assert list(tmp_path.iterdir()) == []


def test_a_wrapper_with_weights_of_its_own_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'head.weight' is outside the LlamaForCausalLM and would not be saved"):
        wd.save_hf(Calls(lambda m, x: m.head(m.inner(x).logits), inner=llama(), head=nn.Linear(11, 2)), tmp_path / "m")


def test_another_kind_of_model_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="model is Linear and holds 0 transformers models, expected one"):
        wd.save_hf(nn.Linear(2, 2), tmp_path / "model")


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_directory_is_saved_whole(tmp_path: Path, tied: bool):
    llama(tied).save_pretrained(tmp_path / "before")
    model = wd.load_hf(tmp_path / "before")

    wd.save_hf(model, tmp_path / "after")

    again, inputs = loaded(tmp_path / "after"), ids(11, 3, 6)
    assert torch.allclose(again(inputs).logits, model(inputs), rtol=1e-5, atol=1e-5)
    assert again.config.tie_word_embeddings == tied


@torch.no_grad()
def test_folded_norms_untie_the_head_and_are_saved_so(tmp_path: Path):
    llama(tied=True).save_pretrained(tmp_path / "before")
    inputs = ids(11, 3, 6)
    model = wd.fold_norms(wd.load_hf(tmp_path / "before"), inputs)

    wd.save_hf(model, tmp_path / "after")

    again = wd.load_hf(tmp_path / "after")
    assert torch.allclose(again(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    assert not again.config.tie_word_embeddings
