import pytest
import torch
from jaxtyping import TypeCheckError

from weightdecomp import digits


def test_a_wrong_shape_is_refused_before_torch_sees_it():
    """Without the checks torch raises a RuntimeError here, so this fails when they are not live."""
    with pytest.raises(TypeCheckError):
        digits.model()(torch.zeros(2, 63))


def test_shapes_are_checked_in_every_package(pytestconfig: pytest.Config):
    hooked = pytestconfig.getoption("--jaxtyping-packages").split(",")

    assert hooked == ["weightdecomp", "bilinear", "graphs", "beartype.beartype"]
