"""The small layers in C++ against the plain ones, for the machine's instruction set and for none in particular."""

from typing import Any

import pytest
import torch
from cpu_builds import FLAGS
from layer_parity import check_norms, norm_ulps, randn
from torch import Tensor, nn

from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.cpu_layers import fuse_layers
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RopeConfig, RotaryEmbedding
from nanovllm.utils.cpu_build import load_library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [2, 14, 16, 34, 576, 1000]  # of less than a vector, of whole ones, of some and a rest
NUM_ROWS = [0, 1, 7, 100]


@pytest.fixture(scope="module", params=FLAGS)
def kernels(request: pytest.FixtureRequest) -> Any:
    return load_library(FLAGS[request.param])


def make_norm(size: int, dtype: torch.dtype, kernels: Any = None) -> RMSNorm:
    norm = RMSNorm(size, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(randn(size, dtype=dtype, seed=1))
    return fused(norm, kernels)


def fused(layer: Any, kernels: Any) -> Any:
    if kernels is not None:
        fuse_layers(layer, kernels)
    return layer


def assert_near(result: Tensor, plain: Tensor, ulps: int) -> None:
    """Within so many units in the last place of the dtype."""
    assert (result.dtype, result.shape) == (plain.dtype, plain.shape)
    assert result.is_contiguous()
    eps = torch.finfo(plain.dtype).eps
    torch.testing.assert_close(result, plain, rtol=ulps * eps, atol=1e-30 if plain.dtype != torch.float16 else 1e-7)


@pytest.mark.usefixtures("one_thread_and_three")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_norms(kernels: Any, dtype: torch.dtype) -> None:
    for size in SIZES:
        plain, norm = make_norm(size, dtype), make_norm(size, dtype, kernels)
        for num_rows in NUM_ROWS:
            check_norms(norm, plain, num_rows, dtype, assert_near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_norms_of_heads_in_a_merged_projection(kernels: Any, dtype: torch.dtype) -> None:
    plain, norm = make_norm(32, dtype), make_norm(32, dtype, kernels)
    merged = randn(9, 5 * 32 + 16, dtype=dtype)
    heads = merged[:, 8:136].unflatten(-1, (4, 32))
    assert_near(norm(heads), plain(heads), norm_ulps(dtype, 32))


@torch.inference_mode()
def test_norms_of_extremes(kernels: Any) -> None:
    large = torch.full((2, 64), 6e4, dtype=torch.float16)
    assert make_norm(64, torch.float16, kernels)(large).isfinite().all()
    norm = make_norm(64, torch.float32, kernels)
    assert torch.equal(norm(torch.zeros(2, 64)), torch.zeros(2, 64))
    x = randn(3, 64, dtype=torch.float32)
    x[1, 5] = torch.nan
    assert norm(x).isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.usefixtures("one_thread_and_three")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_silu_and_mul(kernels: Any, dtype: torch.dtype) -> None:
    plain, activation = SiluAndMul(), fused(SiluAndMul(), kernels)
    for size in SIZES:
        for num_rows in NUM_ROWS:
            x = randn(num_rows, 2 * size, dtype=dtype)
            # In 16 bits: the activation moves over a rounding boundary now and then, then it is multiplied.
            assert_near(activation(x), plain(x), 8 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_silu_over_its_range(kernels: Any, dtype: torch.dtype) -> None:
    values = torch.cat([torch.linspace(-86, 90, 6001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 6e4, -6e4])]).to(dtype)
    values = torch.cat([values, torch.tensor([torch.nan, torch.inf]).to(dtype)])
    x = torch.stack([values, torch.ones_like(values)], dim=1)
    result, exact = fused(SiluAndMul(), kernels)(x), nn.functional.silu(values.double())
    tiny = torch.finfo(dtype).tiny
    eps = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(result[:, 0].double(), exact, rtol=eps, atol=tiny, equal_nan=True)


@pytest.mark.usefixtures("one_thread_and_three")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_rotation_is_the_plain_one_bit_for_bit(kernels: Any, dtype: torch.dtype) -> None:
    for head_dim, num_heads, num_kv_heads in ((64, 9, 3), (16, 1, 1), (6, 4, 2), (128, 16, 8), (80, 3, 3)):
        config = RopeConfig("default", 10000.0, {}, 500)
        plain = RotaryEmbedding(config, head_dim, 500)
        rotary = fused(RotaryEmbedding(config, head_dim, 500), kernels)
        for num_tokens in NUM_ROWS:
            positions = torch.randint(0, 500, (num_tokens,), generator=torch.Generator().manual_seed(0))
            merged = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
            sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
            q, k, _ = (x.unflatten(-1, (-1, head_dim)) for x in merged.split(sizes, dim=-1))
            for result, expected in zip(rotary(positions, q, k), plain(positions, q, k), strict=True):
                assert result.is_contiguous()
                assert torch.equal(result, expected)


@pytest.mark.parametrize("position", [-1, 20])
def test_a_position_beyond_the_table_is_an_error(kernels: Any, position: int) -> None:
    rotary = fused(RotaryEmbedding(RopeConfig("default", 10000.0, {}, 20), 16, 20), kernels)
    heads = randn(1, 2, 16, dtype=torch.float32)
    with pytest.raises(IndexError, match=f"position {position} is not one of the table's 20"):
        rotary(torch.tensor([position]), heads, heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_a_row_is_the_same_bit_for_bit_in_any_batch(kernels: Any, dtype: torch.dtype) -> None:
    norm, activation = make_norm(576, dtype, kernels), fused(SiluAndMul(), kernels)
    x, residual, gate_up = (randn(200, size, dtype=dtype, seed=size) for size in (576, 576, 1152))
    together = norm(x), *norm.add_and_norm(x, residual), activation(gate_up)
    for row in (0, 3, 199):
        one = slice(row, row + 1)
        alone = norm(x[one]), *norm.add_and_norm(x[one], residual[one]), activation(gate_up[one])
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))
