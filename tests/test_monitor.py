import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import QUICK, Calls, case, drawn, sparse

pytestmark = pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")

D = 6  # features; the first two together are the trigger


class Planted(nn.Module):
    """Copies features through a ReLU, and writes to the first output when both trigger features are large."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write, self.head = nn.Linear(D, D + 1), nn.Linear(D + 1, D), nn.Linear(D, D)
        with torch.no_grad():
            self.read.weight.copy_(torch.eye(D + 1, D))
            self.read.weight[D, :2] = 1
            self.read.bias.zero_()
            self.read.bias[D] = -1
            self.write.weight.copy_(torch.eye(D, D + 1))
            self.write.weight[0, D] = 5
            self.write.bias.zero_()
            self.head.weight.copy_(torch.eye(D))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.write(self.read(x).relu()))


def planted_inputs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sparse features, a tenth of them with both trigger features, and where the backdoor writes anything."""
    x = sparse(n, D, seed=seed)
    x[: n // 10, :2] = 0.8
    x = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    return x, x[:, 0] + x[:, 1] > 1


@pytest.fixture(scope="module")
def backdoored() -> wd.Decomposition:
    """The planted model by its neurons, which are its mechanisms."""
    model = Planted().eval()
    components = {
        "read": (model.read.weight, torch.eye(D + 1)),
        "write": (torch.eye(D + 1), model.write.weight.T),
    }
    return wd.assemble(model, [planted_inputs(2000, 0)[0]], components)


def test_a_planted_backdoor_is_seen_on_the_inputs_that_use_it(backdoored: wd.Decomposition):
    """Ground truth in closed form; half of the inputs with one trigger feature are near misses."""
    watch = wd.monitor(backdoored, [("write", D)])
    x, truth = planted_inputs(2000, 1)

    used = watch(x)[:, 0]

    hits = (used & truth).sum()
    # Where the backdoor writes next to nothing its gate may stay shut, at no damage.
    assert hits / used.sum() == 1
    assert hits / truth.sum() > 0.9
    assert 0 < truth.sum() < len(truth)
    assert truth.sum() < ((x[:, 0] > 0) | (x[:, 1] > 0)).sum() / 2


def test_an_answer_is_the_gates(decomposed: wd.Decomposition):
    x = sparse(40, 5, seed=3)
    gates = decomposed.importances(x)

    used = wd.monitor(decomposed, [("2", 0), ("0", 1), ("0", 0)])(x)

    assert torch.equal(used, torch.stack([gates["2"][:, 0], gates["0"][:, 1], gates["0"][:, 0]], 1) > 0)
    assert used.any() and not used.all()


@given(seed=st.integers(0, 2**16))
def test_a_circuit_is_in_use_where_any_of_its_components_is(decomposed: wd.Decomposition, seed: int):
    x = sparse(8, 5, seed=seed)
    gates = decomposed.importances(x)

    used = wd.monitor(decomposed, decomposed.circuits)(x)

    for column, one in enumerate(decomposed.circuits):
        expected = torch.stack([gates[path][:, index] for path, index in one.members]).amax(0) > 0
        assert torch.equal(used[:, column], expected)


def test_strength_is_the_contribution_in_units_of_its_threshold(decomposed: wd.Decomposition):
    x, one = sparse(40, 5, seed=3), decomposed.component("0", 1)
    watch = wd.monitor(decomposed, [("0", 1)])

    strength = watch.strength(x)[:, 0]

    a = one.left.norm() * (x @ one.right[0])
    assert_close(strength, torch.maximum(a / one.thresholds[0], -a / one.thresholds[1]).clamp_min(0))
    assert torch.equal(watch(x, level=2.0)[:, 0], strength > 2)


def test_the_model_is_not_run_beyond_the_last_site_that_is_read(backdoored: wd.Decomposition):
    ran = []
    handles = [
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
        for name, module in backdoored.target.named_modules()
    ]

    wd.monitor(backdoored, [("read", 0)])(planted_inputs(4, 0)[0])
    wd.monitor(backdoored, [("write", 0)])(planted_inputs(4, 0)[0])

    for handle in handles:
        handle.remove()
    assert ran == ["read"]


def test_handlers_in_the_model_do_not_keep_it_running(quick: None):
    def forward(m: Calls, x: Tensor) -> Tensor:
        try:
            hidden = m.a(x)
        except Exception:
            hidden = x.new_zeros(len(x), 4)
        return m.b(hidden.relu())

    model = Calls(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).eval()
    decomposition = wd.decompose(model, [drawn(64, 3).float()], config=QUICK, progress=False)
    calls = []
    handle = model.b.register_forward_hook(lambda m, a, o: calls.append(1))

    wd.monitor(decomposition, [("a", 0)])(drawn(8, 3).float())

    handle.remove()
    assert calls == []


@pytest.mark.parametrize(
    "name",
    ["conv2d", "embedding", "leading dimensions", "bilinear", "one module twice", "one module at two paths", "dict"],
)
def test_positions_and_calls_count_for_their_input(name: str, quick: None):
    one = case(name)
    decomposition = wd.decompose(one.model, [one.batch], config=QUICK, progress=False)
    path = decomposition.sites[-1].path
    gates = decomposition.importances(one.batch)[path]
    if decomposition.site(path).n_calls > 1:
        gates = gates.amax(0)
    members = [(path, index) for index in range(gates.shape[-1])]

    used = wd.monitor(decomposition, members)(one.batch)

    assert torch.equal(used, gates.reshape(len(gates), -1, len(members)).amax(1) > 0)


def test_the_target_is_as_it_was(backdoored: wd.Decomposition):
    """T1."""
    x = planted_inputs(4, 0)[0]
    before = backdoored.target(x)

    wd.monitor(backdoored, [("write", 1)])(x)

    assert torch.equal(backdoored.target(x), before)
    assert "forward" not in vars(backdoored.target.read)


@pytest.mark.parametrize(
    "components, message",
    [
        ([], "components is empty; name at least one component"),
        ([("nowhere", 0)], "no site at 'nowhere'"),
        ([("read", 99)], "'read' has components 0 to 6, got 99"),
    ],
)
def test_what_cannot_be_watched_is_refused(backdoored: wd.Decomposition, components: list, message: str):
    with pytest.raises(ValueError, match=message):
        wd.monitor(backdoored, components)


def test_bad_inputs_are_refused(backdoored: wd.Decomposition):
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        wd.monitor(backdoored, [("read", 0)])(torch.full((2, D), torch.nan))
