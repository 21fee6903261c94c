import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import weightdecomp as wd
from tests.models import CASES, QUICK, Calls, case, drawn, ids, mlp, seeded
from weightdecomp._batches import call
from weightdecomp._divergence import output_tensor
from weightdecomp._forward import Masks, masked
from weightdecomp._pieces import Pieces
from weightdecomp._sites import Site, find_sites, put_weight

# All masks on differs from the target by the rounding of one more product a site (F1). Half precision targets
# round each site's output once, as their own kernels do, but not always to the same side.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def exact_pieces(site: Site, seed: int, extra: int = 2, rank: int = 1) -> Pieces:
    """Random pieces that sum to the site's matrix, in components of the given rank."""
    matrix = site.matrix().double()
    d_out, d_in = matrix.shape
    v = drawn(d_in + extra, d_in, seed=seed)
    u = (matrix @ torch.linalg.pinv(v)).T
    return Pieces(v.to(site.dtype), u.to(site.dtype), torch.arange(len(v)) // rank)


def everything_on(sites: tuple[Site, ...], pieces: dict[str, Pieces]) -> Masks:
    return {s.path: [torch.ones(pieces[s.path].n, dtype=s.dtype)] * s.n_calls for s in sites}


def relative_error(found: Any, expected: Any) -> float:
    found, expected = output_tensor(found).double(), output_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_is_a_site_or_listed_by_name(name: str):
    target = case(name)

    sites, skipped = find_sites(target.model, target.batch)

    assert {site.path: site.n_calls for site in sites} == target.n_calls
    assert {one.name for one in skipped if "vector" not in one.reason} == target.skipped


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_all_masks_on_give_the_targets_output(name: str, dtype: torch.dtype):
    """F1."""
    target = case(name, dtype)
    sites, _ = find_sites(target.model, target.batch)
    pieces = {site.path: exact_pieces(site, seed=i) for i, site in enumerate(sites)}

    output = masked(target.model, target.batch, sites, pieces, everything_on(sites, pieces))

    expected = call(target.model, target.batch)
    assert output_tensor(output).dtype == output_tensor(expected).dtype
    assert output_tensor(output).shape == output_tensor(expected).shape
    assert relative_error(output, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_mask_scales_its_component_of_the_weight(name: str):
    """Masking equals running a copy whose weights are the masked sums: the engine against torch's own modules."""
    target = case(name, torch.float64)
    sites, _ = find_sites(target.model, target.batch)
    pieces = {site.path: exact_pieces(site, seed=i, rank=2) for i, site in enumerate(sites)}
    masks = {
        s.path: torch.rand(pieces[s.path].n, dtype=s.dtype, generator=torch.Generator().manual_seed(3)) for s in sites
    }
    changed = copy.deepcopy(target.model)
    for site in sites:
        parts = [m * pieces[site.path].weight(c) for c, m in enumerate(masks[site.path])]
        put_weight(changed, site, torch.stack(parts).sum(0))

    output = masked(target.model, target.batch, sites, pieces, {s.path: [masks[s.path]] * s.n_calls for s in sites})

    assert relative_error(output, call(changed, target.batch)) < 1e-10


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_every_kind_of_target_is_decomposed_from_end_to_end(name: str, short: None):
    """F1: with all components on, and the remainder, the decomposition is the target."""
    target = case(name)

    decomposition = wd.decompose(target.model, [target.batch], config=QUICK, progress=False)

    keep = {path: torch.ones(parts.pieces.n) for path, parts in decomposition.parts.items()}
    with torch.no_grad():
        output = decomposition.ablate(target.batch, keep, remainder=True)
        assert relative_error(output, call(target.model, target.batch)) < 1e-5
    for site in decomposition.sites:
        assert (site.path or "(model)") in str(decomposition)
    for one in target.skipped:
        assert f"not decomposed: {one} " in str(decomposition)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.filterwarnings("ignore::weightdecomp.NumericalWarning")
def test_every_dtype_is_decomposed_from_end_to_end(dtype: torch.dtype, short: None):
    """F1, with components in float32 for half precision targets."""
    target = case("conv2d", dtype)

    decomposition = wd.decompose(target.model, [target.batch], config=QUICK, progress=False)

    keep = {path: torch.ones(parts.pieces.n) for path, parts in decomposition.parts.items()}
    with torch.no_grad():
        output = decomposition.ablate(target.batch, keep, remainder=True)
        assert output.dtype == dtype
        assert relative_error(output, target.model(target.batch)) < TOLERANCE[dtype]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {parts.pieces.v.dtype for parts in decomposition.parts.values()} == {expected}


@given(
    n_spatial=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    batched=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
@torch.no_grad()
def test_a_convolution_is_a_product_with_its_patches(
    n_spatial: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    mode: str,
    batched: bool,
    bias: bool,
    seed: int,
):
    kind = (nn.Conv1d, nn.Conv2d)[n_spatial - 1]
    layer = kind(2, 3, kernel, stride, padding, dilation, bias=bias, padding_mode=mode, dtype=torch.float64)
    x = drawn(*([2] if batched else []), 2, *(6 + axis for axis in range(n_spatial)), seed=seed)
    ((site,), _) = find_sites(seeded(layer, seed), x)

    rows = site.read((x,), site.matrix())

    assert_close(site.write(rows, (x,)), layer(x), rtol=0, atol=1e-12)
    assert_close(site.vectors((x,)) @ site.matrix().T, rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "transformers Conv1D", "embedding", "bilinear", "conv2d"])
@torch.no_grad()
def test_input_rows_times_the_matrix_are_the_output_rows(name: str):
    target = case(name, torch.float64)
    site = find_sites(target.model, target.batch)[0][0]
    operands = target.batch if isinstance(target.batch, tuple) else (target.batch,)

    rows = site.vectors(operands) @ site.matrix().T

    assert_close(site.write(rows, operands), site.module(*operands), rtol=0, atol=1e-12)
    assert torch.equal(site.as_weight(site.matrix()), site.weight)


def test_sites_keep_the_order_of_the_model():
    layers = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("up", "down")})
    stack = nn.ModuleList([nn.Linear(2, 2) for _ in range(11)])

    def forward(m: Calls, x: Tensor) -> Tensor:
        for layer in (*m.stack, *m.layers.values()):
            x = layer(x)
        return x

    sites, _ = find_sites(seeded(Calls(forward, stack=stack, layers=layers)), drawn(4, 2).float())

    assert [site.path for site in sites] == [*(f"stack.{i}" for i in range(11)), "layers.up", "layers.down"]


