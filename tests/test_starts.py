import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.models import drawn
from weightdecomp._pieces import Pieces
from weightdecomp._starts import (
    Reach,
    column_line_start,
    column_start,
    coordinate_starts,
    effect_start,
    exemplar_start,
    exemplars,
    row_line_start,
    row_start,
    singular_starts,
    svd_start,
)

shapes = {
    "d_in": st.integers(1, 6),
    "d_out": st.integers(1, 6),
    "span": st.integers(1, 6),
    "rank": st.integers(1, 6),
    "seed": st.integers(0, 2**16),
}


def site(d_in: int, d_out: int, span: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix of at most the given rank, and input rows that span at most so many dimensions."""
    matrix = drawn(d_out, rank, seed=seed) @ drawn(rank, d_in, seed=seed + 1)
    return matrix, drawn(20, span, seed=seed + 2) @ drawn(span, d_in, seed=seed + 3)


def assert_exact(pieces: Pieces, matrix: Tensor, rows: Tensor) -> None:
    """The pieces do to the inputs what the matrix does, and nothing outside their span (F1)."""
    scale = float((rows @ matrix.T).abs().max())
    assert_close(rows @ pieces.total().T, rows @ matrix.T, rtol=0, atol=1e-9 * max(scale, 1))
    outside = torch.eye(matrix.shape[1]).double() - torch.linalg.pinv(rows, rtol=1e-6) @ rows
    assert_close(pieces.total() @ outside, torch.zeros_like(matrix), rtol=0, atol=1e-7 * max(scale, 1))


@given(**shapes)
@settings(max_examples=40)
def test_singular_pairs_sum_to_the_weights_on_the_inputs(d_in: int, d_out: int, span: int, rank: int, seed: int):
    """F1."""
    matrix, rows = site(d_in, d_out, span, rank, seed)

    pieces = svd_start(Reach(matrix, rows))

    assert_exact(pieces, matrix, rows)
    assert pieces.n <= min(d_in, d_out, span, rank)


@given(**shapes)
@settings(max_examples=40)
def test_rows_and_columns_sum_to_the_weights_on_the_inputs(d_in: int, d_out: int, span: int, rank: int, seed: int):
    """F1."""
    matrix, rows = site(d_in, d_out, span, rank, seed)

    reach = Reach(matrix, rows)

    assert_exact(row_start(reach), matrix, rows)
    assert_exact(column_start(reach, matrix), matrix, rows)


@given(**shapes, n=st.integers(2, 5))
@settings(max_examples=40)
def test_lines_that_coordinates_share_are_found_and_sum_to_the_weights(
    d_in: int, d_out: int, span: int, rank: int, seed: int, n: int
):
    """F1: every row (column) of the matrix repeated n times at other lengths is still one line."""
    matrix, rows = site(d_in, d_out, span, rank, seed)
    lengths = 1 + drawn(n, 1, seed=seed).abs()
    tall = torch.cat([length * matrix for length in lengths])
    wide = torch.cat([length * matrix for length in lengths], 1)

    by_row = row_line_start(Reach(tall, rows))
    by_column = column_line_start(Reach(wide, rows.repeat(1, n)), wide)

    assert by_row is not None and by_column is not None
    assert by_row.n <= d_out and by_column.n <= d_in
    assert_exact(by_row, tall, rows)
    assert_exact(by_column, wide, rows.repeat(1, n))


def test_rows_and_columns_without_shared_lines_have_no_such_start():
    matrix = drawn(4, 5)
    reach = Reach(matrix, drawn(20, 5, seed=2))

    assert row_line_start(reach) is None
    assert column_line_start(reach, matrix) is None


@given(**shapes, n=st.integers(1, 9))
@settings(max_examples=80)
def test_any_exemplars_sum_to_the_weights_on_the_inputs(d_in: int, d_out: int, span: int, rank: int, seed: int, n: int):
    """F1, also for directions that are too few, too many, repeated, or unread by the weights."""
    matrix, rows = site(d_in, d_out, span, rank, seed)
    reach = Reach(matrix, rows)
    directions = torch.nn.functional.normalize(drawn(n, reach.basis.shape[1], seed=seed + 4), dim=1)
    directions[n // 2] = directions[0]

    pieces = exemplar_start(reach, directions)

    assert_exact(pieces, matrix, rows)


def test_singular_pairs_have_uncorrelated_activations():
    matrix, rows = site(5, 4, 5, 4, seed=0)

    pieces = svd_start(Reach(matrix, rows))

    moment = (rows @ pieces.v.T).T @ (rows @ pieces.v.T)
    assert_close(moment, moment.diagonal().diag(), rtol=0, atol=1e-9)
    gram = pieces.u @ pieces.u.T
    assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-9)


def test_a_row_writes_one_output_and_a_column_reads_one_input():
    matrix, rows = site(5, 4, 5, 4, seed=0)
    reach = Reach(matrix, rows)

    assert ((row_start(reach).u.abs() > 1e-12).sum(1) == 1).all()
    assert ((column_start(reach, matrix).v.abs() > 1e-12).sum(1) == 1).all()


def planted(directions: Tensor, n: int, active: float, seed: int) -> Tensor:
    """Rows in which each direction is active with the given probability."""
    rng = torch.Generator().manual_seed(seed)
    on = torch.rand(n, len(directions), generator=rng) < active
    return (torch.rand(n, len(directions), generator=rng).double() * on) @ directions


@pytest.mark.parametrize("seed", range(5))
def test_exemplars_recover_planted_directions_that_are_not_orthogonal(seed: int):
    """Recovery: ten directions in six dimensions, each matched with |cosine| above 0.9999, none left over."""
    directions = torch.nn.functional.normalize(drawn(10, 6, seed=seed), dim=1)
    rows = planted(directions, 2000, 0.1, seed + 100)

    found = exemplars(rows, rows.square().mean(0), rows.square().sum(1), most=48)

    cosines = (found[0].directions[: min(found[0].cuts, key=lambda n: abs(n - 10))] @ directions.T).abs()
    assert cosines.shape == (10, 10)
    assert cosines.amax(0).min() > 0.9999
    assert cosines.amax(1).min() > 0.9999


def test_a_direction_that_the_output_ignores_is_no_exemplar():
    directions = torch.nn.functional.normalize(drawn(4, 4, seed=3), dim=1)
    on = torch.arange(400) % 4
    rows = directions[on] * (1 + torch.rand(400, 1, generator=torch.Generator().manual_seed(0)).double())

    found = exemplars(rows, rows.square().mean(0), (on != 3).double(), most=16)

    cosines = (found[0].directions @ directions.T).abs()
    assert (cosines[:, :3].amax(0) > 0.9999).all()
    assert cosines[:, 3].max() < 0.9999


def test_an_exemplar_start_answers_to_its_own_direction_alone():
    """What the site writes when one direction is active is the column of that direction's piece."""
    matrix, rows = site(6, 4, 6, 4, seed=1)
    reach = Reach(matrix, rows)
    directions = torch.nn.functional.normalize(drawn(3, 6, seed=5), dim=1)

    pieces = exemplar_start(reach, directions)

    inner = directions @ reach.basis.T @ pieces.v.T
    contributions = inner[:, :3, None] * pieces.u[:3]
    assert_close(contributions.sum(1), directions @ reach.basis.T @ matrix.T)
    assert_close(inner[:, :3], inner[:, :3].diagonal().diag(), rtol=0, atol=1e-10)


def test_inputs_without_effect_have_no_exemplars():
    assert exemplars(drawn(20, 3), torch.ones(3).double(), torch.zeros(20).double(), most=8) == []


def test_a_site_whose_inputs_are_zero_still_sums_to_its_weights():
    """F1."""
    matrix = drawn(4, 3)

    pieces = svd_start(Reach(matrix, torch.zeros(10, 3).double()))

    assert_close(pieces.total(), matrix)


@given(**shapes)
@settings(max_examples=30)
def test_pairs_by_effect_sum_to_the_weights_with_the_largest_effects_first(
    d_in: int, d_out: int, span: int, rank: int, seed: int
):
    """F1; ablating pairs does to `|sensitivity . output|^2` what their singular values say, each apart."""
    matrix, rows = site(d_in, d_out, span, rank, seed)
    sensitivity = drawn(40, d_out, seed=seed)
    reach = Reach(matrix, rows)

    pieces = effect_start(reach, sensitivity)

    assert_close(reach.basis.T @ pieces.total().T, reach.basis.T @ matrix.T)
    changes = (sensitivity @ pieces.u.T).square().mean(0) * (rows @ pieces.v.T).square().mean(0)
    assert (changes.diff() <= 0.05 * changes.max()).all()  # up to the floor under directions that count little


def test_directions_that_nothing_reads_come_last():
    matrix, rows = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double(), drawn(50, 3)
    sensitivity = drawn(40, 3) * torch.tensor([0.0, 1.0, 1.0])

    last = effect_start(Reach(matrix, rows), sensitivity).u[-1]

    assert last[0].abs() > 0.9 * last.norm()


def test_the_portfolio_keeps_within_the_capacity():
    matrix, rows = site(3, 6, 3, 3, seed=0)

    reach = Reach(matrix, rows)
    found = singular_starts(reach, drawn(8, len(matrix))) | coordinate_starts(matrix, reach, most=4)

    assert set(found) == {"svd", "svd by effect", "columns"}
    assert all(pieces.n <= 4 for pieces in found.values())
