"""An induction head, trained here: components beside the piece of every matrix for each token and each place.

A sequence runs through distinct tokens and from some place on round a part of them again. Where a token stood before,
what followed it then comes next: one head copies the token before, another finds the place that holds the last
token's copy and takes what stands there (Olsson et al. 2022, arXiv 2209.11895). With a head a layer and a stream wide
enough, what either reads can be told apart token by token, so that the mechanism is known exactly; that the model works
by these pieces alone is measured, not assumed.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import weightdecomp as wd
from benchmarks.checkpoint_scores import Known, damage_table, decomposed, score_table, scores
from benchmarks.images import accuracy
from benchmarks.report import provenance, spread, table, write, write_json

TOKENS, LENGTH = 12, 10  # without the mark that every sequence begins with
SITES = [f"{head}.{matrix}" for head in ("first", "second") for matrix in "qkvo"]
_SMOOTHING = 0.1  # probabilities of 1 would leave no gradient in the softmax
_FITTED = 4096  # sequences that rivals are fitted to
_MATTERS = 0.01  # of the divergence without the whole matrix, below which a piece is no mechanism


class Settings(NamedTuple):
    """What is run.

    Attributes:
        seeds: Of training, of the decomposition and of the sequences.
        training: Steps.
        sequences: To decompose on.
        scored: Sequences that are not decomposed on, to score on.
        attack: Steps of the longest attack of the verification.
        config: Of the decomposition.
    """

    seeds: int = 3
    training: int = 3000
    sequences: int = 16384
    scored: int = 512
    attack: int = 40
    config: wd.Config | None = None


SMOKE = Settings(1, 300, 64, 64, 2, wd.Config(steps=1, batch=16, sample=64, rounds=1))


class Head(nn.Module):
    """One head of causal attention, whose queries and keys see the place as well."""

    def __init__(self, d: int, d_head: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d_head, bias=False) for _ in range(3))
        self.o = nn.Linear(d_head, d, bias=False)

    def pattern(
        self, stream: Float[Tensor, "sequence position d"], places: Float[Tensor, "position d"]
    ) -> Float[Tensor, "sequence position position"]:
        """How much each position takes from those up to it."""
        score = self.q(stream + places) @ self.k(stream + places).mT / self.q.out_features**0.5
        later = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1)
        return score.masked_fill(later, -torch.inf).softmax(-1)

    def forward(
        self, stream: Float[Tensor, "sequence position d"], places: Float[Tensor, "position d"]
    ) -> Float[Tensor, "sequence position d"]:
        """The stream with what was taken."""
        return stream + self.o(self.pattern(stream, places) @ self.v(stream))


class Inductor(nn.Module):
    """Two heads in a row; logits of the next token where the last one stood before, zeros elsewhere."""

    def __init__(self, d: int = 48, d_head: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS + 1, d), nn.Embedding(LENGTH + 1, d)
        self.first, self.second = Head(d, d_head), Head(d, d_head)
        self.unembed = nn.Linear(d, TOKENS, bias=False)

    def forward(self, ids: Int[Tensor, "sequence position"]) -> Float[Tensor, "sequence position token"]:
        """Logits."""
        places = self.places(torch.arange(ids.shape[1], device=ids.device))
        stream = self.second(self.first(self.tokens(ids), places), places)
        return self.unembed(stream) * _before(ids).any(-1, keepdim=True)


def _before(ids: Int[Tensor, "sequence position"]) -> Bool[Tensor, "sequence position position"]:
    """Whether the same token stood at an earlier position."""
    return (ids[:, :, None] == ids[:, None, :]).tril(-1)


def answers(
    ids: Int[Tensor, "sequence position"],
) -> tuple[Int[Tensor, "sequence position"], Bool[Tensor, "sequence position"]]:
    """What follows each token by what followed it first, and whether it stood before at all."""
    before = _before(ids)
    after = (before.int().argmax(-1) + 1).clamp_max(ids.shape[1] - 1)
    return ids.gather(1, after), before.any(-1)


def drawn(n: int, rng: torch.Generator) -> Int[Tensor, "sequence position"]:
    """Sequences: a mark, distinct tokens, and from the third to the last place on a part of them round and round."""
    order = torch.rand(n, TOKENS, generator=rng).argsort(1)
    turn = torch.randint(3, LENGTH, (n, 1), generator=rng)
    back = (torch.rand(n, 1, generator=rng) * (turn - 1)).long()
    place = torch.arange(LENGTH).expand(n, -1)
    at = torch.where(place < turn, place, back + (place - turn) % (turn - back))
    return F.pad(order.gather(1, at), (1, 0), value=TOKENS)


def trained(seed: int, steps: int) -> Inductor:
    """A trained model; the same for the same seed."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        model, rng = Inductor(), torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, 4 * (1 - step / steps)))
        for _ in range(steps):
            ids = drawn(256, rng)
            following, known = answers(ids)
            loss = F.cross_entropy(model(ids)[known], following[known], label_smoothing=_SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def pieces(model: Inductor) -> Known:
    """By site and what it reads, the share of the weight that reads it and nothing else.

    The first head's queries and keys read places, its values tokens; the second's queries and values read tokens and
    its keys what the first head wrote for each. All these directions together are independent, so that the one dual to
    each is orthogonal to all others.
    """
    first, second, tokens, places = model.first, model.second, model.tokens.weight, model.places.weight
    written = first.o(first.v(tokens))
    # What is read, and what else is in the same stream.
    reads: dict[str, tuple[Tensor, list[Tensor]]] = {
        "first.q": (places, [tokens]),
        "first.k": (places, [tokens]),
        "first.v": (tokens, []),
        "first.o": (first.v(tokens), []),
        "second.q": (tokens, [written, places]),
        "second.k": (written, [tokens, places]),
        "second.v": (tokens, [written]),
        "second.o": (second.v(tokens), []),
    }
    found = {}
    for site, (own, others) in reads.items():
        weight, dual = _weight(model, site), torch.linalg.pinv(torch.cat([own, *others]))
        found[site] = {str(i): torch.outer(weight @ read, dual[:, i]) for i, read in enumerate(own)}
    return found


def _weight(model: Inductor, site: str) -> Tensor:
    weight = model.get_submodule(site).weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def replaced(model: Inductor, weights: dict[str, Tensor]) -> Inductor:
    """A copy with other matrices."""
    other = copy.deepcopy(model)
    for site, weight in weights.items():
        _weight(other, site).copy_(weight)
    return other


@torch.no_grad()
def divergence(model: Inductor, other: Inductor, ids: Int[Tensor, "sequence position"]) -> float:
    """KL of the other's prediction from the model's, over positions with an answer."""
    known = answers(ids)[1]
    target, output = (one(ids)[known].log_softmax(-1) for one in (model, other))
    return float(F.kl_div(output, target, log_target=True, reduction="batchmean"))


def mechanisms(model: Inductor, ids: Int[Tensor, "sequence position"]) -> Known:
    """The pieces without which, each alone, the model answers otherwise: not those of places that no copy follows."""
    found = {}
    for site, own in pieces(model).items():
        weight = _weight(model, site)
        least = _MATTERS * divergence(model, replaced(model, {site: torch.zeros_like(weight)}), ids)
        found[site] = {
            name: share
            for name, share in own.items()
            if divergence(model, replaced(model, {site: weight - share}), ids) > least
        }
    return found


@torch.no_grad()
def evidence(model: Inductor, ids: Int[Tensor, "sequence position"]) -> dict[str, float]:
    """Whether the model does by these pieces what it is said to do."""
    following, known = answers(ids)
    places = model.places(torch.arange(ids.shape[1]))
    stream = model.tokens(ids)
    back = model.first.pattern(stream, places).diagonal(-1, 1, 2)[:, :-1]  # the last place is never a key
    found = (ids[:, None, :] == following[..., None]).tril()
    taken = (model.second.pattern(model.first(stream, places), places) * found).sum(-1)[known]
    alone = replaced(model, {site: sum(own.values(), torch.zeros(())) for site, own in pieces(model).items()})
    return {
        "accuracy": _accuracy(model, ids),
        "first head: attention to the place before": float(back.mean()),
        "second head: attention to what followed": float(taken.mean()),
        "accuracy with the pieces alone": _accuracy(alone, ids),
        "KL with the pieces alone": divergence(model, alone, ids),
    }


@torch.no_grad()
def _accuracy(model: Inductor, ids: Int[Tensor, "sequence position"]) -> float:
    following, known = answers(ids)
    return accuracy(model(ids)[known], following[known])


def measured(seed: int, settings: Settings) -> dict[str, Any]:
    """One model, trained, decomposed, verified and scored on sequences that nothing was fitted to."""
    model, rng = trained(seed, settings.training), torch.Generator().manual_seed(seed + 1000)
    seen, unseen = drawn(settings.sequences, rng), drawn(settings.scored, rng)
    known = mechanisms(model, unseen)
    found, told = decomposed(model, seen, unseen, SITES, "kl", seed, settings.attack, settings.config)
    return told | {
        "evidence": evidence(model, unseen),
        "mechanisms": {site: list(own) for site, own in known.items()},
        "starts": {path: one.start for path, one in found.parts.items()},
        "scores": scores(found, known, unseen, seen[:_FITTED], seed),
    }


def run(out: Path, smoke: bool) -> None:
    """Measure and write."""
    settings, runs = SMOKE if smoke else Settings(), []
    for seed in range(settings.seeds):
        runs.append(measured(seed, settings))
        print(f"induction: seed {seed}", flush=True)
    record = {
        "runs": runs,
        "settings": settings._asdict() | {"config": (settings.config or wd.Config()).to_dict()},
        "provenance": provenance(),
    }
    write_json(out / "induction.json", record)
    write(out / "induction.md", page(record))


def page(record: dict[str, Any]) -> str:
    """The tables."""
    runs, settings = record["runs"], record["settings"]
    seconds = [run["CPU-seconds"] for run in runs]
    parts = [
        "# An induction head, trained\n",
        f"Two layers of one head, {TOKENS} tokens, {LENGTH} places, {settings['training']} steps. A mechanism is the "
        "piece of a matrix for one place (queries and keys of the first head) or one token, where deleting it does at "
        f"least {_MATTERS:.0%} of what deleting the matrix does. Score: causal-effect matching on {settings['scored']} "
        "sequences that nothing was fitted to, mean over the pieces of a site; groups of at most 24 units. Median "
        f"(range) over {len(runs)} models. Decomposing takes {spread(seconds).text('.0f')} CPU-seconds; verdict of "
        f"seed 0: {runs[0]['verdict']}.\n",
        table(
            ["the mechanism, checked", "held-out sequences"],
            [[name, _over(runs, name)] for name in runs[0]["evidence"]],
        ),
        "",
        score_table(runs, SITES),
        f"\n## Damage\n\nTolerance .02; the same sequences, {settings['attack']} steps x 3 restarts, sources shared.\n",
        damage_table(runs, "token"),
    ]
    return "\n".join(parts) + "\n"


def _over(runs: Sequence[dict[str, Any]], name: str) -> str:
    return spread([run["evidence"][name] for run in runs]).text(".4f")
