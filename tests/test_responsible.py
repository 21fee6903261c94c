import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import QUICK, case, sparse
from weightdecomp._responsible import _Search

pytestmark = pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")

D = 6


def copies() -> nn.Module:
    """Every feature goes through one neuron of its own."""
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.eye(D))
            layer.bias.zero_()
    return model


@pytest.fixture(scope="module")
def known() -> wd.Decomposition:
    eye = torch.eye(D)
    return wd.assemble(copies(), [sparse(500, D)], {"0": (eye, eye), "2": (eye, eye)})


def kinds(feature: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs with a feature, and inputs without."""
    x = sparse(400, D, seed=seed)
    return x[x[:, feature] > 0.3], x[x[:, feature] == 0]


@pytest.mark.parametrize("feature", range(D))
def test_the_component_of_a_feature_is_found(known: wd.Decomposition, feature: int):
    on, off = kinds(feature)

    found = wd.responsible(known, [on], [off], lambda y: y[:, feature], 0.01)

    assert found.reached
    assert found.members in [((path, feature),) for path in ("0", "2")]
    assert found.off_target == pytest.approx(0, abs=1e-12)
    assert found.before == pytest.approx(float(on[:, feature].mean()))


def test_several_components_are_found_where_several_are_needed(known: wd.Decomposition):
    on, off = kinds(1)
    on = on[on[:, 3] > 0.3]
    off = off[off[:, 3] == 0]

    found = wd.responsible(known, [on], [off], lambda y: y[:, [1, 3]].sum(1), 0.01)

    assert {index for _, index in found.members} == {1, 3}
    assert len(found.members) == 2


def test_components_come_from_the_given_sites(known: wd.Decomposition):
    on, off = kinds(2)

    found = wd.responsible(known, [on], [off], lambda y: y[:, 2], 0.01, sites=["2"])

    assert found.members == (("2", 2),)


def test_what_is_out_of_reach_is_said_to_be(known: wd.Decomposition):
    on, off = kinds(2)

    found = wd.responsible(known, [on], [off], lambda y: y[:, 2] + 1, 0.5)

    assert not found.reached
    assert found.after == pytest.approx(1)


def test_no_more_components_than_allowed(known: wd.Decomposition):
    x = sparse(200, D).clamp_min(0.1)

    found = wd.responsible(known, [x], [x], lambda y: y.sum(1), 0.0, most=2)

    assert len(found.members) <= 2 and not found.reached


@pytest.mark.parametrize("name", ["conv2d", "embedding", "transformers Conv1D", "one module twice", "bilinear", "dict"])
@torch.no_grad()
def test_figures_are_those_of_the_edited_model(name: str, quick: None):
    """Intervention: measured without building a model, the same as the edited model gives."""
    one = case(name, torch.float64)
    decomposition = wd.decompose(one.model, [one.batch], config=QUICK, progress=False)
    members = [(site.path, 0) for site in decomposition.sites]

    def score(y: Tensor) -> Tensor:
        return y.square().flatten(1).sum(1)

    search = _Search(decomposition, [one.batch], [one.batch], score, -1.0)
    after, off = search.figures(frozenset(members))

    model = decomposition.edit(remove=members)
    report = wd.edit_report(decomposition.target, model, [one.batch], [one.batch], decomposition.divergence.name)
    inputs = one.batch if isinstance(one.batch, tuple | dict) else (one.batch,)
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    assert after == pytest.approx(float(score(output).mean()), rel=1e-9)
    assert off == pytest.approx(report.rows[0].off_target.mean, rel=1e-6)


def test_the_target_is_as_it_was(known: wd.Decomposition):
    """T1."""
    x, off = kinds(0)
    before = known.target(x)

    wd.responsible(known, [x], [off], lambda y: y[:, 0], 0.01)

    assert torch.equal(known.target(x), before)
    assert "forward" not in vars(known.target[0])


def test_what_cannot_be_searched_is_refused(known: wd.Decomposition):
    on, off = kinds(0)

    with pytest.raises(
        ValueError, match=r"score must return a tensor with one number per input \(\d+ here\), got shap"
    ):
        wd.responsible(known, [on], [off], lambda y: y.mean(), 0.01)
    with pytest.raises(ValueError, match=r"the score on on_target is .* already, at most the goal 9"):
        wd.responsible(known, [on], [off], lambda y: y[:, 0], 9.0)
    with pytest.raises(ValueError, match="no site at 'nowhere'"):
        wd.responsible(known, [on], [off], lambda y: y[:, 0], 0.01, sites=["nowhere"])
    with pytest.raises(ValueError, match="ablating every site changes nothing on off_target"):
        wd.responsible(known, [on], [torch.zeros(4, D)], lambda y: y[:, 0], 0.01)
    with pytest.raises(ValueError, match="score returned NaN or infinity on on_target"):
        wd.responsible(known, [on], [off], lambda y: y[:, 0].log() - torch.inf, 0.01)


@pytest.mark.parametrize(
    "goal, options, message",
    [
        (float("nan"), {}, "goal must be finite, got nan"),
        (0.01, {"most": 0}, "most must be at least 1, got 0"),
        (0.01, {"sites": []}, r"sites must be a list of module paths, or None for all, got \[\]"),
        (0.01, {"sites": "0"}, "sites must be a list of module paths, or None for all, got '0'"),
    ],
)
def test_a_search_that_cannot_be_is_refused(known: wd.Decomposition, goal: float, options: dict, message: str):
    on, off = kinds(0)

    with pytest.raises(ValueError, match=message):
        wd.responsible(known, [on], [off], lambda y: y[:, 0], goal, **options)


def test_inputs_may_come_in_several_batches(known: wd.Decomposition):
    on, off = kinds(4)

    whole = wd.responsible(known, [on], [off], lambda y: y[:, 4], 0.01)
    parts = wd.responsible(known, on.split(7), off.split(5), lambda y: y[:, 4], 0.01)

    assert whole.members == parts.members
    assert_close(whole.after, parts.after)
