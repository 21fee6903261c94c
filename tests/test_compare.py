"""One ledger for all: ours is priced as the engine prices it, and the table drops nothing."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from tests.models import sparse
from weightdecomp import Comparison, Decomposition, compare
from weightdecomp._compare import matched_cosine
from weightdecomp._ledger import price, value_bits
from weightdecomp._verify import verification
from weightdecomp.baselines import NAMES, PCA, SAE, SVD, Neurons, TopK, Training, protocols
from weightdecomp.baselines._bank import Bank, Fitted
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
    assert len(compared.figure().axes) == 3
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
