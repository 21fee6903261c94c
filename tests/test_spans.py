import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.models import drawn
from weightdecomp._spans import span_start
from weightdecomp._starts import Reach


def planted(dimensions: list[int], seed: int, n: int = 60) -> tuple[list[Tensor], Tensor]:
    """Bases that are independent but not orthogonal, and inputs that each lie in one of them, near its first axis."""
    split = list(torch.eye(sum(dimensions)).double().split(dimensions))
    mixed = torch.eye(sum(dimensions)).double() + 0.1 * drawn(sum(dimensions), sum(dimensions), seed=seed)
    bases = [span @ mixed for span in split]
    rows = []
    for number, basis in enumerate(bases):
        coordinates = 0.2 * drawn(n, len(basis), seed=seed + 1 + number)
        coordinates[:, 0] += 2
        rows.append(coordinates @ basis)
    return bases, torch.cat(rows)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(0, 2**16))
@settings(max_examples=40)
def test_planted_spans_are_found_and_answer_to_themselves_alone(dimensions: list[int], seed: int):
    bases, rows = planted(dimensions, seed)
    matrix = drawn(7, rows.shape[1], seed=seed + 99)
    reach = Reach(matrix, rows)

    found = span_start(reach, rows @ reach.basis)

    if max(dimensions) == 1:
        assert found is None  # directions have a start of their own
        return
    assert found is not None
    pieces, _ = found
    assert sorted(pieces.ranks().tolist()) == sorted(dimensions)
    # On an input of one span, one component does all that the matrix does.
    for row in (basis.sum(0) for basis in bases):
        shares = torch.stack([pieces.weight(c) @ row for c in range(pieces.n)])
        own = shares.norm(dim=1).argmax()
        assert_close(shares[own], matrix @ row, rtol=1e-6, atol=1e-6)
        assert shares.norm() - shares[own].norm() < 1e-6


def test_inputs_that_fill_their_space_have_no_spans():
    rows = drawn(300, 6)

    assert span_start(Reach(drawn(4, 6, seed=1), rows), rows) is None


def test_rows_that_are_only_nearly_parallel_are_no_span_and_end_the_search():
    """One singular value a hundred times the others, with rows farther from its line than rounding."""
    lines = torch.eye(6).double()[:2].repeat_interleave(200, 0)
    rows = lines + 0.005 * drawn(400, 6)

    assert span_start(Reach(drawn(4, 6, seed=1), rows), rows) is None


def test_spans_that_share_a_direction_are_no_start():
    """Components could not each answer to their own span alone."""
    axes = torch.eye(3).double()
    rows = torch.cat([(drawn(60, 2, seed=s) * 0.2 + torch.tensor([2.0, 0])) @ axes[[s, 2]] for s in range(2)])
    rows = torch.cat([rows, (drawn(60, 2, seed=5) * 0.2 + torch.tensor([2.0, 0])) @ (axes[:2] + axes[[1, 2]])])
    reach = Reach(drawn(4, 3, seed=1), rows)

    assert span_start(reach, rows @ reach.basis) is None


def test_a_few_inputs_outside_of_every_span_change_nothing():
    _, rows = planted([2, 3], 0)
    stray = torch.cat([rows, drawn(3, 5, seed=7)])
    reach = Reach(drawn(4, 5, seed=1), stray)

    found = span_start(reach, stray @ reach.basis)

    assert found is not None
    assert sorted(found[0].ranks().tolist()) == [2, 3]
