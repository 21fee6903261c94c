import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tests.models import Calls, case, drawn, mlp, seeded
from weightdecomp._forward import inner_activations, masked, recorded, replaced
from weightdecomp._pieces import Pieces, rank_one_pieces
from weightdecomp._sites import find_sites


def random_pieces(n: int, d_in: int, d_out: int, seed: int) -> Pieces:
    return rank_one_pieces(drawn(n, d_in, seed=seed), drawn(n, d_out, seed=seed + 1))


@given(d_in=st.integers(1, 5), d_out=st.integers(1, 5), n=st.integers(1, 6), seed=st.integers(0, 2**16))
@settings(max_examples=25)
@torch.no_grad()
def test_a_masked_layer_is_the_layer_with_its_masked_components(d_in: int, d_out: int, n: int, seed: int):
    layer = seeded(nn.Linear(d_in, d_out), seed).double()
    x, mask = (
        drawn(7, d_in, seed=seed),
        torch.rand(7, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
    )
    sites, _ = find_sites(layer, x)
    pieces = random_pieces(n, d_in, d_out, seed)

    output = masked(layer, x, sites, {"": pieces}, {"": [mask]})

    for row, m, y in zip(x, mask, output, strict=True):
        weight = sum(m[c] * torch.outer(pieces.u[c], pieces.v[c]) for c in range(n))
        assert_close(y, weight @ row + layer.bias)


@torch.no_grad()
def test_a_remainder_is_added_as_far_as_its_mask_is_on():
    layer, x = seeded(nn.Linear(4, 3)).double(), drawn(5, 4)
    sites, _ = find_sites(layer, x)
    pieces = random_pieces(2, 4, 3, seed=7)
    remainder = sites[0].matrix() - pieces.total()
    half = torch.full((5, 1), 0.5, dtype=torch.float64)

    output = masked(layer, x, sites, {"": pieces}, {"": [torch.ones(5, 2).double()]}, {"": (remainder, half)})

    assert_close(output, x @ (pieces.total() + remainder / 2).T + layer.bias)


@torch.no_grad()
def test_every_call_of_a_shared_module_has_its_own_mask():
    target = case("one module twice", torch.float64)
    sites, _ = find_sites(target.model, target.batch)
    mix, read = target.model.mix, target.model.read
    pieces = {site.path: rank_one_pieces(site.matrix(), torch.eye(site.shape[0]).double()) for site in sites}
    first, second = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1]]).double()

    output = masked(
        target.model, target.batch, sites, pieces, {"mix": [first, second], "read": [torch.ones(2).double()]}
    )

    hidden = F.relu(target.batch @ (first[:, None] * mix.weight).T + mix.bias)
    assert_close(output, read(hidden @ (second[:, None] * mix.weight).T + mix.bias))


@torch.no_grad()
def test_masks_are_differentiable():
    model, x = mlp(torch.float64), drawn(6, 5)
    sites, _ = find_sites(model, x)
    pieces = {site.path: rank_one_pieces(site.matrix(), torch.eye(site.shape[0]).double()) for site in sites}
    mask = torch.ones(8, dtype=torch.float64, requires_grad=True)

    with torch.enable_grad():
        output = masked(model, x, sites, pieces, {"0": [mask], "2": [torch.ones(3).double()]})
        output.sum().backward()

    hidden = F.relu(model[0](x))
    # d output / d m_i = (W2)_:i relu'(h_i) (h_i - b_i), summed over outputs and inputs.
    expected = (model[2].weight.sum(0) * (hidden > 0) * (x @ model[0].weight.T)).sum(0)
    assert mask.grad is not None
    assert_close(mask.grad, expected)


def test_a_record_holds_the_output_and_every_calls_arguments():
    target = case("one module twice")
    sites, _ = find_sites(target.model, target.batch)

    record = recorded(target.model, target.batch, sites)

    with torch.no_grad():
        first = target.batch
        second = F.relu(target.model.mix(first))
        assert_close(record.output, target.model(target.batch))
        assert_close(record.operands["mix"], [(first,), (second,)])
        assert_close(record.operands["read"], [(target.model.mix(second),)])
    assert not record.output.requires_grad


def test_arguments_given_by_name_are_recorded_in_their_positions():
    model = Calls(lambda m, a, b: m.meet(input2=b, input1=a), meet=nn.Bilinear(3, 2, 4))
    batch = (drawn(5, 3).float(), drawn(5, 2).float())
    sites, _ = find_sites(seeded(model), batch)

    record = recorded(model, batch, sites)

    assert_close(record.operands["meet"], [batch])


def test_inner_activations_are_the_targets_own():
    model, x = mlp(torch.float64), drawn(6, 5)
    sites, _ = find_sites(model, x)
    pieces = random_pieces(4, 8, 3, seed=3)

    (inner,) = inner_activations(recorded(model, x, sites), sites[1], pieces)

    assert_close(inner, F.relu(model[0](x)).detach() @ pieces.v.T)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_a_replaced_module_is_put_back_whatever_happens(error: type[BaseException]):
    model, x = mlp(), drawn(6, 5).float()
    sites, _ = find_sites(model, x)
    before = [dict(module.__dict__) for module in model.modules()]

    def fail(*_: object) -> Tensor:
        raise error

    with pytest.raises(error), replaced(sites, fail):
        model(x)

    assert [dict(module.__dict__) for module in model.modules()] == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_forward_of_the_modules_own_is_put_back():
    model, x = mlp(), drawn(6, 5).float()

    def doubled(input: Tensor) -> Tensor:
        return 2 * F.linear(input, model[0].weight, model[0].bias)

    model[0].forward = doubled
    sites, _ = find_sites(model, x)
    expected = model(x)

    record = recorded(model, x, sites)

    assert model[0].forward is doubled
    assert_close(record.output, expected.detach())
