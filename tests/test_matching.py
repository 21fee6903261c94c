"""Deleting a known share of the weights is taking out the unit that is this share, whatever the site."""

import pytest
import torch
from torch import nn

from tests.models import case, seeded, sparse
from weightdecomp._divergence import named
from weightdecomp._sites import find_sites
from weightdecomp.baselines import SVD, Data, deletions, effect_matching, protocols


def on(model: nn.Module, batch: object) -> tuple[Data, protocols.Trial]:
    sites, _ = find_sites(model, batch)
    data = Data(model, [batch], sites, named("mse", "for a test"), 0.02)
    return data, protocols.trial(model, batch, sites, data.divergence)


@pytest.mark.parametrize("name", ["conv2d", "embedding", "one module twice", "bilinear", "dict"])
def test_a_share_of_the_weights_is_matched_by_the_unit_that_is_it(name: str):
    given = case(name, torch.float64)
    data, trial = on(given.model, given.batch)
    fitted = SVD(share=1.0).fit(data)
    bank = fitted.banks[0]
    (path,) = bank.writes
    pairs = zip(bank.writes[path][:2], bank.directions[path][:2], strict=True)
    effects = deletions(trial, [{path: torch.outer(write, read)} for write, read in pairs])

    found = effect_matching(trial, fitted, effects, [{path}] * len(effects))

    assert found.score == pytest.approx(1.0, abs=1e-9)


def test_half_a_mechanism_explains_three_quarters_of_it():
    """Where units add up, half of an effect D leaves |D - D / 2|^2, a quarter of its power."""
    data, trial = on(seeded(nn.Linear(4, 3)).double(), sparse(64, 4).double())
    fitted = SVD(share=1.0).fit(data)
    bank = fitted.banks[0]
    share = 2 * torch.outer(bank.writes[""][0], bank.directions[""][0])

    found = effect_matching(trial, fitted, deletions(trial, [{"": share}]))

    assert found.scores == pytest.approx([0.75])
    assert found.sizes == [1]


def test_nothing_found_has_no_splitting():
    """No sum of a matrix's own singular pairs does the opposite of what the matrix does."""
    data, trial = on(seeded(nn.Linear(4, 3)).double(), sparse(64, 4).double())
    whole = deletions(trial, [{"": data.site("").matrix()}])

    found = effect_matching(trial, SVD(share=1.0).fit(data), -whole)

    assert found.scores == [0.0]
    assert found.splitting is None
