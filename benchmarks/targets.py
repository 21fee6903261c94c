"""Toy models whose mechanisms are known: trained here, deterministic by seed, and checked before use.

Two families, each from the literature on parameter decomposition:

- *TMS* (toy model of superposition): ``ReLU(W^T W x + b)`` squeezes sparse features through a few dimensions;
  the mechanisms are one rank-one piece per feature in the first and in the last matrix (and one dense piece
  in an identity between them, where there is one).
- *Residual MLP*: a residual stream with a frozen random embedding adds ``ReLU(x)`` to ``x`` with fewer
  neurons than features; the mechanisms are one piece per feature in every ``mlp_in`` and one dense piece in
  every ``mlp_out``.

Source: Braun et al. 2025 (APD) and Bushnaq et al. 2025 (SPD) for tasks and sizes; the verification and the
exact change of basis that makes training the residual MLPs cheap are ours.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CACHE = Path(__file__).parent / ".cache"
"""Where trained weights are kept between runs unless another directory is given."""

RECIPE = 1
"""Version of the training code: a cached target of another recipe is trained again."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The input distribution: independent features, each on with one probability and uniform when on.

    Attributes:
        n_features: Number of features, before any rotation.
        probability: How often a feature is on.
        low: Smallest value of a feature that is on.
        high: Largest value of a feature that is on.
        rotation: Orthogonal matrix that takes features to the model's input; None where they are the input.
    """

    n_features: int
    probability: float
    low: float
    high: float
    rotation: Float[Tensor, "d_in feature"] | None = None

    def features(self, n_inputs: int, rng: torch.Generator) -> Float[Tensor, "batch feature"]:
        """Draw feature values; zero where a feature is off."""
        shape = (n_inputs, self.n_features)
        values = self.low + (self.high - self.low) * torch.rand(shape, generator=rng)
        return values * (torch.rand(shape, generator=rng) < self.probability)

    def encoded(self, features: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch d_in"]:
        """Express features in the model's input basis."""
        return features if self.rotation is None else features @ self.rotation.T

    def decoded(self, inputs: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch feature"]:
        """Recover features from model inputs, to rounding."""
        return inputs if self.rotation is None else inputs @ self.rotation


@dataclass(frozen=True, eq=False)
class PerFeature:
    """A site whose mechanisms are one low-rank piece per feature, in feature order.

    Piece ``i`` is the sum of ``u_r v_r^T`` over the rows ``r`` that it owns.

    Attributes:
        u: Output directions.
        v: Input directions.
        owner: The feature that each row belongs to, ascending.
    """

    u: Float[Tensor, "row d_out"]
    v: Float[Tensor, "row d_in"]
    owner: Int[Tensor, " row"]

    @property
    def n(self) -> int:
        """Number of pieces."""
        return int(self.owner.max()) + 1

    @property
    def weights(self) -> list[Float[Tensor, "d_out d_in"]]:
        """One matrix per feature."""
        return [self.u[self.owner == i].T @ self.v[self.owner == i] for i in range(self.n)]


@dataclass(frozen=True)
class Dense:
    """A site that is one mechanism of this rank, needed on every input that has any feature on.

    Attributes:
        rank: The rank of the site's matrix on the data.
    """

    rank: int


Mechanism = PerFeature | Dense


@dataclass(frozen=True, eq=False)
class Target:
    """A trained model together with what a decomposition of it should find.

    Attributes:
        name: The task.
        seed: The seed of its initial weights and training data.
        model: The trained model, in eval mode.
        inputs: The distribution it was trained on.
        mechanisms: The known answer, by site path.
        verified: Whether the training found the solution that `mechanisms` describes.
        reason: Why it is not verified; empty when it is.
        stats: Figures of the training and of the check, by name.
    """

    name: str
    seed: int
    model: nn.Module
    inputs: Inputs
    mechanisms: Mapping[str, Mechanism]
    verified: bool
    reason: str
    stats: Mapping[str, float]

    def batches(self, n_inputs: int, seed: int, size: int = 1024) -> list[Float[Tensor, "batch d_in"]]:
        """Draw inputs from the training distribution.

        Args:
            n_inputs: Number of inputs in all.
            seed: Seed of the draw; independent of the target's own seed.
            size: Largest number of inputs in one batch.
        """
        rng = torch.Generator().manual_seed(seed)
        return list(self.inputs.encoded(self.inputs.features(n_inputs, rng)).split(size))

    def probes(self, value: float = 0.75) -> Float[Tensor, "feature d_in"]:
        """One input per feature, in feature order, with that feature alone on."""
        return self.inputs.encoded(value * torch.eye(self.inputs.n_features))

    def active(self, inputs: Float[Tensor, "batch d_in"]) -> Bool[Tensor, "batch feature"]:
        """Which features are on in each input."""
        # A rotation and its inverse leave zeros at about 1e-7.
        return self.inputs.decoded(inputs).abs() > 1e-5


# ------------------------------------------------------------ toy model of superposition


@dataclass(frozen=True)
class TmsTraining:
    """How a toy model of superposition is trained.

    The output bias starts at zero: with PyTorch's default bias most seeds lose features for good (27 of 30).
    """

    n_features: int
    n_hidden: int
    steps: int
    batch: int
    lr: float = 5e-3
    weight_decay: float = 0.01
    probability: float = 0.05
    bias_bound: float = 0.0


class Tms(nn.Module):
    """``ReLU(W^T W x + b)`` as two linear layers, optionally with a frozen identity between them."""

    def __init__(
        self,
        encoder: Float[Tensor, "hidden d_in"],
        decoder: Float[Tensor, "feature hidden"],
        bias: Float[Tensor, " feature"],
        identity: bool,
    ):
        super().__init__()
        n_hidden = encoder.shape[0]
        self.linear1 = linear(encoder)
        if identity:
            self.hidden = linear(torch.eye(n_hidden)).requires_grad_(False)
        self.linear2 = linear(decoder, bias)
        self.identity = identity

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch feature"]:
        """Reconstruct the features."""
        inner = self.linear1(x)
        if self.identity:
            inner = self.hidden(inner)
        return torch.relu(self.linear2(inner))


def tms(
    n_features: int,
    n_hidden: int,
    identity: bool,
    rotated: bool,
    seed: int,
    cache: Path | None = CACHE,
    steps: int | None = None,
) -> Target:
    """Train (or read from the cache) a toy model of superposition.

    Args:
        n_features: Number of features: 5 or 40 in the published tasks.
        n_hidden: Width of the bottleneck: 2 or 10.
        identity: Whether to insert a frozen identity into the bottleneck. The function stays the same, so the
            weights are those of the target without it.
        rotated: Whether the model takes ``R x`` instead of ``x`` for a random orthogonal ``R`` that its first
            matrix undoes, so that coordinates carry no hint.
        seed: Seed of the initial weights, the training data and the rotation.
        cache: Directory of trained weights; None trains afresh.
        steps: Number of training steps; None for the published number.
    """
    published = {(5, 2): (5000, 1024), (40, 10): (2000, 2048)}
    default_steps, batch = published.get((n_features, n_hidden), (5000, 1024))
    training = TmsTraining(n_features, n_hidden, default_steps if steps is None else steps, batch)
    name = f"tms_{n_features}_{n_hidden}" + "_id" * identity + "_rotated" * rotated
    tensors, stats = trained(training, seed, cache)
    return tms_target(name, tensors, stats, training, identity, rotated, seed)


def tms_target(
    name: str,
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, float],
    training: TmsTraining,
    identity: bool,
    rotated: bool,
    seed: int,
) -> Target:
    """Wrap trained weights as a target, with its mechanisms and its verification."""
    w, bias = tensors["weight"], tensors["bias"]
    n_hidden, n_features = w.shape
    rotation = random_rotation(n_features, seed) if rotated else None
    basis = torch.eye(n_features) if rotation is None else rotation
    owner = torch.arange(n_features)
    mechanisms: dict[str, Mechanism] = {"linear1": PerFeature(w.T.clone(), basis.T.contiguous(), owner)}
    if identity:
        mechanisms["hidden"] = Dense(n_hidden)
    mechanisms["linear2"] = PerFeature(torch.eye(n_features), w.T.clone(), owner)
    reason, checked = tms_check(w, stats["loss"])
    return Target(
        name=name,
        seed=seed,
        model=Tms(w @ basis.T, w.T.clone(), bias, identity).eval(),
        inputs=Inputs(n_features, training.probability, 0.0, 1.0, rotation),
        mechanisms=mechanisms,
        verified=not reason,
        reason=reason,
        stats={**stats, **checked},
    )


