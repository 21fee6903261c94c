import pytest
import torch

from tests.models import mlp, sparse
from weightdecomp import _null
from weightdecomp._config import Config
from weightdecomp._divergence import named
from weightdecomp._fit import chosen_start, priced
from weightdecomp._sample import taken
from weightdecomp._sites import find_sites


@pytest.mark.parametrize(("share", "models"), [(0.5, 1), (1.0, 2), (2.0, 1)])
def test_a_second_random_model_is_asked_where_the_first_is_close(
    share: float, models: int, monkeypatch: pytest.MonkeyPatch
):
    model, batch, mse = mlp(), sparse(256, 5), named("mse", "")
    sites, _ = find_sites(model, batch, None)
    sample = taken(model, [batch], sites, mse, 128, torch.Generator().manual_seed(0))
    efforts, redrawn = [], _null.redrawn
    known = _null.null_effort(model, sample, sites, mse, 0.02, Config(), 0, spent=float("inf"))
    assert known is not None
    monkeypatch.setattr(_null, "redrawn", lambda *given: efforts.append(1) or redrawn(*given))

    found = _null.null_effort(model, sample, sites, mse, 0.02, Config(), 0, spent=share * known)

    assert len(efforts) == models
    assert (found == known) == (models == 1)


def test_random_models_are_priced_as_starts_are():
    model, batch, mse = mlp(), sparse(256, 5), named("mse", "")
    sites, _ = find_sites(model, batch, None)
    sample = taken(model, [batch], sites, mse, 128, torch.Generator().manual_seed(0))

    for site in sites:
        given = (model, sample, site, mse, 0.02, Config(), 0.01)
        assert priced(*given).bits == chosen_start(*given).bits
