"""One ledger for all: ours is priced as the engine prices it, and the table drops nothing."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tests.models import seeded, sparse
from weightdecomp import Comparison, Decomposition, _progress, compare
from weightdecomp._compare import matched_cosine
from weightdecomp._divergence import named
from weightdecomp._ledger import price, value_bits
from weightdecomp._sites import find_sites
from weightdecomp._verify import verification
from weightdecomp.baselines import MDLSAE, NAMES, PCA, SAE, SVD, Data, KMeans, Neurons, TopK, Training, protocols
from weightdecomp.baselines._bank import Bank, Fitted, dictionary
from weightdecomp.baselines._coder import Coder
from weightdecomp.baselines._mdl import described
from weightdecomp.baselines._ours import as_fitted
from weightdecomp.baselines._price import code_length, priced, quantised_length

QUICK_SAE = SAE(rule=TopK(k=2), ratio=2.0, training=Training(steps=20, batch=64))


@pytest.fixture(scope="module")
def compared(decomposed: Decomposition) -> Comparison:
    methods = ["neurons", PCA(share=1.0), QUICK_SAE, "nmf", "crosscoder", "svd"]
    return compare(decomposed, [sparse(256, 5)], methods, seeds=2, attack=4, tune=False, progress=False)


def on(decomposition: Decomposition, n: int = 64) -> protocols.Trial:
    return protocols.trial(decomposition.target, sparse(n, 5), decomposition.sites, decomposition.divergence)


def test_ours_costs_the_same_bits_as_in_the_engine_s_own_ledger(decomposed: Decomposition):
    """The common ledger and `verify` agree on names, values and stored numbers, to rounding."""
    trial, ours = on(decomposed), as_fitted(decomposed)

    found = priced(ours, protocols.codes(trial, ours), decomposed.tolerance, 0.0, 64)

    own = verification(decomposed, [sparse(64, 5)], steps=1, restarts=1, nulls=False, bound=False).ledger
    assert_close(found.naming, own.naming)
    assert_close(found.values, own.values)
    assert_close(found.dictionary, own.dictionary)


def test_ours_with_its_gates_as_masks_is_what_ablate_gives(decomposed: Decomposition):
    """Matched at the last site: only its own gates are used there, on the target's own inputs."""
    trial, x, last = on(decomposed), sparse(64, 5), decomposed.sites[-1].path
    keep = {site.path: torch.ones(decomposed.parts[site.path].pieces.n) for site in decomposed.sites}
    keep[last] = decomposed.importances(x)[last]

    output = protocols.replaced_output(trial, as_fitted(decomposed), [last])

    # The components of the other site leave out what the inputs never reach.
    assert_close(output, decomposed.ablate(x, keep=keep, remainder=True), rtol=1e-4, atol=1e-4)


def test_every_method_is_a_row(compared: Comparison):
    names = [row.method for row in compared.rows]

    assert names == ["weight decomposition", "neurons", "pca", "sae topk", "nmf", "crosscoder", "svd"]


def test_the_table_names_what_does_not_apply(decomposed: Decomposition):
    found = compare(decomposed, [sparse(32, 5)], ["sae topk", "pca"], attack=1, tune=False, progress=False)

    row = found.row("sae topk")
    assert row.points == ()
    assert "needs at least 40 rows, got 24" in row.reason
    assert "does not apply: sae topk with 20 latents" in str(found)


def test_a_lossless_basis_recovers_everything(compared: Comparison):
    assert abs(compared.row("pca").median(lambda p: p.recovered) - 1) < 1e-6
    assert compared.row("pca").within


def test_seeds_have_an_agreement(compared: Comparison):
    assert compared.row("pca").agreement == pytest.approx(1.0, abs=1e-6)
    agreement = compared.row("sae topk").agreement
    assert agreement is not None
    assert 0 < agreement < 0.999


