"""Every method answers the same questions, and the closed-form cases are what they must be."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.models import Calls, case, drawn, mlp, seeded, sparse
from weightdecomp._divergence import named
from weightdecomp._sites import find_sites
from weightdecomp.baselines import (
    ALL,
    ICA,
    L1,
    NMF,
    PCA,
    SAE,
    SVD,
    BatchTopK,
    Data,
    Fitted,
    Inapplicable,
    JumpReLU,
    KMeans,
    LocalInteractionBasis,
    Method,
    Neurons,
    Polytopes,
    TopK,
    Training,
    Transcoder,
    protocols,
)
from weightdecomp.baselines._rules import _Jump, _Step
from weightdecomp.baselines._transcoder import spans

_SHORT = Training(steps=20, batch=64)


def data(model: nn.Module, *batches: Tensor) -> Data:
    sites, _ = find_sites(model, batches[0])
    return Data(model, batches, sites, named("mse", "for a test"), 0.02)


def short(method: Method) -> Method:
    return replace(method, training=_SHORT) if hasattr(method, "training") else method


def trial(on: Data) -> protocols.Trial:
    return protocols.trial(on.model, on.batches[0], on.sites, on.divergence)


@pytest.fixture(scope="module")
def toy() -> Data:
    return data(mlp(widths=(5, 8, 4, 3)), sparse(256, 5))


@pytest.fixture(scope="module", params=ALL, ids=lambda method: method.name)
def fitted(request: pytest.FixtureRequest, toy: Data) -> Fitted:
    return short(request.param).fit(toy)


class TestConformance:
    """What every method promises."""

    def test_its_output_has_the_target_s_shape_and_is_finite(self, toy: Data, fitted: Fitted):
        output = protocols.replaced_output(trial(toy), fitted)

        assert output.shape == trial(toy).output.shape
        assert bool(output.isfinite().all())

    def test_units_have_directions_writes_numbers_and_activations(self, toy: Data, fitted: Fitted):
        found = protocols.codes(trial(toy), fitted)

        assert fitted.n > 0
        for number, bank in enumerate(fitted.banks):
            inner, importance = found[number, 0]
            pieces = bank.n if bank.owner is None else len(bank.owner)
            assert inner.shape == (256, pieces)
            assert importance.shape == (256, bank.n)
            assert bool(((importance >= 0) & (importance <= 1)).all())
            for path, write in bank.writes.items():
                assert write.shape == (pieces, toy.site(path).shape[0])
                assert len(bank.directions[path]) == pieces
            assert bank.values.shape == (bank.n,)

    def test_taking_units_out_is_masking_them_with_the_rest_in_place(self, toy: Data, fitted: Fitted):
        on, gone = trial(toy), {i: {0, bank.n - 1} for i, bank in enumerate(fitted.banks)}

        def mask(number: int, _: int, found: protocols.Inner) -> Tensor:
            return torch.tensor([float(unit not in gone[number]) for unit in range(found.importance.shape[-1])])

        rest = dict.fromkeys(fitted.written, 1.0)
        step = protocols.Pass(fitted, mask=mask, rest=rest, clean=protocols._clean(on, fitted))

        without = protocols.ablated_output(on, fitted, {number: sorted(units) for number, units in gone.items()})

        # The mask's way takes all units from W x and puts all but some back.
        assert_close(without, protocols._run(on, step), rtol=1e-4, atol=1e-5)
        assert_close(protocols.ablated_output(on, fitted, {}), on.output)

    def test_ablating_all_units_changes_the_output(self, toy: Data, fitted: Fitted):
        on = trial(toy)

        without = protocols.ablated_output(on, fitted, {i: range(bank.n) for i, bank in enumerate(fitted.banks)})

        assert float((without - on.output).abs().max()) > 1e-3

    def test_the_target_is_as_before(self, toy: Data, fitted: Fitted):
        assert all("forward" not in module.__dict__ for module in toy.model.modules())
        assert all(parameter.grad is None for parameter in toy.model.parameters())

    def test_an_attack_is_at_least_the_same_gates_with_nothing_put_back(self, toy: Data, fitted: Fitted):
        on, rng = trial(toy), torch.Generator().manual_seed(0)
        gates = {key: one.importance for key, one in protocols.codes(on, fitted).items()}
        step = protocols.Pass(
            fitted, mask=lambda number, call, _: gates[number, call], clean=protocols._clean(on, fitted)
        )
        own = float(on.divergence(protocols._run(on, step), on.output).detach().mean())

        assert protocols.adversarial(on, fitted, 4, rng) >= own * (1 - 1e-5)

    def test_the_grid_is_of_the_same_method(self, fitted: Fitted):
        method = next(one for one in ALL if one.name == fitted.name)

        settings = [one.setting for one in method.grid()]

        assert all(one.name == method.name for one in method.grid())
        assert len(set(settings)) == len(settings)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_the_same_seed_gives_the_same_units(method: Method, toy: Data):
    state = torch.get_rng_state()

    one, other = (short(method).fit(toy, seed=3) for _ in range(2))

    for first, second in zip(one.banks, other.banks, strict=True):
        for path in first.writes:
            assert_close(first.writes[path], second.writes[path], rtol=0, atol=0)
    assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


@pytest.mark.parametrize("method", [Neurons(), PCA(share=1.0), ICA(share=1.0), SVD(), LocalInteractionBasis()])
def test_a_whole_basis_is_lossless(method: Method):
    on = data(mlp(torch.float64), drawn(512, 5))

    output = protocols.replaced_output(trial(on), method.fit(on))

    # Directions that the output hardly depends on are dropped from the interaction basis, at 1e-5 of its moments.
    tolerance = 2e-2 if isinstance(method, LocalInteractionBasis) else 1e-6
    assert_close(output, trial(on).output, rtol=0, atol=tolerance)


def test_principal_components_are_those_of_the_covariance():
    x = drawn(300, 4) @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    on = data(nn.Linear(4, 3).double(), x)

    axes = PCA(share=0.5).fit(on).banks[0].directions[""]

    vectors = torch.linalg.eigh(torch.cov(x.T)).eigenvectors.flip(1)[:, :2].T
    assert_close((axes @ vectors.T).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_independent_components_unmix_what_was_mixed():
    sources = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixing = drawn(3, 3)
    on = data(nn.Linear(3, 2).double(), sources @ mixing)

    found = ICA(share=1.0).fit(on).banks[0].directions[""]

    cosine = torch.nn.functional.normalize(found) @ torch.nn.functional.normalize(mixing).T
    assert float(cosine.abs().amax(0).min()) > 0.99


def test_non_negative_codes_are_those_of_scikit_learn(toy: Data):
    from scipy.optimize import nnls

    bank = NMF(ratio=1.0).fit(data(mlp(), sparse(256, 5))).banks[0]
    x, parts = toy.inputs("0"), bank.directions["0"]

    codes = bank.encode(x[:8])

    slow = torch.stack([torch.from_numpy(nnls(parts.T.double().numpy(), row.double().numpy())[0]) for row in x[:8]])
    assert_close((codes @ parts).double(), slow @ parts.double(), rtol=0, atol=1e-3)


def test_prototypes_are_the_nearest_centres(toy: Data):
    bank = KMeans(ratio=1.0).fit(toy).banks[0]
    x, centres = toy.inputs("0"), bank.directions["0"]

    assert_close(bank.encode(x).argmax(1), torch.cdist(x, centres).argmin(1))


def test_polytope_codes_are_the_signs_of_the_next_layer(toy: Data):
    bank = Polytopes().fit(toy).banks[0]
    layer = toy.model.get_submodule("0")
    signs = layer(toy.inputs("0")) > 0

    number = bank.encode(toy.inputs("0")).argmax(1)

    for code in range(bank.n):
        assert bool((signs[number == code] == signs[number == code][0]).all())
    assert bank.n == len(torch.unique(signs, dim=0))


def test_the_interaction_basis_finds_the_one_direction_that_matters():
    """A scalar output depends on one direction of the input, so that one direction is all there is."""
    read = nn.Linear(6, 1, bias=False).double()
    model = nn.Sequential(read, nn.Tanh())
    x = drawn(400, 6) @ drawn(6, 6, seed=5)
    on = data(model, x)

    bank = LocalInteractionBasis().fit(on).banks[0]

    assert bank.n == 1
    reading = bank.encode(x) - bank.encode(torch.zeros_like(x))
    assert float(torch.corrcoef(torch.cat([reading, x @ read.weight.detach().T], 1).T)[0, 1].abs()) > 1 - 1e-9


def test_topk_recovers_a_planted_dictionary():
    rng = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(32, 16, generator=rng), dim=1)
    codes = torch.rand(4096, 32, generator=rng) * (torch.rand(4096, 32, generator=rng) < 0.06)
    on = data(nn.Linear(16, 2), codes @ truth)

    found = SAE(rule=TopK(k=2), ratio=4.0, training=Training(steps=600)).fit(on).banks[0].directions[""]

    cosine = torch.nn.functional.normalize(found, dim=1) @ truth.T
    assert float((cosine.amax(0) > 0.9).float().mean()) > 0.9


def test_a_start_is_not_what_somebody_drew_with_the_same_seed():
    """Else a planted dictionary of seed 0 would be found before the first step of a fit of seed 0."""
    truth = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    on = data(nn.Linear(4, 2), drawn(64, 4).float())

    found = SAE(rule=TopK(k=2), ratio=2.0, training=Training(steps=1, rate=1e-6)).fit(on).banks[0].directions[""]

    cosine = torch.nn.functional.normalize(found, dim=1) @ truth.T
    assert float(cosine.diagonal().abs().mean()) < 0.9


def test_a_skip_carries_a_linear_map():
    """What is linear needs no latents: the skip explains it, and is paid for as pairs that are always on."""
    on = data(seeded(nn.Linear(6, 3).double()), drawn(400, 6))

    fitted = Transcoder(skip=True, rule=TopK(k=1), training=Training(steps=1000)).fit(on)

    assert fitted.banks[1].n == 3
    assert protocols.propagating(trial(on), fitted) < 0.02 * trial(on).nothing


def test_thresholds_get_the_gradients_of_the_published_estimators():
    pre = torch.tensor([[0.49], [0.51], [0.9]], dtype=torch.float64)
    threshold = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)

    jump = torch.autograd.grad(_Jump.apply(pre, threshold).sum(), threshold)[0]
    step = torch.autograd.grad(_Step.apply(pre, threshold).sum(), threshold)[0]

    # Two of three lie within the band of width 0.05.
    assert_close(jump, torch.tensor([-0.5 / 0.05 * 2], dtype=torch.float64))
    assert_close(step, torch.tensor([-1 / 0.05 * 2], dtype=torch.float64))


@pytest.mark.parametrize(
    ("method", "model", "x", "message"),
    [
        (NMF(), nn.Linear(4, 2), drawn(64, 4).float(), "non-negative activations"),
        (PCA(), nn.Linear(4, 2), torch.ones(64, 4), "constant"),
        (SAE(), nn.Linear(4, 2), drawn(9, 4).float(), "needs at least 32 rows, got 9"),
        (KMeans(ratio=8.0), nn.Linear(4, 2), drawn(9, 4).float(), "needs at least 32 rows, got 9"),
        (Polytopes(), nn.Linear(4, 2), drawn(64, 4).float(), "no site reads the ReLU"),
    ],
)
def test_a_method_that_cannot_be_used_says_why(method: Method, model: nn.Module, x: Tensor, message: str):
    with pytest.raises(Inapplicable, match=message):
        method.fit(data(model, x))


def test_crosscoders_need_two_sites():
    with pytest.raises(Inapplicable, match="at least two sites"):
        next(one for one in ALL if one.name == "crosscoder").fit(data(nn.Linear(4, 2), drawn(64, 4).float()))


def test_training_refuses_a_rate_of_zero():
    with pytest.raises(ValueError, match="rate must be positive"):
        Training(rate=0.0)


def test_rules_differ_in_what_they_keep():
    pre = torch.tensor([[3.0, 2.0, 1.0, -1.0]])

    assert_close(L1().latents(pre, torch.zeros(0), False), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    assert_close(TopK(k=2).latents(pre, torch.zeros(0), False), torch.tensor([[3.0, 2.0, 0.0, 0.0]]))
    state = torch.tensor([2.5, 2.5, 0.5, 0.5]).log()
    assert_close(JumpReLU().latents(pre, state, False), torch.tensor([[3.0, 0.0, 1.0, 0.0]]))


def test_rows_that_come_twice_keep_as_many_latents():
    pre, state = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.zeros(1)

    latents = BatchTopK(k=1).latents(pre, state, True)

    assert_close(latents, torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]]))
    assert float(state) == 3.0


def test_sites_side_by_side_have_interaction_bases():
    """The next site in the model's order reads nothing of this one, so that the output is what follows."""
    parts = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3), "read": nn.Linear(3, 2)}
    model = seeded(Calls(lambda m, x: m.read(torch.tanh(m.a(x) * m.b(x))), **parts))
    on = data(model.double(), drawn(200, 4))

    output = protocols.replaced_output(trial(on), LocalInteractionBasis().fit(on))

    assert_close(output, trial(on).output, rtol=0, atol=1e-6)