def tms_check(w: Float[Tensor, "hidden feature"], loss: float) -> tuple[str, dict[str, float]]:
    """Say why the weights do not keep all features apart (empty if they do), with figures.

    The loss bounds lie between the solutions that keep every feature and those that lose one (5-2: .0018
    against .0036; 40-10: .0039-.0042 against .0043 and more). In two dimensions the columns must also form a
    regular polygon.
    """
    n_hidden, n_features = w.shape
    norms = w.norm(dim=0)
    stats = {"smallest_norm": norms.min().item(), "largest_norm": norms.max().item()}
    bound = {(5, 2): 0.0022, (40, 10): 0.0043}.get((n_features, n_hidden), math.inf)
    if not loss <= bound:
        return f"loss {loss:.4f} is above {bound}", stats
    lost = int((norms < 0.9).sum())
    if lost:
        return f"{lost} of {n_features} features are lost (column norm below 0.9)", stats
    if n_hidden == 2:
        angles = torch.atan2(w[1], w[0]).sort().values
        gaps = torch.cat([angles.diff(), angles[:1] + 2 * math.pi - angles[-1:]]) * 180 / math.pi
        stats["smallest_gap_degrees"] = gaps.min().item()
        if (gaps - 360 / n_features).abs().max() > 10:
            return f"the columns are no regular polygon (smallest angle {gaps.min():.0f} degrees)", stats
    return "", stats