def test_a_comparison_is_plain_values_and_a_plot(compared: Comparison):
    document = json.loads(json.dumps(compared.to_dict(), allow_nan=False))

    assert len(document["points"]) == len(compared.points) == 1 + 6 * 2
    assert len(compared.figure().axes) == 4
    assert "weight decomposition" in str(compared)


def test_inputs_that_are_scored_were_not_fitted_on(compared: Comparison):
    assert (compared.n_fitted, compared.n_inputs) == (192, 64)


def test_the_best_setting_is_the_cheapest_within_the_tolerance(decomposed: Decomposition):
    methods = [SVD(share=0.125), SVD(share=0.9), SVD(share=1.0)]

    found = compare(decomposed, [sparse(256, 5)], methods, attack=1, progress=False)

    within = [p for p in found.points if p.method == "svd" and p.propagating <= decomposed.tolerance]
    assert 0 < len(within) < 3  # so that there is a choice, and something to refuse
    assert found.row("svd").points == (min(within, key=lambda p: p.bits),)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"methods": ["pcaa"]}, ValueError, "no method 'pcaa'; did you mean 'pca'"),
        ({"methods": ["SAE-topk"]}, ValueError, "did you mean 'sae topk'"),
        ({"methods": "pca"}, TypeError, r"write methods=\['pca'\]"),
        ({"methods": [PCA]}, TypeError, "expected a name or a method"),
        ({"methods": []}, ValueError, "methods is empty"),
        ({"seeds": 0}, ValueError, "seeds must be at least 1"),
        ({"batches": [torch.full((8, 5), torch.nan)]}, ValueError, "NaN"),
        ({"batches": [sparse(3, 5)]}, ValueError, "pass at least 4"),
        ({"batches": [sparse(8, 5), sparse(8, 5).reshape(4, 2, 5)]}, ValueError, "different shapes"),
        ({"labels": torch.zeros(63, dtype=torch.long)}, ValueError, r"of shape \(64,\), got torch.int64 of \(63,\)"),
        ({"labels": torch.zeros(64)}, ValueError, "labels must be whole numbers"),
        ({"labels": torch.full((64,), 3)}, ValueError, "from 0 to 2, -100 where there is none; got 3 to 3"),
        ({"labels": torch.full((64,), -100)}, ValueError, "got none"),
        ({"truth": []}, ValueError, "truth is empty"),
        ({"truth": [{"1": torch.ones(3, 8)}]}, ValueError, r"truth\[0\] names '1', .* did you mean '[02]'"),
        ({"truth": [{"2": torch.ones(8, 3)}]}, ValueError, r"truth\[0\]\['2'\] must have .* \(3, 8\), got \(8, 3\)"),
        ({"truth": [{"2": torch.zeros(3, 8)}]}, ValueError, r"truth\[0\] changes no output"),
        ({"batches": [torch.zeros(64, 5)], "evaluate": [torch.zeros(8, 5)]}, ValueError, "constant|no unit"),
    ],
)
def test_bad_input_is_refused_by_name(decomposed: Decomposition, arguments: dict, error: type, message: str):
    given = {"batches": [sparse(64, 5)], "methods": ["pca"], "progress": False, "attack": 1} | arguments
    if message.startswith("constant"):
        row = compare(decomposed, given.pop("batches"), **given).row("pca")
        assert "constant" in row.reason
        return
    with pytest.raises(error, match=message):
        compare(decomposed, given.pop("batches"), **given)


def test_names_are_distinct():
    assert len(set(NAMES)) == len(NAMES)


def test_a_setting_that_cannot_be_tried_is_named(decomposed: Decomposition):
    methods = [KMeans(ratio=1.0), KMeans(ratio=10.0)]

    found = compare(decomposed, [sparse(64, 5)], methods, attack=1, progress=False)

    assert found.row("k-means").points[0].setting == "1 x width"
    assert "not tried at 10 x width: k-means at '0' needs at least 50 rows, got 48" in found.row("k-means").reason
    assert "k-means: not tried at 10 x width" in str(found)


