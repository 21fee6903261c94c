"""Intervals hold every value that sampled inputs and masks reach, and are tight where that can be known."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from weightdecomp._bound import kl_upper, masked_site_output, mse_upper
from weightdecomp._interval import Interval, UnsupportedOperation
from weightdecomp._pieces import Pieces, rank_one_pieces

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 4)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def uniform(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=rng, dtype=torch.float64)


def random_box(rng: torch.Generator, *shape: int, width: float = 0.5) -> Interval:
    center, radius = normal(rng, *shape), width * uniform(rng, *shape)
    return Interval(center - radius, center + radius)


def points(rng: torch.Generator, box: Interval, n: int) -> Iterator[Tensor]:
    """Vertices and inner points of the box, in turn."""
    for index in range(n):
        share = uniform(rng, *box.shape)
        share = share.round() if index % 2 else share
        yield torch.minimum(box.lo.lerp(box.hi, share), box.hi)


def inside(value: Tensor, box: Interval) -> bool:
    return bool(((box.lo <= value) & (value <= box.hi)).all())


def vertices(lo: Tensor, hi: Tensor) -> Tensor:
    """All corners of a small box given by two vectors, one a row."""
    return torch.stack([torch.where(torch.tensor(up), hi, lo) for up in product([False, True], repeat=len(lo))])


# --- single functions ---

WEIGHT = torch.linspace(-1.5, 1.4, 36, dtype=torch.float64).reshape(6, 6).sin()
KERNEL = torch.linspace(-2, 3, 108, dtype=torch.float64).reshape(4, 3, 3, 3).cos()

# Functions of one variable, whose box has to be exactly their range.
CURVES: dict[str, Callable] = {
    name: getattr(F, name)
    for name in (
        *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish"),
        *("hardswish", "hardsigmoid", "softplus", "logsigmoid", "softsign"),
    )
} | {
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "exp": torch.exp,
    "expm1": torch.expm1,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "atan": torch.atan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "abs": abs,
    "square": torch.square,
    "product with itself": lambda x: x * x,
    "power 2": lambda x: x**2,
    "power 3": lambda x: x**3,
    "power -2": lambda x: (x + 9) ** -2,
    "root": lambda x: (x + 9).sqrt(),
    "inverse root": lambda x: (x + 9).rsqrt(),
    "logarithm": lambda x: (x + 9).log(),
    "reciprocal": lambda x: 1 / (x - 9),
    "difference": lambda x: 3 - x,
    "clamp": lambda x: x.clamp(-0.3, 0.2),
    "clamp min": lambda x: x.clamp(min=0),
    "negative factor": lambda x: -2 * x / 3,
}

# Functions of a (4, 6) tensor.
FUNCTIONS: dict[str, Callable] = {
    "linear": lambda x: F.linear(x, WEIGHT, WEIGHT[0]),
    "matmul": lambda x: x @ WEIGHT,
    "matmul from the left": lambda x: WEIGHT[:, :4] @ x,
    "matmul with itself": lambda x: x @ x.mT,
    "addmm": lambda x: torch.addmm(WEIGHT[0], x, WEIGHT),
    "einsum": lambda x: torch.einsum("bi,oi->bo", x, WEIGHT),
    "einsum of two": lambda x: torch.einsum("bi,ci->bc", x, x),
    "bilinear": lambda x: F.bilinear(x[:, :3], x[:, 3:], WEIGHT.reshape(4, 3, 3), WEIGHT[0, :4]),
    "gated product": lambda x: x[:, :3] * x[:, 3:].sigmoid(),
    "quotient": lambda x: x[:, :3] / (x[:, 3:] + 9),
    "constant plus": lambda x: WEIGHT[:4] + x,
    "constant minus": lambda x: WEIGHT[:4] - x,
    "constant times": lambda x: WEIGHT[:4] * x,
    "constant over": lambda x: WEIGHT[:4] / (x + 9),
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(dim=(0, 1)),
    "cumsum": lambda x: x.cumsum(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "largest": lambda x: x.amax(-1),
    "maximum": lambda x: torch.maximum(x, WEIGHT[:4]),
    "softmax": lambda x: x.softmax(-1),
    "softmax over rows": lambda x: F.softmax(x, dim=0),
    "log softmax": lambda x: F.log_softmax(x, -1),
    "masked softmax": lambda x: x.masked_fill(torch.eye(4, 6).bool(), -torch.inf).softmax(-1),
    "hand-written softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "layer norm": lambda x: F.layer_norm(x, (6,), WEIGHT[0], WEIGHT[1]),
    "rms norm": lambda x: F.rms_norm(x, (6,), WEIGHT[0], eps=1e-6),
    "hand-written rms norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "group norm": lambda x: F.group_norm(x, 2, WEIGHT[0], WEIGHT[1]),
    "batch norm": lambda x: F.batch_norm(x, WEIGHT[0], WEIGHT[1].abs(), WEIGHT[2], WEIGHT[3]),
    "attention": lambda x: F.scaled_dot_product_attention(*(x[None, :, i : i + 2] for i in (0, 2, 4))),
    "causal attention": lambda x: F.scaled_dot_product_attention(
        *(x[None, :, i : i + 2] for i in (0, 2, 4)), is_causal=True
    ),
    "cat and stack": lambda x: torch.stack([torch.cat([x, WEIGHT[:4]], 1), torch.cat([x, x], 1)]),
    "chunk": lambda x: x.chunk(2, -1)[1],
    "split": lambda x: torch.split(x, [2, 4], -1)[1],
    "iteration": lambda x: sum(row for row in x),
    "index": lambda x: x[..., 1:, None],
    "gather by index": lambda x: x[:, torch.tensor([2, 0])],
    "where": lambda x: torch.where(WEIGHT[:4] > 0, x, 0.0),
    "transposes": lambda x: x.T.unsqueeze(0).transpose(1, 2).permute(2, 0, 1).flatten(1).reshape(-1).view(6, 4),
    "dropout in eval": lambda x: F.dropout(x, training=False),
    "cast": lambda x: x.to(torch.float64).contiguous().detach(),
    "conv2d": lambda x: F.conv2d(x.repeat(3, 1)[None].reshape(1, 3, 4, 6), KERNEL, WEIGHT[0, :4], padding=1),
    "conv1d": lambda x: F.conv1d(x[None], KERNEL[:, :, 0].mT.repeat(1, 2, 1)[:, :4], stride=2),
    "max pool": lambda x: F.max_pool2d(x[None], 2),
    "mean pool": lambda x: F.adaptive_avg_pool2d(F.avg_pool2d(x[None], 2), 1),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_box_of_a_curve_is_its_range(name: str):
    box = Interval(torch.tensor([-3.0, -1.0, -0.5, 0.7, -2.0]), torch.tensor([-1.5, 2.0, 0.25, 2.5, -0.2]))

    image = CURVES[name](box)

    steps = torch.linspace(0, 1, 30001, dtype=torch.float64)  # which meet every kink
    grid = torch.minimum(torch.lerp(box.lo[:, None], box.hi[:, None], steps), box.hi[:, None])
    values = CURVES[name](grid)
    assert inside(values.T, image)
    # The grid misses a smooth bottom by at most half a step of 1e-4, and its value by the square of that.
    assert_close(image.lo, values.amin(1), rtol=1e-7, atol=1e-7)
    assert_close(image.hi, values.amax(1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(seed=seeds, width=st.sampled_from([0.0, 0.01, 0.5, 3.0]))
@settings(max_examples=12, deadline=None)
def test_a_function_of_points_stays_in_the_function_of_the_box(name: str, seed: int, width: float):
    rng = generator(seed)
    box = random_box(rng, 4, 6, width=width)

    image = FUNCTIONS[name](box)

    assert all(inside(FUNCTIONS[name](x), image) for x in points(rng, box, 40))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "hand-written softmax"])
def test_a_box_of_one_point_stays_a_point(name: str):
    x = normal(generator(0), 4, 6)

    image = FUNCTIONS[name](Interval.of(x))

    assert float((image.hi - image.lo).max()) < 1e-6


@pytest.mark.parametrize("name", ["softmax", "log softmax", "matmul", "linear", "layer norm", "attention"])
def test_boxes_of_layers_are_nearly_reached_by_vertices(name: str):
    rng = generator(1)
    box = random_box(rng, 4, 6, width=0.05)

    image = FUNCTIONS[name](box)

    values = torch.stack([FUNCTIONS[name](x) for x in points(rng, box, 4000)])
    reached = (values.amax(0) - values.amin(0)) / (image.hi - image.lo)
    # Queries, keys and the norm of a row share entries, and vertices are sampled, 2^24 being too many.
    assert float(reached.mean()) > {"attention": 0.7, "layer norm": 0.65}.get(name, 0.9)


def test_layer_norm_stays_bounded_on_a_wide_box():
    box = Interval(torch.full((2, 9), -1e6), torch.full((2, 9), 1e6))

    image = F.layer_norm(box, (9,))

    assert float(image.hi.max()) <= 3 * (1 + 1e-6)


def test_attention_never_leaves_the_range_of_the_values():
    rng = generator(2)
    query, key, value = (
        random_box(rng, 1, 3, 2, width=50),
        random_box(rng, 1, 5, 2, width=50),
        normal(rng, 1, 5, 4),
    )

    image = F.scaled_dot_product_attention(query, key, value)

    assert inside(image.hi - 1e-6, Interval(value.amin(1), value.amax(1) + 1e-6))


# --- rounding, in-place operations, refusals ---


def test_a_sum_holds_the_exact_sum_that_rounding_loses():
    terms = torch.tensor([1e16, 1.0, -1e16, 3.0], dtype=torch.float64)

    image = Interval.of(terms).sum()

    exact = sum(Fraction(float(term)) for term in terms)
    assert Fraction(float(image.lo)) <= exact <= Fraction(float(image.hi))


@given(n=st.integers(1, 40), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_a_matrix_product_holds_the_exact_product(n: int, seed: int):
    rng = generator(seed)
    # Factors of very different sizes, so that sums cancel.
    row, column = normal(rng, 1, n) * 10 ** (6 * normal(rng, 1, n)), normal(rng, n, 1)

    image = Interval.of(row) @ column

    exact = sum(Fraction(a) * Fraction(b) for a, b in zip(row[0].tolist(), column[:, 0].tolist(), strict=True))
    assert Fraction(float(image.lo)) <= exact <= Fraction(float(image.hi))


def test_an_undefined_end_makes_the_entry_unbounded():
    box = Interval(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 4.0]))

    image = box.sqrt()

    assert_close(image.hi, torch.tensor([torch.inf, 2.0], dtype=torch.float64))


def test_a_quotient_by_a_box_around_zero_is_unbounded():
    box = Interval(torch.tensor([-1.0]), torch.tensor([1.0]))

    image = 1 / box

    assert image.lo.item() == -torch.inf and image.hi.item() == torch.inf


def test_in_place_operations_reach_through_views():
    def forward(x):
        x = x * 1
        F.relu(x[:, :2], inplace=True)
        x += 1
        x[:, 3] = x[:, 0]
        x.view(-1).mul_(2)
        return x

    rng = generator(3)
    box = random_box(rng, 2, 4, width=2)

    image = forward(box)

    assert all(inside(forward(x), image) for x in points(rng, box, 40))
    assert_close(image.lo[:, 0], (2 * box.lo.relu() + 2)[:, 0])


def test_an_in_place_operation_leaves_the_tensor_of_a_point_alone():
    x = torch.tensor([-1.0, 2.0], dtype=torch.float64)

    nn.ReLU(inplace=True)(Interval.of(x))

    assert x.tolist() == [-1.0, 2.0]


REFUSED: dict[str, Callable] = {
    "sin": torch.sin,
    "gt": lambda x: 1 if x.sum() > 0 else 0,
    "eq": lambda x: x == 1,
    "__bool__": lambda x: x if x else -x,
    "__float__": lambda x: float(x.sum()),
    "item": lambda x: x.sum().item(),
    "argmax": lambda x: x.argmax(-1),
    "max": lambda x: x.max(-1),
    "to": lambda x: x.to(torch.int64),
    "data": lambda x: x.data,
    "numpy": lambda x: x.numpy(),
    "__rpow__": lambda x: 2**x,
    "floor_divide": lambda x: x // 1,
    "complex": lambda x: x * torch.tensor(1j),
    "pow": lambda x: x**x,
    "dropout": lambda x: F.dropout(x, training=True),
    "add_": lambda x: torch.zeros(2, 4).add_(x),
    "__setitem__": lambda x: torch.zeros(2, 4).__setitem__(0, x[0]),
    "multi_head_attention_forward": lambda x: nn.MultiheadAttention(4, 2).eval()(x, x, x),
}


@pytest.mark.parametrize("operation", REFUSED)
def test_an_operation_without_a_rule_is_refused_by_name(operation: str):
    box = random_box(generator(0), 2, 4)

    with pytest.raises(UnsupportedOperation, match="no bound: operation") as refusal:
        REFUSED[operation](box)

    assert refusal.value.operation == operation


def test_ends_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"must agree in shape, got \(2,\) and \(3,\)"):
        Interval(torch.zeros(2), torch.zeros(3))


def test_a_lower_end_above_the_upper_is_refused():
    with pytest.raises(ValueError, match="above its upper end"):
        Interval(torch.ones(2), torch.zeros(2))


# --- one masked site ---


def random_site(rng: torch.Generator, d_in: int, d_out: int, n: int, rank: int = 1) -> Pieces:
    owner = torch.arange(n).repeat_interleave(rank)
    return Pieces(normal(rng, n * rank, d_in), normal(rng, n * rank, d_out), owner)


def site_output(x: Tensor, site: Pieces, mask: Tensor, rest: Tensor | None = None, rest_mask: float = 0) -> Tensor:
    weights = torch.stack([site.weight(c) for c in range(site.n)])
    rows = torch.einsum("...c,coi,...i->...o", mask, weights, x)
    return rows if rest is None else rows + rest_mask * (x @ rest.T)


@given(d_in=sizes, d_out=sizes, n=sizes, rank=st.integers(1, 3), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_for_a_known_input_each_output_reaches_both_ends_of_its_box(
    d_in: int, d_out: int, n: int, rank: int, seed: int
):
    rng = generator(seed)
    site, rest, bias = random_site(rng, d_in, d_out, n, rank), normal(rng, d_out, d_in), normal(rng, d_out)
    x, importance = normal(rng, d_in), uniform(rng, n).round(decimals=1)

    box = masked_site_output(x, site, importance, rest, bias)

    masks = vertices(importance, torch.ones(n))
    reached = torch.cat([site_output(x.expand(len(masks), -1), site, masks, rest, m) for m in (0, 1)]) + bias
    assert inside(reached, box)
    assert_close(box.lo, reached.amin(0), rtol=1e-7, atol=1e-7)
    assert_close(box.hi, reached.amax(0), rtol=1e-7, atol=1e-7)


@given(d_in=sizes, d_out=sizes, n=sizes, rank=st.integers(1, 3), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_no_vertex_of_inputs_and_masks_leaves_the_box(d_in: int, d_out: int, n: int, rank: int, seed: int):
    rng = generator(seed)
    site, rest, x = (
        random_site(rng, d_in, d_out, n, rank),
        normal(rng, d_out, d_in),
        random_box(rng, d_in, width=2),
    )
    importance = uniform(rng, n).round(decimals=1)

    box = masked_site_output(x, site, importance, rest)

    for mask in vertices(importance, torch.ones(n)):
        corners = vertices(x.lo, x.hi)
        assert all(inside(site_output(corners, site, mask.expand(len(corners), -1), rest, m), box) for m in (0, 1))


@given(d_in=sizes, d_out=sizes, n=sizes, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_where_no_inner_activation_changes_sign_each_end_is_reached(d_in: int, d_out: int, n: int, seed: int):
    rng = generator(seed)
    site, importance = random_site(rng, d_in, d_out, n), uniform(rng, n)
    center = normal(rng, d_in)
    inner = site.v @ center
    reach = 0.9 * float((inner.abs() / site.v.abs().sum(1)).min())  # of the largest cube without a change of sign
    x = Interval(center - reach, center + reach)

    box = masked_site_output(x, site, importance)

    corners = vertices(x.lo, x.hi)
    reached = torch.cat(
        [site_output(corners, site, mask.expand(len(corners), -1)) for mask in vertices(importance, torch.ones(n))]
    )
    assert_close(box.hi, reached.amax(0), rtol=1e-7, atol=1e-7)
    assert_close(box.lo, reached.amin(0), rtol=1e-7, atol=1e-7)


@given(d_in=sizes, d_out=sizes, n=sizes, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_the_box_is_within_the_sum_of_components_and_within_the_whole_minus_what_masks_take(
    d_in: int, d_out: int, n: int, seed: int
):
    rng = generator(seed)
    site, x, importance = (
        random_site(rng, d_in, d_out, n),
        random_box(rng, 3, d_in, width=2),
        uniform(rng, 3, n),
    )

    box = masked_site_output(x, site, importance)

    inner = F.linear(x, site.v)
    apart = F.linear(inner * Interval(importance, torch.ones(3, n)), site.u.T)
    whole = F.linear(x, site.total()) - F.linear(inner * Interval(torch.zeros(3, n), 1 - importance), site.u.T)
    for wider in (apart, whole):
        assert bool((box.lo >= wider.lo - 1e-7).all() and (box.hi <= wider.hi + 1e-7).all())


def test_with_every_component_on_a_site_is_its_weight_on_the_box():
    rng = generator(4)
    site, x = random_site(rng, 5, 3, 40), random_box(rng, 6, 5)

    box = masked_site_output(x, site, torch.ones(6, 40))

    assert_close(box.hi, F.linear(x, site.total()).hi, rtol=1e-6, atol=1e-6)


def test_the_basis_inside_a_component_changes_nothing():
    """G1."""
    rng = generator(5)
    site, x, importance = random_site(rng, 5, 4, 3, rank=2), random_box(rng, 6, 5), uniform(rng, 6, 3)
    turn = normal(rng, 2, 2)
    v, u = site.v.reshape(3, 2, 5), site.u.reshape(3, 2, 4)
    other = Pieces((turn @ v).reshape(6, 5), (torch.linalg.inv(turn).T @ u).reshape(6, 4), site.owner)

    box = masked_site_output(x, other, importance)

    assert_close(box.hi, masked_site_output(x, site, importance).hi, rtol=1e-6, atol=1e-6)


def test_rows_computed_in_chunks_are_the_rows_computed_at_once(monkeypatch: pytest.MonkeyPatch):
    rng = generator(6)
    site, x, importance = random_site(rng, 5, 4, 3), random_box(rng, 2, 7, 5), uniform(rng, 2, 7, 3)
    at_once = masked_site_output(x, site, importance)
    monkeypatch.setattr("weightdecomp._bound._ENTRIES_AT_ONCE", 40)

    chunked = masked_site_output(x, site, importance)

    assert_close(chunked.hi, at_once.hi)


def test_importances_of_another_number_of_components_are_refused():
    site = random_site(generator(7), 5, 4, 3)

    with pytest.raises(ValueError, match=r"importance has the shape \(2, 4\), expected \(2, 3\)"):
        masked_site_output(torch.zeros(2, 5), site, torch.zeros(2, 4))


# --- divergences ---


@given(n=st.integers(1, 6), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_the_mse_bound_is_the_largest_mse_at_a_vertex(n: int, seed: int):
    rng = generator(seed)
    target, box = normal(rng, n), random_box(rng, n)

    bound = mse_upper(target, box)

    reached = (vertices(box.lo, box.hi) - target).square().mean(-1).max()
    assert float(bound) >= float(reached)
    assert_close(bound, reached)


def kl_at(target: Tensor, logits: Tensor) -> Tensor:
    log_p = target.log_softmax(-1)
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


@given(n=st.integers(1, 7), seed=seeds, width=st.sampled_from([0.0, 0.01, 0.3, 3.0, 30.0]))
@settings(max_examples=60, deadline=None)
def test_the_kl_bound_is_above_every_vertex(n: int, seed: int, width: float):
    rng = generator(seed)
    target, box = 3 * normal(rng, n), random_box(rng, n, width=width)

    bound = kl_upper(target, box)

    assert float(bound) >= float(kl_at(target, vertices(box.lo, box.hi)).max())


@given(n=st.integers(2, 7), seed=seeds, width=st.sampled_from([0.01, 0.3, 3.0, 30.0]))
@settings(max_examples=30, deadline=None)
def test_the_kl_bound_is_exact_for_one_class(n: int, seed: int, width: float):
    rng = generator(seed)
    target, box = (
        torch.full((n,), -torch.inf).index_fill(0, torch.tensor(1), 0.0),
        random_box(rng, n, width=width),
    )

    bound = kl_upper(target, box)

    largest = (vertices(box.lo, box.hi).logsumexp(-1) - vertices(box.lo, box.hi)[:, 1]).max()
    assert_close(bound, largest, rtol=1e-6, atol=1e-6)


def test_the_kl_bound_shrinks_with_the_square_of_the_width_and_stays_near_the_largest_vertex():
    rng = generator(8)
    target = normal(rng, 30, 10)

    def bound(width: float) -> Tensor:
        return kl_upper(target, Interval(target - width, target + width))

    reached = torch.stack([kl_at(row, vertices(row - 0.1, row + 0.1)).max() for row in target])
    assert float((bound(0.1) / reached).max()) < 1.05
    assert_close(bound(0.01) / bound(0.1), torch.full((30,), 0.01).double(), rtol=0.05, atol=0)


def test_the_kl_bound_of_an_unbounded_box_is_infinite():
    box = Interval(torch.full((3,), -torch.inf), torch.full((3,), torch.inf))

    bound = kl_upper(torch.zeros(3), box)

    assert float(bound) == torch.inf


# --- whole models: the bound runs the model's own forward code ---


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """One causal layer of two heads, written out."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, position, d = x.shape
        query, key, value = (
            part.view(batch, position, 2, d // 2).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = query @ key.transpose(-2, -1) / (d // 2) ** 0.5
        causal = torch.ones(position, position, dtype=torch.bool).triu(1)
        mixed = F.softmax(scores.masked_fill(causal, float("-inf")), dim=-1) @ value
        return x + self.out(mixed.transpose(1, 2).reshape(batch, position, d))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4)),
    "gelu": lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 4)),
    "residual": lambda: nn.Sequential(Residual(), Residual(), nn.LayerNorm(6), nn.Linear(6, 4)),
    "convolution": lambda: nn.Sequential(
        nn.Linear(6, 16),
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    ),
    "attention": lambda: nn.Sequential(Attention(), nn.RMSNorm(6, eps=1e-6), nn.Linear(6, 4)),
}