def train_tms(training: TmsTraining, seed: int) -> tuple[dict[str, Tensor], float]:
    """Train tied weights and the output bias; return them and the loss on fresh inputs."""
    rng = torch.Generator().manual_seed(seed)
    n_features, n_hidden = training.n_features, training.n_hidden
    inputs = Inputs(n_features, training.probability, 0.0, 1.0)
    weight = uniform((n_hidden, n_features), 1 / math.sqrt(n_features), rng).requires_grad_()
    bias = uniform((n_features,), training.bias_bound, rng).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return (torch.relu((x @ weight.T) @ weight + bias) - x).square().mean()

    optimiser = torch.optim.AdamW([weight, bias], lr=training.lr, weight_decay=training.weight_decay)
    for _ in range(training.steps):
        optimiser.zero_grad()
        loss(inputs.features(training.batch, rng)).backward()
        optimiser.step()
    with torch.no_grad():
        final = loss(inputs.features(100_000, rng)).item()
    return {"weight": weight.detach(), "bias": bias.detach()}, final


# ------------------------------------------------------------ residual MLP


@dataclass(frozen=True)
class ResidualTraining:
    """How a residual MLP is trained; the learning rate falls to zero along a cosine."""

    n_layers: int
    n_features: int
    d_mlp: int
    steps: int
    d_embed: int = 1000
    batch: int = 2048
    lr: float = 3e-3
    weight_decay: float = 0.01
    probability: float = 0.01


class ReluMlp(nn.Module):
    """Two linear layers without biases and a ReLU between them."""

    def __init__(self, mlp_in: Float[Tensor, "neuron d_embed"], mlp_out: Float[Tensor, "d_embed neuron"]):
        super().__init__()
        self.mlp_in = linear(mlp_in)
        self.mlp_out = linear(mlp_out)

    def forward(self, x: Float[Tensor, "*batch d_embed"]) -> Float[Tensor, "*batch d_embed"]:
        """Return what the block adds to the residual stream."""
        return self.mlp_out(torch.relu(self.mlp_in(x)))