def test_tied_weights_are_two_sites():
    target = case("tied embedding and head")

    sites, _ = find_sites(target.model, target.batch)

    assert sites[0].weight is sites[1].weight
    assert_close(sites[0].matrix(), sites[1].matrix().T)


def test_a_weight_that_is_also_used_outside_its_module_says_so():
    model = Calls(lambda m, x: F.linear(m.embed(x), m.embed.weight), embed=nn.Embedding(7, 4))

    sites, skipped = find_sites(seeded(model), ids(7, 8, 3))

    assert [site.path for site in sites] == ["embed"]
    assert [tuple(one) for one in skipped] == [
        ("embed.weight", "is also used by 'linear'; that use stays as in the target")
    ]


def _zero() -> nn.Module:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    return layer


def _empty() -> nn.Module:
    layer = nn.Linear(1, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 0))
    return layer


class _Late(nn.Module):
    """A layer whose module call never happens: the model takes its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight)


@pytest.mark.parametrize(
    "layer, name, reason",
    [
        (_zero(), "layer.weight", "zero everywhere"),
        (Calls(lambda m, x: x + m.e(x[..., :0]), e=_empty()), "layer.e.weight", "no entries"),
        (Calls(lambda m, x: x, idle=nn.Linear(4, 4)), "layer.idle.weight", "is not used in a call of its module"),
        (_Late(), "layer.inner.weight", "used by 'linear' outside a call of its module"),
        (Calls(lambda m, x: x + m.a(x) + m.a(x[:1]), a=nn.Linear(4, 4)), "layer.a.weight", "several input shapes"),
        (Calls(lambda m, x: x @ m.p, p=nn.Parameter(torch.ones(4, 4))), "layer.p", "outside a module call"),
        (Calls(lambda m, x: x, p=nn.Parameter(torch.ones(4, 4))), "layer.p", "in no module call"),
        (
            Calls(lambda m, x: x + m.e(torch.zeros(len(x), dtype=torch.long)), e=nn.Embedding(3, 4, max_norm=1.0)),
            "layer.e.weight",
            "max_norm",
        ),
        (
            Calls(lambda m, x: x + m.e(torch.zeros(len(x), dtype=torch.long)), e=nn.Embedding(8193, 4)),
            "layer.e.weight",
            "rows of 8,193 numbers",
        ),
        (
            nn.Sequential(nn.Unflatten(1, (4, 1)), nn.ConvTranspose1d(4, 4, 1), nn.Flatten()),
            "layer.1.weight",
            "outside",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_decomposed_is_listed_with_the_reason(layer: nn.Module, name: str, reason: str):
    model = Calls(lambda m, x: m.read(m.layer(x)), layer=layer, read=nn.Linear(4, 2)).eval()

    sites, skipped = find_sites(model, drawn(8, 4).float())

    assert [site.path for site in sites] == ["read"]
    assert reason in {one.name: one.reason for one in skipped}[name]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_computes_is_listed():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)).eval()

    sites, skipped = find_sites(model, drawn(8, 4).float())

    assert [site.path for site in sites] == ["1"]
    assert "remove it (torch.nn.utils.remove_weight_norm)" in {one.name: one.reason for one in skipped}["0.weight"]


@pytest.mark.parametrize(
    "parametrized",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ],
)
def test_a_parametrized_weight_is_replaced_in_the_copy_alone(parametrized: Any):
    model = nn.Sequential(parametrized(nn.Linear(4, 3)), nn.Linear(3, 2)).eval()
    ((site, _), skipped) = find_sites(model, drawn(8, 4).float())
    before = site.matrix()
    other = copy.deepcopy(model)

    put_weight(other, site, 2 * before)

    assert torch.equal(other[0].weight, 2 * before)
    assert torch.equal(model[0].weight, before)
    assert {one.name for one in skipped} == {"0.bias", "1.bias"}


@torch.no_grad()
def test_the_fused_encoder_layer_is_decomposed_as_its_modules():
    """In eval mode torch runs a fused kernel that never calls the inner modules, unless it is kept from it."""
    target = case("encoder layer")
    fused = target.model(target.batch)

    sites, _ = find_sites(target.model, target.batch)

    pieces = {site.path: exact_pieces(site, seed=i) for i, site in enumerate(sites)}
    output = masked(target.model, target.batch, sites, pieces, everything_on(sites, pieces))
    assert_close(output, fused)
    assert torch.backends.mha.get_fastpath_enabled()


def test_patterns_choose_sites_and_list_the_others():
    model = mlp(widths=(4, 4, 4, 3))

    sites, skipped = find_sites(model, drawn(8, 4).float(), ["[02]", "2"])

    assert [site.path for site in sites] == ["0", "2"]
    assert ("4.weight", "matches none of the given patterns in sites=") in [tuple(one) for one in skipped]


def test_a_pattern_that_matches_nothing_names_the_nearest_paths():
    model = Calls(lambda m, x: m.down(m.up(x)), up=nn.Linear(4, 4), down=nn.Linear(4, 4)).eval()

    with pytest.raises(
        ValueError, match=r"sites: no decomposable module at 'upp'; did you mean one of \['up', 'down'\]"
    ):
        find_sites(model, drawn(8, 4).float(), ["upp"])


def test_a_string_in_place_of_patterns_is_refused():
    with pytest.raises(TypeError, match=r"sites must be a list of patterns, .* write sites=\['0'\]"):
        find_sites(mlp(), drawn(8, 5).float(), "0")


def test_a_model_without_sites_says_why():
    target = case("grouped convolution")

    with pytest.raises(ValueError, match="no weight matrix to decompose: weight belongs to .* groups=2; .* per group"):
        find_sites(target.model[0], target.batch)


def test_looking_for_sites_leaves_no_hook_even_when_the_model_fails():
    def forward(m: Calls, x: Tensor) -> Tensor:
        raise KeyboardInterrupt if m.a(x) is not None else ValueError

    model = Calls(forward, a=nn.Linear(4, 4)).eval()

    with pytest.raises(KeyboardInterrupt):
        find_sites(model, drawn(8, 4).float())

    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class Scaled(nn.Embedding):
    """A lookup times a constant, as transformers writes it."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Shifted(nn.Linear):
    """Something else than a matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).exp()


class Renamed(nn.Linear):
    """The same product by another forward."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


