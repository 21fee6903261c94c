import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bilinear import (
    Attention,
    BilinearAttention,
    Layer,
    Stack,
    edges,
    eigen,
    interactions,
    neuron_squares,
    read,
    strongest,
)
from bilinear._attention import rotated
from tests.bilinear_models import bilinear_layer, cases, term_scale
from tests.models import drawn


@given(**cases, features=st.integers(1, 5))
@settings(max_examples=40)
def test_interactions_give_the_output_as_a_function_of_feature_activations(
    d_in: int, hidden: int, d_out: int, kind: str, seed: int, features: int
):
    layer = bilinear_layer(d_in, hidden, d_out, "biases and skip" if "norm" in kind else kind, seed)
    if layer.norm is not None:
        return
    reads, bias, z = drawn(d_in, features, seed=seed), drawn(d_in, seed=seed + 1), drawn(6, features, seed=seed + 2)
    writes = drawn(3, d_out, seed=seed + 3)

    found = interactions(layer, reads, writes, bias)

    lifted = torch.cat([torch.ones(6, 1).double(), z], 1)
    x = z @ reads.T + bias
    from_pairs = torch.einsum("bi,nij,bj->bn", lifted, found, lifted)
    assert_close(from_pairs, layer(x) @ writes.T, rtol=0, atol=1e-11 * (1 + term_scale(layer, x)))


def test_interactions_on_the_sphere_are_the_forms_between_directions():
    layer, reads = bilinear_layer(4, 6, 2, "rms"), drawn(4, 3)

    found = interactions(layer, reads)

    assert_close(found, reads.T @ layer.form() @ reads)
    assert_close(interactions(layer, reads, torch.tensor([0.0, 1.0]).double()), found[1])
    with pytest.raises(ValueError, match="a bias has no place"):
        interactions(layer, reads, bias=drawn(4))


def test_the_strongest_interactions_count_both_orders_of_a_pair():
    matrices = torch.tensor([[[1.0, 4], [4, 0]], [[-9, 0], [0, 0]]]).double()

    found = strongest(matrices, 2)

    assert found.values.tolist() == [-9, 8]
    assert found.outputs.tolist() == [1, 0] and found.pairs.tolist() == [[0, 0], [0, 1]]


@given(kind=st.sampled_from(["plain", "biases", "skip", "biases and skip"]), seed=st.integers(0, 2**16))
@settings(max_examples=30)
def test_edges_carry_all_that_a_later_component_reads(kind: str, seed: int):
    """B8: with residual paths and biases on both layers."""
    first, second = bilinear_layer(4, 6, 3, kind, seed), bilinear_layer(3, 5, 2, kind, seed + 9)
    x = drawn(8, 4, seed=seed)
    upstream, pairs = neuron_squares(first), eigen(second, 1)

    found = edges(upstream, pairs)

    inner = upstream.activations(x) @ found.weights.T + found.offsets
    scale = 1e-11 * (1 + term_scale(second, first(x)))
    assert_close(inner.square() @ pairs.values, second(first(x))[:, 1], rtol=0, atol=scale)


def test_edges_around_a_norm_keep_the_direct_path():
    first = bilinear_layer(3, 5, 3, "norm and skip")
    x, readers = drawn(6, 3), drawn(3, 2, seed=4)
    upstream = eigen(first).squares()

    found = edges(upstream, readers)

    assert found.direct is not None
    inner = upstream.activations(x) @ found.weights.T + found.offsets + x @ found.direct.T
    assert_close(inner, first(x) @ readers)


def test_readers_behind_a_norm_or_of_another_width_have_no_edges():
    upstream = neuron_squares(bilinear_layer(4, 6, 3))

    with pytest.raises(ValueError, match="through which no edge is linear"):
        edges(upstream, eigen(bilinear_layer(3, 4, 1, "rms"), 0))
    with pytest.raises(ValueError, match=r"readers has shape \(5, 2\), expected \(3, any\)"):
        edges(upstream, drawn(5, 2))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", ["plain", "biases and skip"])
def test_the_contracted_stack_is_the_stack(depth: int, kind: str):
    widths = [4, 3, 5, 2]
    stack = Stack(
        tuple(bilinear_layer(a, 6, b, kind, i) for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)))[
            :depth
        ]
    )
    x, direction = drawn(4), drawn(widths[depth], seed=5)

    found = stack.multilinear(direction, [x] * stack.degree)

    assert found.kind == "exact"
    assert found.value == pytest.approx(float(stack(x[None])[0] @ direction), rel=1e-9)