class Case:
    """A small model, inputs, and random components and importances at every nn.Linear."""

    def __init__(self, name: str, seed: int):
        self.rng = generator(seed)
        self.model = MODELS[name]().double().eval()
        self.sites = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        for parameter in self.model.parameters():
            parameter.data = normal(self.rng, *parameter.shape) / parameter.shape[-1] ** 0.5
        self.x = normal(self.rng, *((3, 6) if name == "convolution" else (3, 4, 6)))
        self.pieces = {site: self._pieces(site) for site in self.sites}
        self.shapes: dict[nn.Module, torch.Size] = {}
        self.target = self.run(self._unmasked)

    def _pieces(self, site: nn.Linear) -> Pieces:
        v = torch.eye(site.in_features) + 0.3 * normal(self.rng, site.in_features, site.in_features)
        return rank_one_pieces(v, torch.linalg.solve(v.T, site.weight.detach().T))

    def _unmasked(self, site: nn.Linear, x: Tensor) -> Tensor:
        self.shapes[site] = x.shape
        return F.linear(x, site.weight, site.bias)

    def masks(self) -> dict[nn.Module, Tensor]:
        """Uniform in [0, 1], or each 0 or 1, at random."""
        masks = {site: uniform(self.rng, *shape) for site, shape in self.shapes.items()}
        corner = float(uniform(self.rng)) < 0.5
        return {site: mask.round() if corner else mask for site, mask in masks.items()}

    def run(self, forward: Callable):
        """The model's output with forward(site, x) in place of every nn.Linear's own."""
        for site in self.sites:
            site.forward = lambda x, site=site: forward(site, x)
        output = self.model(self.x)
        for site in self.sites:
            del site.forward
        return output

    def masked(self, importance: dict, sources: dict) -> Tensor:
        def forward(site: nn.Linear, x: Tensor) -> Tensor:
            mask = importance[site] + (1 - importance[site]) * sources[site]
            return self.pieces[site].contract(x @ self.pieces[site].v.T, mask) + site.bias

        return self.run(forward)

    def box(self, importance: dict) -> Interval:
        return self.run(lambda site, x: masked_site_output(x, self.pieces[site], importance[site], bias=site.bias))