class ResidualMlp(nn.Module):
    """Frozen random unit rows as embedding, residual MLP blocks, and read-out by the embedding's transpose.

    The embedding is a buffer, not a parameter: it is not trained and is no site.
    """

    embedding: Tensor

    def __init__(self, embedding: Float[Tensor, "feature d_embed"], layers: list[ReluMlp]):
        super().__init__()
        self.register_buffer("embedding", embedding)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch feature"]:
        """Return approximately ``x + ReLU(x)``."""
        stream = x @ self.embedding
        for layer in self.layers:
            stream = stream + layer(stream)
        return stream @ self.embedding.T


def residual_mlp(n_layers: int, seed: int, cache: Path | None = CACHE, steps: int | None = None) -> Target:
    """Train (or read from the cache) a residual MLP of the published widths.

    Args:
        n_layers: 1 (100 features, 50 neurons), 2 (100 features, 25 a layer) or 3 (102 features, 17 a layer).
        seed: Seed of the embedding, the initial weights and the training data.
        cache: Directory of trained weights; None trains afresh.
        steps: Number of training steps; None for our default.

    Raises:
        ValueError: If `n_layers` is not 1, 2 or 3.
    """
    widths = {1: (100, 50, 1000), 2: (100, 25, 1000), 3: (102, 17, 2000)}
    if n_layers not in widths:
        raise ValueError(f"n_layers is {n_layers}, expected one of {sorted(widths)}")
    n_features, d_mlp, default_steps = widths[n_layers]
    training = ResidualTraining(n_layers, n_features, d_mlp, default_steps if steps is None else steps)
    tensors, stats = trained(training, seed, cache)
    return residual_target(f"resid_mlp_{n_layers}", tensors, stats, training, seed)


@torch.no_grad()
def residual_target(
    name: str,
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, float],
    training: ResidualTraining,
    seed: int,
) -> Target:
    """Wrap trained weights as a target, with its mechanisms and its verification."""
    indices = range(training.n_layers)
    layers = [ReluMlp(tensors[f"mlp_in.{i}"], tensors[f"mlp_out.{i}"]) for i in indices]
    model = ResidualMlp(tensors["embedding"], layers).eval()
    mechanisms: dict[str, Mechanism] = {}
    for i in indices:
        mechanisms[f"layers.{i}.mlp_in"] = stream_mechanism(model, i)
        mechanisms[f"layers.{i}.mlp_out"] = Dense(training.d_mlp)
    reason, checked = residual_check(model, stats["loss"], training)
    return Target(
        name=name,
        seed=seed,
        model=model,
        inputs=Inputs(training.n_features, training.probability, -1.0, 1.0),
        mechanisms=mechanisms,
        verified=not reason,
        reason=reason,
        stats={**stats, **checked},
    )


def stream_mechanism(model: ResidualMlp, index: int) -> PerFeature:
    """Split an ``mlp_in`` into one rank-one piece per feature that reads the feature off the residual stream.

    With ``d_i`` the stream at this layer when feature i alone is 1, piece i is ``(W d_i) v_i^T`` where
    ``v_i . d_j`` is 1 for i = j and 0 otherwise. In the first layer ``d_i`` is a row of the embedding and
    that, with ``v_i`` in the span of the data, is the whole of W on the data. Deeper, the stream also moves
    in the earlier layers' output directions outside the span of the ``d_i``; the smallest ``v`` that makes
    the pieces sum to W there too is added, which leaves ``v_i . d_j`` as it is.

    Deeper pieces are one convention among near-equals, since no rank-one split is exact there: a feature at
    -1 takes another path through the earlier ReLUs (the two responses ``W d_i`` have a cosine of about -.86).
    Of the closed forms tried (+1, the mean of +1 and -1, regression on data) this one has the least damage,
    .033 in two layers and .045 in three; descent on the damage itself finds rank-one pieces a quarter away,
    at .026 in two layers.
    """
    stream = model.embedding
    blocks = [block for block in model.layers if isinstance(block, ReluMlp)]
    for block in blocks[:index]:
        stream = stream + block(stream)
    matrix = blocks[index].mlp_in.weight.detach()
    u = stream @ matrix.T
    v = torch.linalg.pinv(stream.double())
    if index:
        reachable = torch.cat([model.embedding, *(block.mlp_out.weight.T for block in blocks[:index])])
        basis = torch.linalg.qr(reachable.double().T).Q
        missing = matrix.double() @ basis @ basis.T - u.T.double() @ v.T
        v = v + (torch.linalg.pinv(u.T.double()) @ missing).T
    return PerFeature(u, v.T.to(matrix.dtype).contiguous(), torch.arange(len(stream)))