def test_a_scaled_embedding_is_a_site_with_its_scale():
    model, x = seeded(nn.Sequential(Scaled(7, 4), nn.Linear(4, 3))).double(), ids(7, 6, 5)
    sites, _ = find_sites(model, x)

    rows = sites[0].write(sites[0].read((x,), sites[0].matrix()), (x,))

    assert_close(rows, model.get_submodule("0")(x), rtol=0, atol=1e-12)
    assert_close(sites[0].as_weight(sites[0].matrix()), sites[0].weight, rtol=1e-12, atol=0)


def test_a_module_whose_own_forward_is_no_matrix_product_is_skipped_with_the_reason():
    model = seeded(nn.Sequential(Shifted(4, 4), Renamed(4, 3))).double()

    sites, skipped = find_sites(model, drawn(6, 4))

    assert [site.path for site in sites] == ["1"]
    assert "is not all that the forward of its Shifted applies" in next(
        s.reason for s in skipped if s.name == "0.weight"
    )


@pytest.mark.parametrize("rows", [(5,), (1, 5)])
def test_a_table_that_is_read_once_for_all_inputs_is_skipped_with_the_reason(rows: tuple[int, ...]):
    def forward(m: Calls, x: Tensor) -> Tensor:
        return m.read(m.embed(x) + m.place(torch.arange(5).reshape(rows)))

    parts = {"embed": nn.Embedding(7, 4), "place": nn.Embedding(5, 4), "read": nn.Linear(4, 3)}
    model = seeded(Calls(forward, **parts)).double()

    sites, skipped = find_sites(model, ids(7, 6, 5))

    assert [site.path for site in sites] == ["embed", "read"]
    assert "the same rows for all inputs together" in next(s.reason for s in skipped if s.name == "place.weight")
