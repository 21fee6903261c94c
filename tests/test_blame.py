"""Blame: what an attack exploits is charged to the gates that it exploits."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import weightdecomp as wd
from weightdecomp._attack import Ablation, Part, attacked
from weightdecomp._blame import blamed
from weightdecomp._divergence import choose
from weightdecomp._gatekeeper import Attacked, Gatekeeper
from weightdecomp._ledger import Ledger
from weightdecomp._pieces import Pieces
from weightdecomp._sample import taken
from weightdecomp._sites import find_sites

N = 8


class Guarded(nn.Module):
    """One output that eight equal inputs hold off together: y = relu(3.5 - sum of x)."""

    def __init__(self) -> None:
        super().__init__()
        self.guard = nn.Linear(N, 1).double()
        with torch.no_grad():
            self.guard.weight.fill_(-1)
            self.guard.bias.fill_(3.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.guard(x).relu()


def guarded(inputs: int) -> tuple[Ablation, torch.Tensor]:
    """With one component an input coordinate."""
    model, x = Guarded(), torch.ones(inputs, N, dtype=torch.float64)
    sites, _ = find_sites(model, x)
    pieces = Pieces(torch.eye(N).double(), -torch.ones(N, 1).double(), torch.arange(N))
    return Ablation(model, sites, {"guard": pieces}, choose("mse", model(x), False), {}), x


def part(ablation: Ablation, x: torch.Tensor, importances: torch.Tensor) -> Part:
    return Part(x, ablation.model(x).detach(), {"guard": [importances]})


def test_shares_of_closed_gates_sum_to_the_divergence_that_the_sources_make():
    ablation, x = guarded(3)
    sources = {"guard": torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, 1, 0]]).double()}
    closed = torch.zeros(3, N).double()
    closed[:, 5] = 1

    (found,) = blamed(ablation, part(ablation, x, closed), sources)["guard"]

    # Six of eight are on their sources, which are 0, but the sixth is open: 3.5 - 3 = 0.5 is let through.
    assert_close(found[:, :5].sum(), torch.tensor(3 * 0.5**2).double())
    assert_close(found[:, :5], found[:1, :1].expand(3, 5))
    assert_close(found[:, 5], found[:, 0])  # what the open one would answer for if it closed
    assert not found[:, 6:].any()  # on whatever their gates say


def test_what_hides_behind_a_neuron_that_switched_off_is_blamed_on_no_bystander():
    """With both closed, relu(2 x_0 - 1) is off and has no slope, and relu(x_1 + .1) / 1000 has little."""
    x, little = torch.ones(2, 2, dtype=torch.float64), 1e-3
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 0], [0, 1]]))
        model[0].bias.copy_(torch.tensor([-1.0, 0.1]))
        model[2].weight.copy_(torch.tensor([[1.0, little]]))
        model[2].bias.zero_()
    sites, _ = find_sites(model, x, ["0"])
    pieces = Pieces(torch.eye(2).double(), model[0].weight.detach().T.contiguous(), torch.arange(2))
    ablation = Ablation(model, sites, {"0": pieces}, choose("mse", model(x), False), {})
    closed = Part(x, model(x).detach(), {"0": [torch.zeros(2, 2).double()]})

    (found,) = blamed(ablation, closed, {"0": torch.zeros(1, 3).double()})["0"]

    assert_close(found, torch.tensor([0, 2 * (1 + little) * little]).double().expand(2, 2))


@pytest.mark.parametrize("bias", [-1.0, torch.inf])
def test_nobody_is_to_blame_where_nothing_happens_or_the_output_is_not_finite(bias: float):
    ablation, x = guarded(2)
    closed = part(ablation, x, torch.zeros(2, N).double())
    with torch.no_grad():
        ablation.model.get_submodule("guard").bias.fill_(bias)

    (found,) = blamed(ablation, closed, {"guard": torch.zeros(1, N + 1).double()})["guard"]

    assert not found.any()


def test_an_attack_may_begin_where_another_ended():
    ablation, x = guarded(2)
    closed = part(ablation, x, torch.zeros(2, N).double())
    worst = attacked(ablation, [closed], [20], 2, False, torch.Generator().manual_seed(0))

    again = attacked(ablation, [closed], [0], 1, False, torch.Generator().manual_seed(1), begin=worst.sources)

    assert_close(worst.ladder[-1, -1], torch.tensor(3.5**2).double())
    assert_close(again.ladder[-1, -1], worst.ladder[-1, -1])
    assert_close(again.sources["guard"][:, :N], torch.zeros(1, N).double())


def test_gates_hold_against_combinations_of_what_is_harmless_alone():
    """Eight contributions hold a neuron off, and any five of them let it on; alone none does anything."""
    rng = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (512, 1), generator=rng) * 1.0
    x = torch.cat([signs.expand(512, N), torch.rand(512, 4, generator=rng)], 1).double()
    model = nn.Sequential(nn.Linear(N + 4, 5), nn.ReLU()).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, :N], model[0].weight[1:, N:] = -1, torch.eye(4).double()
        model[0].bias.zero_()
        model[0].bias[0] = 3.5
    sites, _ = find_sites(model, x)
    metric = choose("mse", model(x), False)
    sample = taken(model, [x], sites, metric, 512, torch.Generator().manual_seed(0))
    pieces = Pieces(torch.eye(N + 4).double(), sites[0].matrix().T.contiguous(), torch.arange(N + 4))

    keeper = Gatekeeper(Ablation(model, sites, {"0": pieces}, metric, {}), sample, 0.02, 0)
    price = keeper.trades["0"].typical / 10

    alone = keeper.at(price).damage
    keeper._harden(price)

    assert alone > 0.5 > 0.1 > keeper.at(price).damage


def test_hardened_gates_are_within_the_tolerance_or_left_as_they_are(monkeypatch: pytest.MonkeyPatch):
    ablation, x = guarded(64)
    sample = taken(ablation.model, [x], ablation.sites, ablation.divergence, 64, torch.Generator().manual_seed(0))
    keeper = Gatekeeper(ablation, sample, 0.02, 0)
    found = keeper.gates()

    hardened = keeper.hardened(found)
    monkeypatch.setattr(Gatekeeper, "_damage", lambda self, price, on: 0.5)
    exceeding = keeper.hardened(found)

    assert max(found.damage, hardened.damage) <= 0.02
    assert exceeding is found


def test_a_run_withstands_attacks_longer_than_its_own():
    """M2: within twice its own figure after sixteen times the steps."""
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng) / 2)
    x = torch.randn(1024, 6, generator=rng).double()
    found = wd.decompose(model, [x[:768]], config=wd.Config(steps=0), progress=False)

    verified = found.verify([x[768:]], steps=320, nulls=False, bound=False)

    assert verified.damage < 2 * found.outcome.damage


@pytest.mark.parametrize(("bits", "holds", "stays"), [(1.1, True, False), (1.3, True, True), (1.3, False, False)])
def test_gates_are_hardened_where_that_is_cheap_or_a_long_attack_asks_for_it(
    bits: float, holds: bool, stays: bool, monkeypatch: pytest.MonkeyPatch
):
    ablation, x = guarded(64)
    sample = taken(ablation.model, [x], ablation.sites, ablation.divergence, 64, torch.Generator().manual_seed(0))
    keeper = Gatekeeper(ablation, sample, 0.02, 0)
    found = keeper.gates()
    dearer = found._replace(ledger=Ledger(1, bits * found.ledger.per_input, 0.0, 0.0, 0.0))
    monkeypatch.setattr(Gatekeeper, "_sought", lambda self, price, again: dearer)
    lengths = list[int]()

    def done(self: Gatekeeper, thresholds: object, on: Attacked, seed: int) -> float:
        lengths.append(on.attack[0])
        return 0.01 if holds else 0.015

    monkeypatch.setattr(Gatekeeper, "_done", done)

    assert keeper.hardened(found) is (found if stays else dearer)
    assert lengths == ([80] if bits > 1.2 else [])
