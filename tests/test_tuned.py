import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.models import CASES, Calls, case, drawn, mlp, seeded, sparse
from weightdecomp.baselines import tuned
from weightdecomp.baselines._tuned import Run


def towards(x: Tensor, y: Tensor):
    return lambda run: (run(x) - y).square().mean()


@pytest.mark.parametrize("rank", [None, 1, 3])
@torch.no_grad()
def test_tuning_lowers_the_loss_and_leaves_the_model_alone(rank: int | None):
    model, x, y = mlp(), sparse(64, 5), drawn(64, 3).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = towards(x, y)

    found = tuned(model, loss, rank=rank, steps=50, rate=1e-2)

    assert loss(found) < 0.9 * loss(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rank", [1, 2])
@torch.no_grad()
def test_low_rank_changes_have_that_rank_and_keep_vectors(rank: int):
    model = mlp()

    found = tuned(model, towards(sparse(64, 5), drawn(64, 3).float()), rank=rank, steps=20, rate=1e-2)

    for path in (0, 2):
        change = (found[path].weight - model[path].weight).double()
        sizes = torch.linalg.svdvals(change)
        assert (sizes > 1e-5 * sizes[0]).sum() == rank
        assert torch.equal(found[path].bias, model[path].bias)


@torch.no_grad()
def test_full_tuning_is_adam_on_all_parameters():
    """Reference: the same steps by torch on a copy."""
    model, other = mlp(), mlp()
    loss = towards(sparse(64, 5), drawn(64, 3).float())

    found = tuned(model, loss, steps=7, rate=1e-2)

    optimiser = torch.optim.Adam(other.parameters(), lr=1e-2)
    for _ in range(7):
        with torch.enable_grad():
            optimiser.zero_grad()
            loss(other).backward()
        optimiser.step()
    for one, expected in zip(found.parameters(), other.parameters(), strict=True):
        assert_close(one, expected)


@torch.no_grad()
def test_training_ends_where_it_is_told():
    model, x, seen = mlp(), sparse(64, 5), []

    def until(run: Run) -> bool:
        seen.append(float(run(x).square().mean()))
        return len(seen) == 3

    found = tuned(model, towards(x, torch.zeros(64, 3)), steps=50, rate=1e-2, until=until)

    assert len(seen) == 3
    assert float(found(x).square().mean()) == pytest.approx(seen[-1])


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"embedding", "tied embedding and head"}))
@pytest.mark.parametrize("rank", [None, 1])
def test_every_kind_of_model_is_tuned(name: str, rank: int | None):
    one = case(name)

    found = tuned(one.model, lambda run: run(one.batch).square().mean(), rank=rank, steps=3, rate=1e-2)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        inputs = one.batch if isinstance(one.batch, tuple | dict) else (one.batch,)
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        return float(output.square().mean())

    assert loss(found) < loss(one.model)


def test_tied_weights_stay_tied():
    one = case("tied embedding and head")

    found = tuned(one.model, lambda run: run(one.batch).square().mean(), rank=1, steps=3)

    assert found.head.weight is found.embed.weight
    assert not torch.equal(found.head.weight, one.model.head.weight)


@torch.no_grad()
def test_one_seed_gives_one_result():
    """R1."""
    loss = towards(sparse(64, 5), drawn(64, 3).float())

    first, again, other = (tuned(mlp(), loss, rank=1, steps=5, seed=seed) for seed in (0, 0, 1))

    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        tuned(mlp(), towards(sparse(4, 5), torch.zeros(4, 3)), rank=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        tuned(mlp(), towards(sparse(4, 5), torch.zeros(4, 3)), steps=0)
    with pytest.raises(ValueError, match="the model has no parameters to train"):
        tuned(seeded(Calls(lambda m, x: x)), lambda run: run(torch.ones(2, 2)).sum())


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(ValueError, match=r"the loss is nan after 0 steps; lower rate \(0.001\) or mend it"):
        tuned(mlp(), lambda run: run(sparse(4, 5)).mean() * torch.nan)