def test_a_setting_that_leaves_a_site_as_it_is_is_not_the_best_for_that(decomposed: Decomposition):
    methods = [KMeans(ratio=1.0), KMeans(ratio=9.0)]  # 9 x 8 clusters are more than the rows at the second site

    found = compare(decomposed, [sparse(64, 5)], methods, attack=1, progress=False)

    by_setting = {p.setting: p.propagating for p in found.points if p.method == "k-means"}
    assert by_setting["9 x width"] < by_setting["1 x width"]
    assert found.row("k-means").points[0].setting == "1 x width"


def test_a_training_that_diverges_is_a_row_with_the_reason(decomposed: Decomposition):
    method = replace(QUICK_SAE, training=Training(steps=20, batch=64, rate=1e30))

    found = compare(decomposed, [sparse(64, 5)], [method, "pca"], attack=1, tune=False, progress=False)

    assert "use a smaller rate" in found.row("sae topk").reason
    assert found.row("pca").points


# ------------------------------------------------------------ labels and known mechanisms


@dataclass(frozen=True)
class Copies:
    """The last layer's neurons, each as several equal units, all written at a share of their size."""

    n: int = 1
    share: float = 1.0
    name = "copies"

    @property
    def setting(self) -> str:
        return f"{self.n} copies, {self.share:g}"

    def grid(self) -> list["Copies"]:
        return [self]

    def fit(self, data: Data, seed: int = 0, on_step: object = None) -> Fitted:
        site = data.sites[-1]
        eye = torch.eye(site.shape[1]).repeat(self.n, 1)
        bank = dictionary(site, lambda x: x @ eye.T, eye * self.share / self.n, 0 * eye[0], numbers=1)
        return Fitted(self.name, self.setting, data.sites, [bank])


def last_layer(decomposition: Decomposition) -> nn.Linear:
    layer = decomposition.target.get_submodule("2")
    assert isinstance(layer, nn.Linear)
    return layer


def likelier(decomposition: Decomposition, x: torch.Tensor) -> torch.Tensor:
    """Labels that the model finds likelier than its last bias alone does."""
    bias = last_layer(decomposition).bias.detach()
    return (decomposition.target(x).detach().log_softmax(1) - bias.log_softmax(0)).argmax(1)


def column(layer: nn.Linear, along: torch.Tensor) -> dict[str, torch.Tensor]:
    """The share of the last weight that reads one direction."""
    return {"2": layer.weight.detach() @ torch.outer(along, along)}


def test_cross_entropy_recovered_is_what_the_logits_say(decomposed: Decomposition):
    """At a share s of what the last layer adds to its bias b, logits are s (f - b) + b; ablated they are b."""
    x, layer = sparse(64, 5), last_layer(decomposed)
    logits, bias = decomposed.target(x).detach(), layer.bias.detach()
    labels = likelier(decomposed, x)
    labels[::5] = -100

    found = compare(decomposed, [sparse(64, 5, seed=2)], [Copies(share=0.5)], evaluate=[x], labels=labels, attack=1,
                    progress=False)  # fmt: skip

    whole, half, none = (
        float(F.cross_entropy(y, labels)) for y in (logits, (logits - bias) / 2 + bias, bias.expand_as(logits))
    )
    assert found.row("copies").points[0].loss_recovered == pytest.approx((none - half) / (none - whole), rel=1e-4)
    assert "CE" in str(found)


def test_a_held_out_input_has_its_own_label(decomposed: Decomposition):
    """Labels of inputs that are fitted on are not looked at."""
    x = sparse(64, 5)
    labels = likelier(decomposed, x)
    wrong = torch.where(torch.arange(64) % 4 == 3, labels, (labels + 1) % 3)

    one, other = (
        compare(decomposed, [x], [PCA(share=0.5)], labels=given, attack=1, progress=False) for given in (labels, wrong)
    )

    assert one.points[1].loss_recovered == other.points[1].loss_recovered
    assert compare(decomposed, [x], [PCA(share=1.0)], labels=labels, attack=1, progress=False).points[
        1
    ].loss_recovered == pytest.approx(1.0, abs=1e-5)


