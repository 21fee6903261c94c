import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import QUICK, Calls, case, drawn, ids, mlp, seeded, sparse
from weightdecomp._sites import Site

pytestmark = pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")


def everything(decomposition: wd.Decomposition) -> dict[str, Tensor]:
    return {path: torch.ones(parts.pieces.n) for path, parts in decomposition.parts.items()}


@pytest.fixture
def twice(quick: None) -> wd.Decomposition:
    """A decomposition of a model that calls one of its modules twice."""
    target = case("one module twice")
    return wd.decompose(target.model, [target.batch], config=QUICK, progress=False)


def test_the_table_has_every_site_and_what_was_measured(decomposed: wd.Decomposition):
    text = str(decomposed)

    for site in decomposed.sites:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{site.path} ")]
        parts = decomposed.parts[site.path]
        assert f"{site.shape[0]}x{site.shape[1]}" in line.split()
        assert str(parts.pieces.n) in line.split()
        assert f"{float(parts.frequencies.sum()):.2f}" in line
        assert parts.start in line
    assert "not decomposed: 2 vectors (biases and gains), kept as in the target" in text
    assert decomposed.divergence.reason in text
    assert decomposed.outcome.reason in text
    assert f"{decomposed.ledger.per_input:.2f} per input" in text
    assert repr(decomposed) == text


def test_what_no_component_explains_is_in_the_table(quick: None):
    """F2: the inputs never reach one of the five dimensions, so that part of the weights has no component."""
    inputs = drawn(64, 5).float()
    inputs[:, 3] = 0
    model = mlp()

    decomposition = wd.decompose(model, [inputs], config=QUICK, progress=False)

    share = float(model[0].weight[:, 3].detach().norm() / model[0].weight.detach().norm()) ** 2
    assert_close(decomposition.remainders["0"][:, 3], model[0].weight[:, 3].detach())
    assert f"{share:.1%}" in next(line for line in str(decomposition).splitlines() if line.startswith("0 "))


def test_importances_are_zero_or_one_per_input_and_component(decomposed: wd.Decomposition):
    found = decomposed.importances(sparse(40, 5, seed=3))

    assert list(found) == ["0", "2"]
    for path, importance in found.items():
        assert importance.shape == (40, decomposed.parts[path].pieces.n)
        assert ((importance == 0) | (importance == 1)).all()
        assert importance.any() and not importance.all()


def test_frequencies_are_the_mean_importances_of_the_runs_inputs(decomposed: wd.Decomposition):
    """But for the last quarter, which is held out."""
    found = decomposed.importances(sparse(256, 5)[:192])

    for path, importance in found.items():
        assert_close(importance.mean(0), decomposed.parts[path].frequencies)
        assert_close(float(importance.mean(0)[1]), decomposed.component(path, 1).frequency)


def test_importances_of_a_convolution_have_its_output_positions(quick: None):
    target = case("conv2d")
    decomposition = wd.decompose(target.model, [target.batch], config=QUICK, progress=False)

    found = decomposition.importances(target.batch[:7])

    rows = target.model[0](target.batch[:7]).flatten(2).shape[2]
    assert found["0"].shape == (7, rows, decomposition.parts["0"].pieces.n)
    assert found["3"].shape == (7, decomposition.parts["3"].pieces.n)


def test_importances_of_a_shared_module_have_a_leading_call(twice: wd.Decomposition):
    inputs = case("one module twice").batch[:6]

    found = twice.importances(inputs)

    assert found["mix"].shape == (2, 6, twice.parts["mix"].pieces.n)
    assert found["read"].shape == (6, twice.parts["read"].pieces.n)
    assert_close(twice.ablate(inputs, {path: torch.ones_like(x) for path, x in found.items()}), twice.target(inputs))


def test_importances_do_not_depend_on_the_other_inputs_of_the_batch(decomposed: wd.Decomposition):
    inputs = sparse(8, 5, seed=3)

    alone = [decomposed.importances(inputs[i : i + 1]) for i in range(8)]

    for path, together in decomposed.importances(inputs).items():
        assert torch.equal(torch.cat([one[path] for one in alone]), together)


def test_with_all_components_on_the_output_is_the_targets(decomposed: wd.Decomposition):
    """F1, on inputs that the run has not seen."""
    inputs = sparse(40, 5, seed=3)

    output = decomposed.ablate(inputs, everything(decomposed), remainder=True)

    assert_close(output, decomposed.target(inputs), rtol=1e-5, atol=1e-6)