def residual_check(model: ResidualMlp, loss: float, training: ResidualTraining) -> tuple[str, dict[str, float]]:
    """Say why the model does not compute every feature (empty if it does), with figures.

    A model that serves as many features as it has neurons and leaves the others out reaches the *naive* loss;
    a verified target is below that and answers an input of 1 (where 2 is right) by at least 1.3 for every
    feature.
    """
    n_features, n_neurons = training.n_features, training.n_layers * training.d_mlp
    # An unserved feature is off by ReLU(x), whose mean square is p/6.
    naive = training.probability / 6 * (1 - n_neurons / n_features)
    answers = model(torch.eye(n_features)).diagonal()
    stats = {
        "naive_loss": naive,
        "smallest_answer": answers.min().item(),
        "mean_answer": answers.mean().item(),
    }
    if not loss < naive:
        return f"loss {loss:.3e} is not below the naive {naive:.3e}", stats
    if answers.min() < 1.3:
        weak = int((answers < 1.3).sum())
        return f"{weak} of {n_features} features are hardly served (answer to 1 below 1.3)", stats
    return "", stats


def train_residual(training: ResidualTraining, seed: int) -> tuple[dict[str, Tensor], float]:
    """Train the blocks; return all weights and the loss on fresh inputs.

    The forward pass multiplies the weights with the embedding before the inputs: with G = E E^T the output is
    ``x G + sum_l h_l (E O_l)^T`` and layer l reads ``x (I_l E^T)^T + sum_k h_k (I_l O_k)^T``. The parameters,
    and so AdamW's steps, are those of the plain model to rounding, at a fraction of the work.
    """
    rng = torch.Generator().manual_seed(seed)
    inputs = Inputs(training.n_features, training.probability, -1.0, 1.0)
    d_embed, d_mlp = training.d_embed, training.d_mlp
    embedding = torch.randn(training.n_features, d_embed, generator=rng)
    embedding = embedding / embedding.norm(dim=1, keepdim=True)
    gram = embedding @ embedding.T
    reading, writing = [], []
    for _ in range(training.n_layers):
        reading.append(uniform((d_mlp, d_embed), 1 / math.sqrt(d_embed), rng).requires_grad_())
        writing.append(uniform((d_embed, d_mlp), 1 / math.sqrt(d_mlp), rng).requires_grad_())

    def loss(x: Tensor) -> Tensor:
        output, earlier = x @ gram, []
        for read, write in zip(reading, writing, strict=True):
            inner = x @ (embedding @ read.T)
            for hidden, written in earlier:
                inner = inner + hidden @ (read @ written).T
            hidden = torch.relu(inner)
            earlier.append((hidden, write))
            output = output + hidden @ (embedding @ write).T
        return (output - x - torch.relu(x)).square().mean()

    optimiser = torch.optim.AdamW([*reading, *writing], lr=training.lr, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(training.steps, 1))
    for _ in range(training.steps):
        optimiser.zero_grad()
        loss(inputs.features(training.batch, rng)).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        final = loss(inputs.features(100_000, rng)).item()
    tensors = {"embedding": embedding}
    for i, (read, write) in enumerate(zip(reading, writing, strict=True)):
        tensors |= {f"mlp_in.{i}": read.detach(), f"mlp_out.{i}": write.detach()}
    return tensors, final


# ------------------------------------------------------------ by name, and the cache

TASKS = (
    *("tms_5_2", "tms_5_2_id", "tms_40_10", "tms_40_10_id"),
    *("tms_5_2_rotated", "tms_5_2_id_rotated", "tms_40_10_rotated", "tms_40_10_id_rotated"),
    *("resid_mlp_1", "resid_mlp_2", "resid_mlp_3"),
)
"""The benchmark's tasks: eight TMS targets and three residual MLPs."""


