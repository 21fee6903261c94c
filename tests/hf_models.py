"""Tiny models of Hugging Face's families, with random weights, to save and load; needs transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import drawn, ids

VOCABULARY, CONTEXT = 61, 32
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PIXELS = {name: _SIZES[name] for name in list(_SIZES)[1:5]} | {"image_size": 8, "patch_size": 4, "num_channels": 1}


def _made(model: str, config: str, **own: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**own))

    return make


def _causal(family: str, **own: Any) -> Callable[[], nn.Module]:
    return _made(f"{family}ForCausalLM", f"{family}Config", **_SIZES, **own)


def _falcon(**own: Any) -> Callable[[], nn.Module]:
    sizes = {name: size for name, size in _SIZES.items() if name != "intermediate_size"}
    return _made("FalconForCausalLM", "FalconConfig", **sizes, ffn_hidden_size=24, **own)


_GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama, grouped queries, tied": _causal("Llama", num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": _made("GPT2LMHeadModel", "GPT2Config", **_GPT, **_ENDS),
    "neox": _causal("GPTNeoX"),
    "gemma, one key, tied": _causal("Gemma", num_key_value_heads=1, head_dim=4),
    "gemma3": _made("Gemma3ForCausalLM", "Gemma3TextConfig", **_SIZES, num_key_value_heads=2, head_dim=4),
    "qwen2, biases": _causal("Qwen2", num_key_value_heads=2),
    "qwen3, norms of heads": _causal("Qwen3", num_key_value_heads=2, head_dim=4),
    "bert": _made("BertModel", "BertConfig", **_SIZES),
    "bert, classes": _made("BertForSequenceClassification", "BertConfig", **_SIZES, num_labels=3),
    "roberta": _made("RobertaModel", "RobertaConfig", **_SIZES | {"bos_token_id": 0, "pad_token_id": 1}),
    "vit": _made("ViTForImageClassification", "ViTConfig", **_PIXELS, num_labels=5),
}
FUSED: dict[str, Callable[[], nn.Module]] = {
    "gpt2": FAMILIES["gpt2"],
    "neox": FAMILIES["neox"],
    "phi3": _causal("Phi3", num_key_value_heads=2),
    "bigcode, one key": _made("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **_GPT, **_ENDS, multi_query=True),
    "bigcode": _made("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **_GPT, **_ENDS, multi_query=False),
    "bloom": _made("BloomForCausalLM", "BloomConfig", vocab_size=61, hidden_size=16, n_layer=2, n_head=4, **_ENDS),
    "falcon": _falcon(multi_query=False, new_decoder_architecture=False),
    "falcon, one key": _falcon(multi_query=True, new_decoder_architecture=False),
    "falcon, new": _falcon(new_decoder_architecture=True, num_kv_heads=2),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with weights, biases and gains that are all far from where they start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def inputs(family: str) -> Tensor:
    """A batch that a family takes."""
    return drawn(6, 1, 8, 8).float() if family == "vit" else ids(VOCABULARY, 6, 7)


def saved(family: str, folder: Path) -> nn.Module:
    """A randomised model of a family, written to a folder as transformers does it."""
    model = randomised(FAMILIES[family]())
    model.save_pretrained(folder)
    return model