def test_with_nothing_on_the_biases_are_left(decomposed: wd.Decomposition):
    output = decomposed.ablate(sparse(40, 5), {})

    model = decomposed.target
    assert_close(output, model[2].bias.expand(40, 3))


def test_circuits_are_kept_by_their_members(decomposed: wd.Decomposition):
    inputs, two = sparse(40, 5), decomposed.circuits[:2]
    masks = {path: torch.zeros(parts.pieces.n) for path, parts in decomposed.parts.items()}
    for path, index in (member for one in two for member in one.members):
        masks[path][index] = 1

    assert_close(decomposed.ablate(inputs, two), decomposed.ablate(inputs, masks))
    one = {path: mask.clone().zero_() for path, mask in masks.items()}
    for path, index in two[0].members:
        one[path][index] = 1
    assert_close(decomposed.ablate(inputs, two[0]), decomposed.ablate(inputs, one))


def test_all_circuits_together_are_the_target(decomposed: wd.Decomposition):
    """F1."""
    inputs = sparse(40, 5)

    output = decomposed.ablate(inputs, decomposed.circuits, remainder=True)

    assert_close(output, decomposed.target(inputs), rtol=1e-5, atol=1e-6)


def test_a_mask_per_input_is_used_for_that_input(decomposed: wd.Decomposition):
    inputs, masks = sparse(3, 5), everything(decomposed)
    per_input = torch.rand(3, len(masks["0"]), generator=torch.Generator().manual_seed(0))

    output = decomposed.ablate(inputs, masks | {"0": per_input})

    rows = [decomposed.ablate(inputs[i : i + 1], masks | {"0": per_input[i]}) for i in range(3)]
    assert_close(output, torch.cat(rows))