def make(name: str, seed: int, cache: Path | None = CACHE, steps: int | None = None) -> Target:
    """Train (or read from the cache) the target of a task.

    Args:
        name: One of `TASKS`.
        seed: Seed of the initial weights, the training data and any rotation.
        cache: Directory of trained weights; None trains afresh.
        steps: Number of training steps; None for the default, 0 for an untrained network of the same shapes.

    Raises:
        ValueError: If there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; expected one of {list(TASKS)}")
    parts = name.split("_")
    if parts[0] == "resid":
        return residual_mlp(int(parts[2]), seed, cache, steps)
    return tms(int(parts[1]), int(parts[2]), "id" in parts, "rotated" in parts, seed, cache, steps)


def verified_targets(
    name: str, n: int, cache: Path | None = CACHE, steps: int | None = None, limit: int | None = None
) -> tuple[list[Target], list[Target]]:
    """Walk the seeds 0, 1, 2, ... until `n` targets hold the claimed mechanism.

    Args:
        name: The task.
        n: Number of targets wanted.
        cache: Directory of trained weights; None trains afresh.
        steps: Number of training steps; None for the default.
        limit: Number of seeds to try; None for ``4 n + 10``.

    Returns:
        The accepted targets and the rejected ones, each in order of seed.

    Raises:
        ValueError: If `limit` seeds do not hold `n` verified targets; names the last reason.
    """
    accepted: list[Target] = []
    rejected: list[Target] = []
    for seed in range(4 * n + 10 if limit is None else limit):
        if len(accepted) == n:
            break
        target = make(name, seed, cache, steps)
        (accepted if target.verified else rejected).append(target)
    if len(accepted) < n:
        last = rejected[-1].reason if rejected else "no seed was tried"
        raise ValueError(f"only {len(accepted)} of {n} targets of {name!r} verified; the last reason: {last}")
    return accepted, rejected


def trained(
    training: TmsTraining | ResidualTraining, seed: int, cache: Path | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read trained tensors and figures from the cache, or train and write them there."""
    settings = {"kind": type(training).__name__, "recipe": RECIPE, "seed": seed, **asdict(training)}
    stem = "-".join(str(value) for value in settings.values())
    if cache is not None and (cache / f"{stem}.json").exists():
        stored = json.loads((cache / f"{stem}.json").read_text())
        if stored["settings"] == settings:
            return load_file(cache / f"{stem}.safetensors"), stored["stats"]
    start = time.process_time()
    with torch.enable_grad(), one_thread():
        is_tms = isinstance(training, TmsTraining)
        tensors, loss = train_tms(training, seed) if is_tms else train_residual(training, seed)
    stats = {"loss": loss, "training_cpu_seconds": time.process_time() - start}
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        # Each file appears whole, and the JSON last: a killed run leaves no entry that looks complete.
        part = cache / f"{stem}.{os.getpid()}"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        part.replace(cache / f"{stem}.safetensors")
        part.write_text(json.dumps({"settings": settings, "stats": stats}, indent=2))
        part.replace(cache / f"{stem}.json")
    return tensors, stats


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread inside: sums then do not depend on the number of cores; no slower this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def uniform(shape: tuple[int, ...], bound: float, rng: torch.Generator) -> Tensor:
    """Draw uniformly from ``[-bound, bound]``."""
    return bound * (2 * torch.rand(shape, generator=rng) - 1)


def random_rotation(n: int, seed: int) -> Float[Tensor, "n n"]:
    """Draw an orthogonal matrix uniformly, from a stream of its own: rotating a target keeps its weights."""
    rng = torch.Generator().manual_seed(1_000_003 + seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))
    # Without the signs QR's own convention would make the draw uneven.
    return (q * r.diagonal().sign()).float()


def linear(weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None) -> nn.Linear:
    """Build a linear layer around given weights without drawing random numbers."""
    # Built without storage, so that its own initialisation draws nothing.
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight.clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())
    return module