def test_the_contraction_stays_small_where_the_naive_one_would_not():
    stack = Stack((bilinear_layer(64, 128, 64), bilinear_layer(64, 128, 64, seed=3)))

    operations, largest = stack.cost()

    assert largest <= 128 * 64
    assert operations < 1e7


def test_the_energy_is_exact_for_one_layer_and_an_estimate_beyond():
    for kind in ("plain", "biases and skip"):
        one = Stack((bilinear_layer(4, 6, 3, kind),))
        y = one(drawn(300_000, 4)).square().sum(1)
        found = one.energy()
        assert found.kind == "exact"
        assert found.value == pytest.approx(float(y.mean()), abs=5 * float(y.std()) / len(y) ** 0.5)

    assert Stack((bilinear_layer(4, 6, 3), bilinear_layer(3, 6, 3))).energy().kind == "estimate"


def test_layers_that_do_not_follow_one_another_are_refused():
    with pytest.raises(ValueError, match="layer 0 writes 3 numbers, layer 1 reads 4"):
        Stack((bilinear_layer(4, 6, 3), bilinear_layer(4, 6, 3)))
    with pytest.raises(ValueError, match="which a norm is not"):
        Stack((bilinear_layer(4, 6, 3, "rms"),))
    with pytest.raises(ValueError, match="takes as many inputs, got 1"):
        Stack((bilinear_layer(4, 6, 3),)).multilinear(0, [drawn(4)])
    with pytest.raises(ValueError, match="at least one layer"):
        Stack(())


def attention(causal: bool = True, rotary: bool = False) -> Attention:
    """Two heads of width 4 on a stream of width 6."""
    weights = [drawn(2, 4, 6, seed=i) for i in range(5)]
    return Attention(*weights, drawn(2, 6, 4, seed=5), scale=0.5, causal=causal, rotary=rotary)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
def test_bilinear_attention_is_its_definition(causal: bool, rotary: bool):
    layer, x = attention(causal, rotary), drawn(5, 6)

    expected = torch.zeros(5, 6).double()
    for h in range(2):
        for i in range(5):
            for j in range(i + 1 if causal else 5):
                score = layer.scale
                for q, k in ((layer.q1, layer.k1), (layer.q2, layer.k2)):
                    query, key = q[h] @ x[i], k[h] @ x[j]
                    if rotary:
                        query, key = (rotated(v[None], torch.tensor([p]))[0] for v, p in ((query, i), (key, j)))
                    score = score * (query @ key)
                expected[i] += score * (layer.o[h] @ layer.v[h] @ x[j])

    assert_close(layer(x), expected)


@pytest.mark.parametrize("rotary", [True, False])
def test_attention_with_a_fixed_context_is_a_bilinear_layer(rotary: bool):
    """B9: what the last position writes besides reading itself."""
    layer, x = attention(rotary=rotary), drawn(5, 6)
    own = attention(rotary=rotary).pattern(x)[:, 4, 4]
    itself = sum(own[h] * (layer.o[h] @ layer.v[h] @ x[4]) for h in range(2))

    found = layer.at(x[:4])

    assert isinstance(found, Layer) and found.hidden == 8
    assert_close(found(x[4:]), (layer(x)[4] - itself)[None])
    assert_close(eigen(found)(x[4:]), found(x[4:]))


def test_path_weights_are_the_scores_and_values_of_directions():
    layer = attention(causal=False)
    x = drawn(2, 6)

    found = layer.path_weights(x[:1].T.contiguous(), x[1:].T.contiguous())

    pattern = found.first[:, 0, 0] * found.second[:, 0, 0] * layer.scale
    assert_close(pattern, layer.pattern(x)[:, 0, 1])
    assert_close(found.value[0, 0, 0], layer.scale * x[0] @ layer.o[0] @ layer.v[0] @ x[1])


def test_an_attention_module_is_read_exactly():
    torch.random.default_generator.manual_seed(0)
    module, x = BilinearAttention(6, 3, rotary=True), drawn(2, 5, 6).float()

    found = read(module)

    assert_close(found(x), module(x))
    assert not found.q1.requires_grad  # type: ignore[union-attr]


def test_attention_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="d_model 6 is no multiple of n_heads 4"):
        BilinearAttention(6, 4)
    with pytest.raises(ValueError, match="head 2: the layer has heads 0 to 1"):
        attention().score_form(2, 1)
    with pytest.raises(ValueError, match="product must be 1 or 2, got 3"):
        attention().score_form(0, 3)
    with pytest.raises(ValueError, match="even width, got 3"):
        Attention(*[drawn(1, 3, 4)] * 5, drawn(1, 4, 3), rotary=True)