def test_a_gated_mlp_is_one_span():
    """A transcoder reads what the MLP reads and writes what it writes; the gate and the up matrix are inside."""
    parts = {"gate": nn.Linear(4, 6), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}
    model = seeded(Calls(lambda m, x: m.down(torch.nn.functional.silu(m.gate(x)) * m.up(x)), **parts))

    assert spans(data(model.double(), drawn(20, 4))) == [("gate", "down")]


def test_sites_side_by_side_with_nothing_after_them_are_spans_of_their_own():
    parts = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}
    model = seeded(Calls(lambda m, x: m.a(x) + m.b(x), **parts))

    assert spans(data(model.double(), drawn(20, 4))) == [("a", "a"), ("b", "b")]


def test_a_span_does_not_reach_across_attention():
    """What a row of values becomes is spread over positions; a coder of rows could not stand for it."""

    def forward(m: Calls, x: Tensor) -> Tensor:
        return m.down(torch.relu(m.up(m.out(torch.softmax(x @ x.mT, -1) @ m.value(x)))))

    parts = {"value": nn.Linear(4, 4), "out": nn.Linear(4, 4), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}
    model = seeded(Calls(forward, **parts)).double()

    assert spans(data(model, drawn(9, 5, 4))) == [("value", "value"), ("out", "up"), ("down", "down")]