def test_labels_that_the_model_knows_nothing_of_are_refused(decomposed: Decomposition):
    x = sparse(64, 5)

    with pytest.raises(ValueError, match="none to recover; check their order"):
        compare(decomposed, [x], ["pca"], labels=(likelier(decomposed, x) + 1) % 3, progress=False)


def test_units_split_as_capacity_grows(decomposed: Decomposition):
    """A mechanism that n equal units share is found whole, as a group of n."""
    x = sparse(256, 5)
    used = (decomposed.target.get_submodule("0")(x[3::4]) > 0).any(0)
    truth = [column(last_layer(decomposed), along) for along in torch.eye(8)[used]]

    found = compare(decomposed, [x], [Copies(n) for n in (3, 1, 2)], truth=truth, attack=1, progress=False)

    assert all(p.effects_matched == pytest.approx(1.0, abs=1e-6) for p in found.points if p.method == "copies")
    assert found.splitting("copies") == [(8, 1.0), (16, 2.0), (24, 3.0)]
    assert "split" in str(found)


def test_mechanisms_in_another_basis_are_not_matched(decomposed: Decomposition):
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3))).Q
    truth = [column(last_layer(decomposed), along) for along in rotation]

    found = compare(decomposed, [sparse(256, 5)], [Copies()], truth=truth, attack=1, progress=False)

    assert found.row("copies").median(lambda p: p.effects_matched or 0.0) < 0.8


def test_splitting_needs_known_mechanisms(compared: Comparison):
    with pytest.raises(ValueError, match="pass truth="):
        compared.splitting("pca")
    with pytest.raises(ValueError, match="'pcas' was not compared"):
        compared.splitting("pcas")


# ------------------------------------------------------------ the code's closed-form cases


def one_bank(importance: torch.Tensor, numbers: float, values: float) -> tuple[Fitted, dict]:
    n = importance.shape[1]
    eye = {"s": torch.eye(n)}
    bank = Bank(
        ("s",),
        lambda x: x,
        eye,
        {},
        eye,
        torch.full((n,), numbers),
        torch.full((n,), values),
    )
    return Fitted("m", "", (), [bank]), {(0, 0): protocols.Inner(importance, importance)}


def test_a_fair_coin_costs_one_bit_a_toss():
    """Half the rows on, no values, nothing stored: N bits of names and nothing else."""
    importance = torch.tensor([[1.0], [0.0]]).repeat(50, 1)

    found = priced(*one_bank(importance, 0.0, 0.0), tolerance=0.02, divergence=0.0, n_inputs=100)

    assert found.total == pytest.approx(100.0)


def test_a_unit_that_is_always_on_costs_its_values_and_its_numbers():
    found = priced(*one_bank(torch.ones(63, 1), 10.0, 1.0), tolerance=0.01, divergence=math.log(2), n_inputs=63)

    assert found.naming == 0
    assert found.values == pytest.approx(63 * 0.5 * math.log2(100))
    assert found.dictionary == pytest.approx(10 * 0.5 * 6)
    assert found.residual == pytest.approx(63)


def test_units_cost_what_the_engine_s_price_says():
    importance = (torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) < 0.3).float()

    found = priced(*one_bank(importance, 9.0, 1.0), tolerance=0.02, divergence=0.5, n_inputs=200)

    ones = torch.ones(3, dtype=torch.long)
    assert_close(found.total, price(200, 0.02, [importance.double().mean(0)], [ones], [(4, 5)], 0.5).total)


def test_latents_of_one_value_cost_their_names_only():
    latents = torch.tensor([[2.0], [0.0], [0.0], [0.0]]).repeat(25, 1)

    assert code_length(latents, 0.1) == pytest.approx(0.811278, abs=1e-6)  # h(1/4)