@pytest.mark.parametrize("name", MODELS)
@given(seed=seeds)
@settings(max_examples=6, deadline=None)
def test_no_masks_take_a_model_out_of_its_box(name: str, seed: int):
    case = Case(name, seed)
    importance = {site: (2 * uniform(case.rng, *shape)).clamp_max(1) for site, shape in case.shapes.items()}

    box = case.box(importance)

    assert all(inside(case.masked(importance, case.masks()), box) for _ in range(40))
    # And the vertices that an attack on the distance from the target climbs to.
    sources = {site: mask.requires_grad_() for site, mask in case.masks().items()}
    for _ in range(20):
        output = case.masked(importance, sources)
        assert inside(output.detach(), box)
        slopes = torch.autograd.grad((output - case.target).square().sum(), list(sources.values()))
        sources = {
            site: (mask.detach() + slope.sign()).clamp(0, 1).requires_grad_()
            for (site, mask), slope in zip(sources.items(), slopes, strict=True)
        }


@pytest.mark.parametrize("name", MODELS)
def test_with_all_components_on_a_model_has_the_box_of_its_own_output(name: str):
    """F1."""
    case = Case(name, seed=0)

    box = case.box({site: torch.ones(shape) for site, shape in case.shapes.items()})

    assert inside(case.target.detach(), box)
    assert float((box.hi - box.lo).max()) < 1e-4


@given(d_in=sizes, d_out=sizes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_the_mse_bound_of_a_relu_layer_with_a_component_per_neuron_is_the_worst_vertex(
    d_in: int, d_out: int, seed: int
):
    rng = generator(seed)
    weight, bias, x = normal(rng, d_out, d_in), normal(rng, d_out), normal(rng, d_in)
    site, importance = rank_one_pieces(weight, torch.eye(d_out)), uniform(rng, d_out)
    target = F.relu(F.linear(x, weight, bias))

    bound = mse_upper(target, F.relu(masked_site_output(x, site, importance, bias=bias)))

    masks = vertices(importance, torch.ones(d_out))
    worst = (F.relu(masks * (weight @ x) + bias) - target).square().mean(-1).max()
    assert_close(bound, worst)


def test_a_model_with_an_operation_without_a_rule_says_which():
    class Wave(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x)

    box = random_box(generator(9), 2, 3)

    with pytest.raises(UnsupportedOperation, match="no bound: operation 'sin'"):
        nn.Sequential(nn.ReLU(), Wave())(box)
