"""A transformer that grokked (a + b) mod 113: components beside the Fourier planes that it is known to use."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

import weightdecomp as wd
from benchmarks.checkpoint_scores import Known, damage_table, decomposed, score_table, scores
from benchmarks.report import provenance, spread, write, write_json
from benchmarks.trap_parts import rows_of
from weightdecomp._sites import Site
from weightdecomp.baselines import Fitted
from weightdecomp.baselines._weights import components

MODULUS = 113
SITES = ["embed", "block.mlp_in", "block.mlp_out", "unembed"]
ROTATED = "singular pairs, rotated to few neurons"


class Settings(NamedTuple):
    """What is run.

    Attributes:
        seeds: Of the decomposition and of the order of inputs.
        scored: Pairs that are not decomposed on, to score on.
        attack: Steps of the longest attack of the verification.
        config: Of the decomposition.
    """

    seeds: int = 2
    scored: int = 512
    attack: int = 40
    config: wd.Config | None = None


SMOKE = Settings(1, 64, 2, wd.Config(steps=1, batch=16, sample=64, rounds=1))


class Block(nn.Module):
    """Attention and MLP, of which only the last position is read."""

    def __init__(self, d: int, heads: int, d_mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.mlp_in, self.mlp_out = nn.Linear(d, d_mlp), nn.Linear(d_mlp, d)

    def forward(self, stream: Float[Tensor, "pair position d"]) -> Float[Tensor, "pair d"]:
        """The stream at the last position, which sees all."""
        q, k, v = (part(stream).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q[:, :, -1:], k, v)[:, :, 0]
        last = stream[:, -1] + self.o(mixed.flatten(1))
        return last + self.mlp_out(self.mlp_in(last).relu())


class Adder(nn.Module):
    """Numbers a, b and the sign of equality to logits of the sum."""

    def __init__(self, vocabulary: int = MODULUS + 1, d: int = 128, heads: int = 4, d_mlp: int = 512) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(vocabulary, d), nn.Linear(d, vocabulary)
        self.pos, self.block = nn.Parameter(torch.zeros(3, d)), Block(d, heads, d_mlp)

    def forward(self, tokens: Int[Tensor, "pair position"]) -> Float[Tensor, "pair token"]:
        """Logits at the last position."""
        return self.unembed(self.block(self.embed(tokens) + self.pos))


def loaded(folder: Path) -> Adder:
    """The checkpoint."""
    weights = load_file(folder / "model.safetensors")
    model = Adder()
    model.load_state_dict({name.replace("blocks.0.", "block."): x for name, x in weights.items()})
    return model.eval().requires_grad_(False)


def pairs() -> Int[Tensor, "pair position"]:
    """All inputs."""
    numbers = torch.arange(MODULUS)
    return F.pad(torch.cartesian_prod(numbers, numbers), (0, 1), value=MODULUS)


@torch.no_grad()
def tuned_to(model: Adder) -> Int[Tensor, " neuron"]:
    """The frequency of every neuron: the one with most of the variance of its activation over all pairs."""
    caught = []
    handle = model.block.mlp_in.register_forward_hook(lambda *given: caught.append(given[2]))
    model(pairs())
    handle.remove()
    over = caught[0].relu().T.reshape(-1, MODULUS, MODULUS).double()
    power = torch.fft.fft2(over - over.mean((1, 2), keepdim=True)).abs().square()
    found = []
    for k in range(1, MODULUS // 2 + 1):
        own = torch.tensor([0, k, MODULUS - k])  # of a, of b, and of both
        found.append(power[:, own][:, :, own].sum((1, 2)))
    return torch.stack(found).argmax(0) + 1


def mechanisms(model: Adder) -> Known:
    """By site and frequency, its share of the weight.

    In the MLP the neurons tuned to a frequency; in embedding and unembedding the projection of the numbers' rows on
    the plane of its cosine and sine. What belongs to no frequency is no mechanism.
    """
    tuned = tuned_to(model)
    frequencies = tuned.unique().tolist()
    owner = torch.stack([tuned == k for k in frequencies]).int().argmax(0)
    angles = 2 * math.pi * torch.outer(torch.tensor(frequencies), torch.arange(MODULUS)) / MODULUS
    waves = F.pad(torch.stack([angles.cos(), angles.sin()], 1), (0, 1)) * (2 / MODULUS) ** 0.5
    n = len(frequencies)
    shares = {
        "embed": [(model.embed.weight.T @ plane.T) @ plane for plane in waves],
        "block.mlp_in": rows_of(model.block.mlp_in.weight, owner, n),
        "block.mlp_out": [share.T.contiguous() for share in rows_of(model.block.mlp_out.weight.T, owner, n)],
        "unembed": [plane.T @ (plane @ model.unembed.weight) for plane in waves],
    }
    return {site: dict(zip(map(str, frequencies), shares[site], strict=True)) for site in SITES}


def rotated(site: Site) -> dict[str, Fitted]:
    """The singular pairs of an MLP matrix in the rotation that gathers each on few neurons; nothing elsewhere."""
    if not site.path.startswith("block."):
        return {}
    left, sizes, right = torch.linalg.svd(site.matrix(), full_matrices=False)
    rows = site.shape[0] > site.shape[1]  # whether its rows are the neurons
    reads, writes = (right, (left * sizes).T) if rows else (sizes[:, None] * right, left.T)
    turn = varimax((writes if rows else reads).T.double()).float()
    return {ROTATED: Fitted(ROTATED, "", [site], [components(site, turn.T @ reads, turn.T @ writes)])}


def varimax(loadings: Float[Tensor, "neuron pair"], steps: int = 300) -> Float[Tensor, "pair pair"]:
    """The rotation after which squared loadings vary most.

    Source:
        Kaiser 1958, by the iteration over singular value decompositions that is usual for it.
    """
    turn = torch.eye(loadings.shape[1], dtype=loadings.dtype)
    for _ in range(steps):
        turned = loadings @ turn
        left, _, right = torch.linalg.svd(loadings.T @ (turned**3 - turned * turned.square().mean(0)))
        turn = left @ right
    return turn


def measured(model: Adder, seed: int, settings: Settings) -> dict[str, Any]:
    """One decomposition of all four sites, verified and scored on held-out pairs."""
    every = pairs()[torch.randperm(MODULUS**2, generator=torch.Generator().manual_seed(seed))]
    unseen, seen = every[: settings.scored], every[settings.scored :]
    found, told = decomposed(model, seen, unseen, SITES, "mse", seed, settings.attack, settings.config)
    return told | {"scores": scores(found, mechanisms(model), unseen, seen, seed, rotated)}


def run(out: Path, data: Path, smoke: bool) -> None:
    """Measure and write."""
    settings = SMOKE if smoke else Settings()
    model = loaded(data / "modadd113")
    with torch.no_grad():
        right = float((model(pairs()).argmax(-1) == pairs()[:, :2].sum(1) % MODULUS).double().mean())
    runs = []
    for seed in range(settings.seeds):
        runs.append(measured(model, seed, settings))
        print(f"addition: seed {seed}", flush=True)
    record = {
        "accuracy": right,
        "frequencies": tuned_to(model).unique().tolist(),
        "runs": runs,
        "settings": settings._asdict() | {"config": (settings.config or wd.Config()).to_dict()},
        "provenance": provenance(),
    }
    write_json(out / "addition.json", record)
    write(out / "addition.md", page(record))


def page(record: dict[str, Any]) -> str:
    """The tables."""
    runs = record["runs"]
    parts = [
        "# Modular addition, as a transformer learnt it\n",
        f"One layer, (a + b) mod {MODULUS}, right on {record['accuracy']:.2%} of all pairs; its neurons are tuned to "
        f"frequencies {', '.join(map(str, record['frequencies']))}. A mechanism is a frequency at a site: the neurons "
        "tuned to it in the MLP, the plane of its cosine and sine in embedding and unembedding. Score: causal-effect "
        f"matching on {record['settings']['scored']} pairs that nothing was fitted to, mean over frequencies, 1 being "
        f"what deleting the mechanism does; groups of at most 24 units. Median (range) over {len(runs)} seeds. "
        f"Decomposing takes {spread([run['CPU-seconds'] for run in runs]).text('.0f')} CPU-seconds; verdict of seed 0: "
        f"{runs[0]['verdict']}.\n",
        score_table(runs, SITES),
        "\n## Damage\n\nTolerance .02, mean squared error of logits; the same pairs, "
        f"{record['settings']['attack']} steps x 3 restarts, sources shared.\n",
        damage_table(runs, "pair"),
    ]
    return "\n".join(parts) + "\n"
