"""APD and L3D: gradients in factored form are the gradients, and both find parts that were planted."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close

from benchmarks.targets import linear
from tests.models import Calls, mlp, seeded, sparse
from weightdecomp._divergence import named
from weightdecomp._sites import find_sites
from weightdecomp.baselines import APD, L3D, Data, Inapplicable, Method, Training, _apd, _l3d
from weightdecomp.baselines._slopes import slopes
from weightdecomp.baselines._whole import Factors, largest


def data(model: nn.Module, x: Tensor) -> Data:
    sites, _ = find_sites(model, x)
    return Data(model, [x], sites, named("mse", "for a test"), 0.02)


def gradients(model: nn.Module, x: Tensor, path: str) -> Tensor:
    """Of every output of every input with respect to one weight, by automatic differentiation: the slow way."""
    name = f"{path}.weight"

    def outputs(weight: Tensor, one: Tensor) -> Tensor:
        return functional_call(model, {name: weight}, one[None]).flatten()

    weight = model.get_parameter(name).detach()
    return torch.stack([jacrev(outputs)(weight, one) for one in x], 1)


def test_inner_products_with_gradients_are_those_of_automatic_differentiation(rng: torch.Generator):
    """Positions are summed over, as they share the weight."""
    model = seeded(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Flatten(), nn.Linear(6, 2))).double()
    x = torch.randn(7, 2, 5, generator=rng, dtype=torch.float64)
    on = data(model, x)

    found = slopes(on, lambda output: list(output.sum(0)))

    for site in on.sites:
        part = Factors.started(site, 3, 2, rng)
        whole = torch.einsum("cro,cri->coi", part.u, part.v)
        expected = torch.einsum("knoi,coi->knc", gradients(model, x, site.path), whole)
        assert_close(part.along(found[site.path]), expected)
        assert_close(found[site.path].squares(), gradients(model, x, site.path).square().sum((2, 3)))
        assert_close(part.gram(), whole.flatten(1) @ whole.flatten(1).T)


def test_the_error_of_rebuilt_gradients_is_that_of_whole_matrices(rng: torch.Generator):
    on = data(mlp(torch.float64), sparse(16, 5).double())
    found = slopes(on, lambda output: [_l3d._against_another(on, output, rng)])
    encoder, decoder = ({s.path: Factors.started(s, 4, 1, rng) for s in on.sites} for _ in range(2))
    loss = _l3d._Loss(L3D(share=0.5), found, encoder, decoder)

    value = loss(torch.arange(16), 0.0)

    def flat(parts: dict[str, Factors]) -> Tensor:
        return torch.cat([torch.einsum("cro,cri->coi", p.u, p.v).flatten(1) for p in parts.values()], 1)

    dense = torch.cat([torch.einsum("nro,nri->noi", one.g[0], one.x).flatten(1) for one in found.values()], 1)
    codes = dense @ flat(encoder).T
    unit = flat(decoder) / flat(decoder).norm(dim=1, keepdim=True)
    rebuilt = (codes * largest(codes.abs(), 2.0)) @ unit
    assert_close(value, ((dense - rebuilt).norm() / dense.norm()), rtol=1e-6, atol=1e-6)


def test_attributions_are_root_mean_squares_of_first_order_changes(rng: torch.Generator):
    model, x = mlp(torch.float64, (5, 8, 3)), sparse(12, 5).double()
    on = data(model, x)
    parts = {site.path: Factors.started(site, 4, 2, rng) for site in on.sites}

    found = _apd._Loss(APD(), on, parts, rng).attributions(torch.arange(12))

    moved = sum(
        torch.einsum("knoi,cro,cri->knc", gradients(model, x, site.path), parts[site.path].u, parts[site.path].v)
        for site in on.sites
    )
    assert isinstance(moved, Tensor)
    assert_close(found, moved.square().mean(0).sqrt().detach())


def test_the_largest_of_a_batch_are_kept_whoever_has_them():
    sizes = torch.tensor([[5.0, 4.0, 3.0], [1.0, 2.0, 0.0]])

    assert_close(largest(sizes, 1.0), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    "method",
    [
        APD(k=0.6, simplicity=0.3, rank=1, ratio=1.0, training=Training(steps=800, batch=256, rate=1e-2)),
        L3D(share=0.15, training=Training(steps=800, batch=64, rate=1e-2)),
    ],
    ids=lambda method: method.name,
)
def test_planted_parts_are_found(method: Method, rng: torch.Generator):
    """Four features, seldom on, each written on a line of its own: four rank-one parts of one weight.

    Over four seeds APD finds 16 of 16, L3D 15: with no more directions than parts, two can end on one.
    """
    read = torch.linalg.qr(torch.randn(4, 4, generator=rng)).Q
    write = torch.linalg.qr(torch.randn(4, 4, generator=rng)).Q
    model = nn.Sequential(linear(write.T @ read)).eval()
    codes = (0.5 + torch.rand(1024, 4, generator=rng)) * (torch.rand(1024, 4, generator=rng) < 0.15)
    on = data(model, codes @ read)

    banks = [method.fit(on, seed).banks[0] for seed in range(2)]

    truth = torch.einsum("po,pi->poi", write, read).flatten(1)
    parts = torch.stack([torch.einsum("po,pi->poi", b.writes["0"], b.directions["0"]).flatten(1) for b in banks])
    cosine = torch.nn.functional.normalize(parts, dim=-1) @ torch.nn.functional.normalize(truth).T
    assert float((cosine.amax(1) > 0.9).double().mean()) > 0.8


def test_rows_that_belong_to_no_input_are_refused():
    model = seeded(Calls(lambda m, x: m.a(x.mT).mT, a=nn.Linear(6, 2)))
    on = data(model, sparse(6, 5))

    with pytest.raises(Inapplicable, match="expected 6 first, got"):
        APD().fit(on)