def test_uniform_latents_cost_the_logarithm_of_their_number():
    """Eight equally frequent values, always on: three bits; on half of the rows: one more for the name."""
    values = torch.arange(1.0, 9.0)[:, None].repeat(10, 1)

    assert code_length(values, 1.0) == pytest.approx(3.0)
    assert code_length(torch.cat([values, torch.zeros_like(values)]), 1.0) == pytest.approx(1 + 1.5)


def test_the_coarsest_bins_within_the_error_are_taken():
    """Uniform numbers rounded to bins of width w err by w^2 / 12 on average, and cost log2 of the bins in use."""
    latents = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1

    bits, width = quantised_length(latents, lambda rounded: float((rounded - latents).square().mean()), 1e-3)

    assert width**2 / 12 < 1e-3 < (2 * width) ** 2 / 12
    assert bits == pytest.approx(math.log2(1 / width), abs=0.3)  # the two bins at the ends are half full


def test_an_error_that_cannot_be_met_costs_infinitely_many_bits():
    assert quantised_length(torch.ones(4, 1), lambda _: 1.0, 0.5) == (math.inf, 0.0)


def test_an_autoencoder_costs_its_latents_and_its_numbers():
    """Eight one-hot rows and a latent for each: h(1/8) bits of names each, no bits of values, numbers paid once."""
    eye, zero = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    coder = Coder(eye, zero, eye, zero, zero, TopK(k=1), torch.zeros(0))

    bits, error = described(coder, eye.repeat(10, 1), most=0.01)

    names = 1 / 8 * math.log2(8) + 7 / 8 * math.log2(8 / 7)
    numbers = (2 * 8 + 1) * 0.5 * math.log2(1 + 80 / 8) / 80
    assert bits == pytest.approx(8 * (names + numbers))
    assert error == 0


def test_the_autoencoder_of_fewest_bits_has_the_planted_sparsity():
    """Two of sixteen orthogonal features on a row: two latents tell all, more are noise that has to be named."""
    rng = torch.Generator().manual_seed(5)
    which = torch.rand(512, 16, generator=rng).argsort(1)[:, :2]
    x = torch.zeros(512, 16).scatter(1, which, 1 + torch.rand(512, 2, generator=rng))
    model = seeded(nn.Linear(16, 2))
    on = Data(model, [x], find_sites(model, x)[0], named("mse", "for a test"), 0.02)

    bank = MDLSAE(error=0.1, training=Training(steps=400, batch=128)).fit(on).banks[0]

    assert float((bank.encode(x) != 0).float().sum(1).mean()) == pytest.approx(2, abs=0.5)


def test_an_active_value_costs_its_rate_at_the_tolerance():
    found = priced(*one_bank(torch.ones(10, 4), 0.0, 1.0), tolerance=0.02, divergence=0.0, n_inputs=10)

    assert found.total == pytest.approx(40 * value_bits(0.02))


def test_matched_cosine_counts_what_has_no_partner():
    eye = torch.eye(4)

    assert matched_cosine(eye, -eye.flip(0)) == pytest.approx(1.0)
    assert matched_cosine(eye, eye[:2]) == pytest.approx(0.5)
    assert matched_cosine(eye[:2], torch.cat([eye, eye])) == pytest.approx(0.25)


def test_neurons_cost_no_stored_directions(decomposed: Decomposition):
    found = compare(decomposed, [sparse(256, 5)], [Neurons()], attack=1, progress=False).row("neurons")

    assert found.points[0].ledger.dictionary < 0.2 * found.points[0].ledger.total


def test_a_long_fit_shows_its_steps(
    decomposed: Decomposition, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(_progress, "_RARELY", 0.0)

    compare(decomposed, [sparse(64, 5)], [QUICK_SAE], attack=1, tune=False)

    told = capfd.readouterr().err
    assert "sae topk" in told
    assert "step 7]" in told
    assert "step 20]" in told
