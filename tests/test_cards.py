"""Cards of components: what drives each arm, and what taking the component out does there."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import weightdecomp as wd
from tests.graph_models import decomposed_exactly, relu_batches, relu_net
from weightdecomp._cards import cards, top


@pytest.fixture(scope="module")
def decomposition() -> wd.Decomposition:
    """With arms that open at different sizes."""
    found = decomposed_exactly(relu_net(), relu_batches()[0], closed=0.3)
    for path, parts in found.parts.items():
        found.parts[path] = replace(parts, thresholds=parts.thresholds * torch.tensor([[1.0], [2.0]]))
    return found


def test_every_arm_lists_the_inputs_that_drive_it_most(decomposition: wd.Decomposition):
    batch = relu_batches()[0]

    found = cards(decomposition, [batch[:5], batch[5:]])

    assert {arm.sign for own in found.values() for card in own for arm in card.arms} == {1, -1}
    for own in found.values():
        for card in own:
            one = card.component
            expected = dict(decomposition.top_inputs(one.site, one.index, [batch], len(batch)))
            for arm in card.arms:
                threshold = one.thresholds[0 if arm.sign > 0 else 1]
                best = sorted(
                    (i for i in expected if arm.sign * expected[i] > threshold), key=lambda i: -abs(expected[i])
                )
                assert [peak.input for peak in arm.peaks] == best[:6]
                assert arm.share == pytest.approx(len(best) / len(batch))


def test_the_effect_is_what_the_target_loses_without_the_component(decomposition: wd.Decomposition):
    batch = relu_batches()[0]
    card = next(card for own in cards(decomposition, [batch]).values() for card in own if card.arms)

    without = decomposition.edit(remove=[card.member])

    arm = card.arms[0]
    few = batch[[peak.input for peak in arm.peaks]]
    assert arm.effect is not None
    assert_close(arm.effect, (decomposition.target(few) - without(few)).mean(0))


def test_padded_positions_drive_nothing():
    transformers = pytest.importorskip("transformers")
    assert transformers
    from tests.hf_models import FAMILIES, randomised

    model = randomised(FAMILIES["bert, classes"]())
    ids = torch.randint(3, 61, (8, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    path = "bert.encoder.layer.0.output.dense"
    found = wd.decompose(model, [batch], sites=[path], config=wd.Config(steps=0), tolerance=0.5, progress=False)

    shown = cards(found, [batch])[path]

    assert shown
    assert all(peak.row < 3 for card in shown for arm in card.arms for peak in arm.peaks)


def test_small_coordinates_are_not_named():
    assert top(torch.tensor([0.0, -2.0, 0.01, 1.0])) == [(1, -2.0), (3, 1.0)]
