"""Our sparse coders beside `sae-lens` and `eai-sparsify`: the same functions, losses and recovery, on the same data.

Skipped where `pip install weightdecomp[baselines]` was not done.
"""

import warnings
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.models import drawn
from weightdecomp._compare import matched_cosine
from weightdecomp.baselines import L1, BatchTopK, JumpReLU, TopK, Training
from weightdecomp.baselines._coder import _AUXILIARY, _DEAD, Coder, fitted, scale
from weightdecomp.baselines._rules import Rule

D, LATENTS = 8, 64
RULES = [L1(coefficient=0.3), TopK(k=2), BatchTopK(k=2), JumpReLU()]


def _library(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports in its turn
        return pytest.importorskip(name, reason="an optional extra: pip install weightdecomp[baselines]")


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    return _library("sae_lens")


@pytest.fixture(scope="module")
def sparsify() -> ModuleType:
    return _library("sparsify")


def lens_coder(library: ModuleType, coder: Coder) -> Any:
    """The same autoencoder in sae-lens, to be trained on."""
    settings: dict[str, Any] = {"d_in": coder.encoder.shape[1], "d_sae": len(coder.encoder), "dtype": "float64"}
    rule = coder.rule
    if isinstance(rule, TopK | BatchTopK):
        made = library.TopKTrainingSAE if isinstance(rule, TopK) else library.BatchTopKTrainingSAE
        config = library.TopKTrainingSAEConfig if isinstance(rule, TopK) else library.BatchTopKTrainingSAEConfig
        settings |= {"k": rule.k, "aux_loss_coefficient": _AUXILIARY, "rescale_acts_by_decoder_norm": False}
        found = made(config(**settings))
    elif isinstance(rule, L1):
        found = library.StandardTrainingSAE(library.StandardTrainingSAEConfig(**settings))
    else:
        found = library.JumpReLUTrainingSAE(library.JumpReLUTrainingSAEConfig(**settings))
        found.threshold.data = coder.state.exp().detach()
    found.W_enc.data, found.W_dec.data = coder.encoder.detach().T.clone(), coder.decoder.detach().clone()
    # Theirs takes the offset from rows before it reads them, ours another centre.
    found.b_enc.data = (coder.bias + (coder.offset - coder.centre) @ coder.encoder.T).detach()
    found.b_dec.data = coder.offset.detach().clone()
    return found


def sparsify_coder(library: ModuleType, coder: Coder, transcode: bool) -> Any:
    """The same TopK coder in eai-sparsify, whose transcoders read rows as they are."""
    assert isinstance(coder.rule, TopK)
    skip, (n, d) = coder.skip is not None, coder.encoder.shape
    config = library.SparseCoderConfig(num_latents=n, k=coder.rule.k, skip_connection=skip, transcode=transcode)
    found = library.SparseCoder(d, config, dtype=torch.float64)
    taken = torch.zeros_like(coder.offset) if transcode else coder.offset
    found.encoder.weight.data, found.W_dec.data = coder.encoder.detach().clone(), coder.decoder.detach().clone()
    found.encoder.bias.data = (coder.bias + (taken - coder.centre) @ coder.encoder.T).detach()
    found.b_dec.data = coder.offset.detach().clone()
    if coder.skip is not None:
        found.b_dec.data = (coder.offset - coder.centre @ coder.skip.T).detach()
        found.W_skip.data = coder.skip.detach().clone()
    return found


class Seen(NamedTuple):
    """One step of our trainer: the coder before it, the rows it took, the latents that are dead, and its loss."""

    coder: Coder
    index: Tensor
    dead: Tensor
    loss: float


def watched(x: Tensor, y: Tensor, rule: Rule, steps: int, skip: bool = False) -> list[Seen]:
    """Every step of a short training."""
    seen: list[tuple[Coder, Tensor, Tensor]] = []
    losses: list[float] = []
    silent = torch.zeros(LATENTS)

    def look(coder: Coder, index: Tensor, latents: Tensor, written: Tensor) -> Tensor:
        silent.add_(1).masked_fill_((latents > 0).any(0), 0)
        kept = {name: value.detach().clone() for name, value in vars(coder).items() if isinstance(value, Tensor)}
        seen.append((replace(coder, **kept), index, silent > _DEAD))
        return written.new_zeros(())

    rng, training = torch.Generator().manual_seed(0), Training(steps=steps, batch=64)
    fitted(
        x, y, LATENTS, rule, training, rng,
        extra=look, skip=skip, on_step=lambda _, values: losses.append(values["loss"]),
    )  # fmt: skip
    return [Seen(*one, loss) for one, loss in zip(seen, losses, strict=True)]


def trained(x: Tensor, y: Tensor, rule: Rule, skip: bool = False) -> Coder:
    """A short training's result."""
    training, rng = Training(steps=60, batch=64), torch.Generator().manual_seed(0)
    return fitted(x, y, LATENTS, rule, training, rng, skip=skip)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_an_autoencoder_of_the_same_weights_is_that_of_sae_lens(sae_lens: ModuleType, rule: Rule):
    x = 3 * drawn(256, D) + 1
    coder = trained(x, x, rule)

    if isinstance(rule, BatchTopK):  # sae-lens runs it, when trained, as thresholds
        state = coder.state.log().expand(LATENTS)
        theirs = lens_coder(sae_lens, replace(coder, rule=JumpReLU(), state=state))
    else:
        theirs = lens_coder(sae_lens, coder)

    assert_close(coder.latents(x), theirs.encode(x), rtol=0, atol=1e-10)
    assert_close(coder.written(coder.latents(x), x), theirs(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_step_s_loss_is_that_of_sae_lens(sae_lens: ModuleType, rule: Rule):
    """Errors, penalties with their warm-up and, where they revive dead latents, AuxK."""
    from sae_lens.saes.sae import TrainStepInput

    # Rows near a plane leave most latents without use.
    x, steps = drawn(256, 2) @ drawn(2, D, seed=2) + 0.01 * drawn(256, D, seed=3), 80
    seen = watched(x, x, rule, steps)
    # With fewer dead latents than half the width, sae-lens shrinks AuxK, and the paper does not.
    shown = [(i, one) for i, one in enumerate(seen) if not 0 < int(one.dead.sum()) < D // 2]

    for i, one in shown:
        warm = min(1.0, i / steps / 0.05) * getattr(rule, "coefficient", 0.0)
        step = TrainStepInput(x[one.index] / scale(x), {"l1": warm, "l0": warm}, one.dead, i, False)
        with torch.no_grad():
            found = lens_coder(sae_lens, one.coder).training_forward_pass(step).loss
        assert one.loss == pytest.approx(float(found), rel=1e-9)
    assert len(shown) > steps // 2
    assert not rule.auxiliary or any(one.dead.any() for _, one in shown)


@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip transcoder"])
def test_a_coder_of_the_same_weights_is_that_of_sparsify(sparsify: ModuleType, kind: str):
    x, y = 3 * drawn(256, D) + 1, drawn(256, D, seed=2) - 1
    goal = x if kind == "autoencoder" else y
    coder = trained(x, goal, TopK(k=2), skip=kind == "skip transcoder")

    found = sparsify_coder(sparsify, coder, kind != "autoencoder")(x, goal)

    written = coder.written(coder.latents(x), x)
    assert_close(written, found.sae_out, rtol=0, atol=1e-10)
    unexplained = (goal - written).square().sum() / (goal - goal.mean(0)).square().sum()
    assert_close(unexplained, found.fvu, rtol=1e-10, atol=0)


@pytest.mark.parametrize("skip", [False, True])
def test_every_step_s_loss_of_a_transcoder_is_that_of_sparsify(sparsify: ModuleType, skip: bool):
    """Until latents die: sparsify revives them by what its ReLU leaves, ours by the pre-activations."""
    x, y = 3 * drawn(256, D) + 1, drawn(256, D, seed=2) - 1

    for one in watched(x, y, TopK(k=2), _DEAD, skip):
        rows, goal = x[one.index] / scale(x), y[one.index] / scale(y)
        theirs = sparsify_coder(sparsify, one.coder, True)
        with torch.no_grad():
            found = theirs(rows, goal, total_variance=torch.tensor(float(len(rows))))
        assert one.loss == pytest.approx(float(found.fvu), rel=1e-9)


# ------------------------------------------------------------ training on a planted dictionary

WIDTH, ATOMS, K = 32, 64, 3
TRAINING = Training(steps=2000, batch=256)
WITHIN = 0.03  # of each other, in mean cosine


class Planted(NamedTuple):
    """Rows `codes @ reads`, what a map makes of them, `codes @ writes`, and the directions."""

    x: Tensor
    y: Tensor
    reads: Tensor
    writes: Tensor


def planted(seed: int) -> Planted:
    """64 features in 32 dimensions, three on a row; no fit is seeded alike, or its start would be the truth."""
    rng = torch.Generator().manual_seed(1000 + seed)
    reads, writes = torch.nn.functional.normalize(torch.randn(2, ATOMS, WIDTH, generator=rng), dim=-1)
    on = torch.rand(8192, ATOMS, generator=rng) < K / ATOMS
    codes = on * (0.5 + torch.rand(8192, ATOMS, generator=rng))
    return Planted(codes @ reads, codes @ writes, reads, writes)


def recovery(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """One-to-one matched cosine, and mean over the truth of the largest cosine."""
    unit = torch.nn.functional.normalize(found.detach(), dim=1)
    return matched_cosine(unit, truth), float((unit @ truth.T).abs().amax(0).mean())


def schedule(step: int) -> float:
    """Of the step size: our trainer's."""
    done = step / TRAINING.steps
    return min(1.0, (done + 1e-3) / 0.05, (1 - done) / 0.2)


def trained_by_sae_lens(library: ModuleType, x: Tensor, rule: L1 | TopK, seed: int) -> Tensor:
    """What its own trainer finds on the scaled rows, at our step size and its own start."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    rng, warm = torch.Generator().manual_seed(seed), TRAINING.steps // 20
    rows = x / scale(x)
    settings: dict[str, Any] = {"d_in": WIDTH, "d_sae": ATOMS, "decoder_init_norm": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        if isinstance(rule, TopK):
            config = library.TopKTrainingSAEConfig(**settings, k=rule.k, aux_loss_coefficient=_AUXILIARY)
            found = library.TopKTrainingSAE(config)
        else:
            config = library.StandardTrainingSAEConfig(
                **settings, l1_coefficient=rule.coefficient, l1_warm_up_steps=warm
            )
            found = library.StandardTrainingSAE(config)
    found.b_dec.data = rows.mean(0)
    batches = (rows[torch.randint(len(rows), (TRAINING.batch,), generator=rng)] for _ in range(TRAINING.steps))
    config = SAETrainerConfig(
        total_training_samples=TRAINING.steps * TRAINING.batch,
        train_batch_size_samples=TRAINING.batch,
        lr=TRAINING.rate,
        lr_end=TRAINING.rate,
        lr_warm_up_steps=warm,
        lr_decay_steps=TRAINING.steps // 5,
        dead_feature_window=_DEAD,
    )
    return SAETrainer(config, found, batches).fit().W_dec


def trained_by_sparsify(library: ModuleType, on: Planted, skip: bool, seed: int) -> Tensor:
    """What Adam finds with its loss, at our step sizes and its own start; its trainer wants a language model."""
    rng = torch.Generator().manual_seed(seed)
    rows, goal = on.x / scale(on.x), on.y / scale(on.y)
    config = library.SparseCoderConfig(num_latents=ATOMS, k=K, skip_connection=skip, transcode=True)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        found = library.SparseCoder(WIDTH, config)
    found.b_dec.data = goal.mean(0)
    optimiser = torch.optim.Adam(found.parameters(), lr=TRAINING.rate)
    silent = torch.zeros(ATOMS)
    for step in range(TRAINING.steps):
        optimiser.param_groups[0]["lr"] = TRAINING.rate * schedule(step)
        index = torch.randint(len(rows), (TRAINING.batch,), generator=rng)
        out = found(rows[index], goal[index], dead_mask=silent > _DEAD)
        optimiser.zero_grad()
        (out.fvu + _AUXILIARY * out.auxk_loss).backward()
        optimiser.step()
        silent.add_(1)[out.latent_indices[out.latent_acts > 0].unique()] = 0
    return found.W_dec


@pytest.mark.slow
@pytest.mark.parametrize("rule", [L1(), TopK(k=K)], ids=lambda rule: rule.name)
def test_a_planted_dictionary_is_recovered_as_by_sae_lens(sae_lens: ModuleType, rule: L1 | TopK):
    on = planted(0)

    ours = fitted(on.x, on.x, ATOMS, rule, TRAINING, torch.Generator().manual_seed(0)).decoder
    theirs = trained_by_sae_lens(sae_lens, on.x, rule, 0)

    assert recovery(ours, on.reads) == pytest.approx(recovery(theirs, on.reads), abs=WITHIN)
    assert min(recovery(ours, on.reads)) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_a_planted_map_is_recovered_as_by_sparsify(sparsify: ModuleType, skip: bool):
    """With a skip no library finds all of it: the linear part explains most, and what is left is not one to one."""
    on = planted(0)

    ours = fitted(on.x, on.y, ATOMS, TopK(k=K), TRAINING, torch.Generator().manual_seed(0), skip=skip).decoder
    theirs = trained_by_sparsify(sparsify, on, skip, 0)

    assert recovery(ours, on.writes) == pytest.approx(recovery(theirs, on.writes), abs=WITHIN)
    assert skip or min(recovery(ours, on.writes)) > 0.9