@pytest.mark.parametrize(
    "path, mask, message",
    [
        ("0", lambda n: torch.ones(n + 1), r"mask of '0' has shape \(\d+,\), expected \(..., \d+\)"),
        ("0", lambda n: torch.tensor(1.0), r"mask of '0' has shape \(\), expected"),
        (
            "2",
            lambda n: torch.ones(4, n),
            r"mask of '2' has shape \(4, \d+\), expected \(8, \d+\) or one that broadcasts",
        ),
        ("2", lambda n: torch.ones(1, 8, n), r"mask of '2' has shape \(1, 8, \d+\), expected \(8, "),
        ("0", lambda n: torch.full((n,), 1.5), r"mask of '0' has entries outside \[0, 1\]"),
        ("0", lambda n: torch.full((n,), -0.1), r"mask of '0' has entries outside \[0, 1\]"),
        ("0", lambda n: torch.full((n,), torch.nan), r"mask of '0' has entries outside \[0, 1\]"),
        ("1", lambda n: torch.ones(n), r"no site at '1'; the sites are \['0', '2'\]"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_with_its_site(decomposed: wd.Decomposition, path: str, mask, message: str):
    n = decomposed.parts[path if path in decomposed.parts else "0"].pieces.n

    with pytest.raises(ValueError, match=message):
        decomposed.ablate(sparse(8, 5), {path: mask(n)})


def test_masks_of_a_shared_module_need_one_entry_a_call(twice: wd.Decomposition):
    n = twice.parts["mix"].pieces.n

    with pytest.raises(ValueError, match="mask of 'mix' has 3 calls on its first axis, expected 2; .* one mask a call"):
        twice.ablate(case("one module twice").batch, {"mix": torch.ones(3, n)})


def test_a_circuit_of_another_decomposition_is_refused(decomposed: wd.Decomposition):
    stranger = wd.Circuit((("layers.7", 0),), {}, 0.5, 1.0)

    with pytest.raises(ValueError, match="no site at 'layers.7'"):
        decomposed.ablate(sparse(8, 5), stranger)


def test_a_component_is_what_it_reads_times_what_it_writes(decomposed: wd.Decomposition):
    one = decomposed.component("0", 1)

    assert (one.site, one.index) == ("0", 1)
    assert_close(one.weight, one.left.T @ one.right)
    assert one.weight.shape == decomposed.target[0].weight.shape
    assert 0 <= one.frequency <= 1
    assert min(one.thresholds) >= 0


@pytest.mark.parametrize("name", ["transformers Conv1D", "conv2d", "embedding", "bilinear"])
def test_a_components_weight_has_the_layout_of_its_module(name: str, quick: None):
    target = case(name)
    decomposition = wd.decompose(target.model, [target.batch], config=QUICK, progress=False)
    site = decomposition.sites[0]

    weights = [decomposition.component(site.path, i).weight for i in range(decomposition.parts[site.path].pieces.n)]

    remainder = site.as_weight(decomposition.remainders[site.path])
    assert_close(torch.stack(weights).sum(0) + remainder, site.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", [-1, 99])
def test_a_component_that_is_not_there_is_refused(decomposed: wd.Decomposition, index: int):
    n = decomposed.parts["2"].pieces.n

    with pytest.raises(ValueError, match=f"'2' has components 0 to {n - 1}, got {index}"):
        decomposed.component("2", index)


def test_a_site_that_is_not_there_is_refused(decomposed: wd.Decomposition):
    with pytest.raises(ValueError, match=r"no site at 'fc'; the sites are \['0', '2'\]"):
        decomposed.component("fc", 0)


def test_a_gate_is_open_beyond_the_components_thresholds(decomposed: wd.Decomposition):
    inputs = sparse(64, 5, seed=3)
    one = decomposed.component("0", 0)

    found = decomposed.importances(inputs)["0"][:, 0]

    size = (inputs @ one.right[0]) * one.left[0].norm()
    assert_close(found, ((size > one.thresholds[0]) | (-size > one.thresholds[1])).float())


def test_top_inputs_are_those_with_the_largest_contribution(decomposed: wd.Decomposition):
    batches = [sparse(30, 5, seed=3), sparse(20, 5, seed=4)]

    found = decomposed.top_inputs("0", 2, batches, n=7)

    one = decomposed.component("0", 2)
    sizes = torch.cat([(batch @ one.right[0]) * one.left[0].norm() for batch in batches])
    order = sizes.abs().argsort(descending=True)[:7]
    assert [number for number, _ in found] == order.tolist()
    assert_close(torch.tensor([size for _, size in found]), sizes[order])


def test_an_input_stands_once_in_the_list_with_its_largest_position_and_call(twice: wd.Decomposition):
    inputs = case("one module twice").batch

    found = twice.top_inputs("mix", 0, [inputs], n=100)

    assert sorted(number for number, _ in found) == list(range(len(inputs)))
    one = twice.component("mix", 0)
    later = F.relu(twice.target.mix(inputs)).detach()
    calls = torch.stack([inputs, later]) @ one.right[0] * one.left[0].norm()
    assert_close(torch.tensor(found[0][1]), calls.flatten()[calls.abs().argmax()])


def test_the_divergence_is_chosen_and_said_why(quick: None):
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 3))

    decomposition = wd.decompose(seeded(model), [ids(6, 40, 2)], config=QUICK, progress=False)

    assert decomposition.divergence.name == "kl"
    assert "divergence   kl (the inputs are token ids" in str(decomposition)


def test_only_the_sites_of_the_patterns_are_decomposed(quick: None):
    decomposition = wd.decompose(mlp(), [sparse(64, 5)], sites=["2"], config=QUICK, progress=False)

    assert [site.path for site in decomposition.sites] == ["2"]
    assert "not decomposed: 0.weight matches none of the given patterns in sites=" in str(decomposition)


def test_matrices_that_the_user_left_out_are_one_line(quick: None):
    model = seeded(nn.Sequential(*(nn.Linear(5, 5) for _ in range(6))))

    decomposition = wd.decompose(model, [sparse(64, 5)], sites=["5"], config=QUICK, progress=False)

    told = [line for line in str(decomposition).splitlines() if "patterns" in line]
    assert told == [
        "not decomposed: 5 matrices that match none of the given patterns in sites= (0.weight, 1.weight, 2.weight, ...)"
    ]
    assert {one.name for one in decomposition.skipped} >= {f"{i}.weight" for i in range(5)}


def test_an_unmet_tolerance_is_a_named_warning_and_part_of_the_result(monkeypatch: pytest.MonkeyPatch, quick: None):
    from weightdecomp import _gatekeeper

    monkeypatch.setattr(_gatekeeper.Gatekeeper, "_damage", lambda self, price, attack: 0.5)

    with pytest.warns(wd.NumericalWarning, match="0.5000 after .* above the tolerance 0.02"):
        decomposition = wd.decompose(mlp(), [sparse(64, 5)], config=QUICK, progress=False)

    assert not decomposition.converged
    assert "above the tolerance" in decomposition.outcome.reason


def test_a_met_tolerance_is_said_with_the_attack_that_it_withstood(decomposed: wd.Decomposition):
    assert decomposed.converged
    assert decomposed.outcome.damage <= decomposed.tolerance
    assert "steps x" in decomposed.outcome.reason and "within the tolerance 0.02" in decomposed.outcome.reason


def test_nothing_is_printed_without_the_progress_bar(quick: None, capfd: pytest.CaptureFixture[str]):
    wd.decompose(mlp(), [sparse(64, 5)], config=QUICK, progress=False)

    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_is_on_stderr_and_says_what_is_done(quick: None, capfd: pytest.CaptureFixture[str]):
    wd.decompose(mlp(), [sparse(64, 5)], config=QUICK, progress=True)

    out, err = capfd.readouterr()
    assert out == ""
    assert "start of 2" in err


def test_batches_of_several_shapes_are_decomposed_together(quick: None):
    batches = [drawn(12, 2, 5).float(), drawn(20, 3, 5).float(), drawn(4, 2, 5).float()]

    decomposition = wd.decompose(mlp(), batches, config=QUICK, progress=False)

    for batch in batches:
        output = decomposition.ablate(batch, everything(decomposition), remainder=True)
        assert_close(output, decomposition.target(batch), rtol=1e-5, atol=1e-5)


def test_an_endless_iterator_is_read_as_far_as_needed(quick: None):
    batches = (sparse(4096, 5, seed=seed) for seed in itertools.count())

    wd.decompose(mlp(), batches, config=QUICK, progress=False)

    assert torch.equal(next(batches), sparse(4096, 5, seed=8))


def test_one_output_per_input_is_decomposed(quick: None):
    model = seeded(Calls(lambda m, x: m.read(F.relu(m.hide(x)))[:, 0], hide=nn.Linear(5, 6), read=nn.Linear(6, 1)))

    decomposition = wd.decompose(model, [sparse(64, 5)], config=QUICK, progress=False)

    output = decomposition.ablate(sparse(64, 5), everything(decomposition), remainder=True)
    assert_close(output, model(sparse(64, 5)), rtol=1e-5, atol=1e-6)


def _heads(m: Calls, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.a(x), m.b(x)


def _dead(m: Calls, x: Tensor) -> Tensor:
    return m.a(x) + m.b(F.relu(x - 99))


@pytest.mark.parametrize("forward", [_heads, _dead])
def test_a_site_without_effect_is_decomposed_and_never_active(forward, quick: None):
    model = seeded(Calls(forward, a=nn.Linear(5, 3), b=nn.Linear(5, 3)))

    decomposition = wd.decompose(model, [sparse(64, 5)], config=QUICK, progress=False)

    assert not decomposition.importances(sparse(64, 5))["b"].any()
    assert decomposition.importances(sparse(64, 5))["a"].any()


def test_held_out_inputs_on_which_nothing_matters_are_no_obstacle(quick: None):
    """The last quarter of the inputs is held out; here the sites do nothing there, so that no damage is a share."""
    model = seeded(
        Calls(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(5, 6, bias=False), b=nn.Linear(6, 3, bias=False))
    )
    inputs = sparse(64, 5)
    inputs[48:] = 0

    decomposition = wd.decompose(model, [inputs], config=QUICK, progress=False)

    assert decomposition.outcome.damage == 0


def test_the_sites_of_a_decomposition_are_those_of_its_target(decomposed: wd.Decomposition):
    assert [site.module for site in decomposed.sites] == [decomposed.target[0], decomposed.target[2]]
    assert all(isinstance(site, Site) for site in decomposed.sites)


def test_few_wires_do_not_outweigh_many_more_bits():
    """Columns of a wide matrix move the fewest values here, but most of them are active: four rows do for all."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 32, generator=rng) * (torch.rand(2000, 32, generator=rng) < 0.4)
    target = nn.Linear(32, 4, bias=False)
    target.weight.data = torch.randn(4, 32, generator=rng)

    found = wd.decompose(target, [x], divergence="mse", config=wd.Config(steps=0), progress=False)

    assert found.parts[""].start == "rows"