def test_codes_of_the_clean_protocol_come_from_the_target():
    """What a site before makes wrong does not reach the codes of a later one, which then makes the target's rows."""
    on = data(mlp(widths=(5, 8, 4)), sparse(256, 5))
    whole = PCA(share=1.0).fit(on)
    last = whole.written[-1]
    banks = [bank if last in bank.writes else replace(bank, importance=torch.zeros_like) for bank in whole.banks]
    broken = replace(whole, banks=banks)

    assert protocols.clean(trial(on), broken) < 1e-9 < 0.01 < protocols.propagating(trial(on), broken)


def test_a_span_with_too_few_rows_is_left_as_it_is():
    """Twelve images have many patches and few rows at the head."""
    model = seeded(nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)))
    on = data(model, drawn(12, 1, 12).float())

    found = Transcoder(ratio=1.0, training=_SHORT).fit(on)

    assert found.written == ("0",)
    assert "needs at least 40 rows, got 12" in found.skipped["3"]


@pytest.mark.parametrize("name", ["conv2d", "embedding", "one module twice", "bilinear", "dict"])
@pytest.mark.parametrize("method", [Neurons(), PCA(), KMeans(ratio=0.5), SAE(ratio=1.0, training=_SHORT), SVD()])
def test_every_kind_of_site_can_be_replaced(name: str, method: Method):
    given = case(name)
    sites, _ = find_sites(given.model, given.batch)
    on = Data(given.model, [given.batch], sites, named("mse", "for a test"), 0.02)

    output = protocols.replaced_output(trial(on), method.fit(on))

    assert bool(output.isfinite().all())
