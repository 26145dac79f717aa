"""The small layers as Triton kernels, in Triton's interpreter, against the plain ones."""

from typing import Any

import pytest
import torch
from layer_parity import check_norms, norm_ulps, randn
from torch import Tensor

from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import HeadNorms, RopeConfig, RotaryEmbedding

DTYPES = [torch.float32, torch.float16]
SIZES = [2, 48, 576, 1100]  # the last is more than an activation's program computes
NUM_ROWS = [1, 7]


def fused(layer: Any) -> Any:
    from nanovllm.layers.triton_layers import fuse_layers

    fuse_layers(layer)
    return layer


def make_norm(size: int, dtype: torch.dtype, seed: int = 1) -> RMSNorm:
    norm = RMSNorm(size, 1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(randn(size, dtype=dtype, seed=seed))
    return norm


def assert_near(result: Tensor, plain: Tensor, ulps: int) -> None:
    """Within so many units in the last place of the dtype, of itself or of 1 where it is a difference."""
    assert (result.dtype, result.shape) == (plain.dtype, plain.shape)
    eps = torch.finfo(plain.dtype).eps
    torch.testing.assert_close(result, plain, rtol=ulps * eps, atol=ulps * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_norms(dtype: torch.dtype) -> None:
    for size in SIZES:
        plain, norm = make_norm(size, dtype), fused(make_norm(size, dtype))
        for num_rows in NUM_ROWS:
            check_norms(norm, plain, num_rows, dtype, assert_near)


@torch.inference_mode()
def test_norm_of_heads_in_a_merged_projection() -> None:
    heads = randn(5, 5 * 32 + 16, dtype=torch.float32)[:, 8:136].unflatten(-1, (4, 32))
    assert_near(fused(make_norm(32, torch.float32))(heads), make_norm(32, torch.float32)(heads), 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_silu_and_mul(dtype: torch.dtype) -> None:
    for size in SIZES:
        x = randn(3, 2 * size, dtype=dtype)
        x[0, 0] = 80.0  # and its opposite
        x[1, 0] = -80.0
        assert_near(fused(SiluAndMul())(x), SiluAndMul()(x), 8 if dtype == torch.float32 else 2)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_rotation(dtype: torch.dtype, has_norms: bool) -> None:
    for head_dim, num_heads, num_kv_heads in ((64, 9, 3), (16, 1, 1), (6, 4, 2), (128, 16, 8), (80, 3, 3)):
        config = RopeConfig("default", 10000.0, {}, 500)
        plain, rotary = RotaryEmbedding(config, head_dim, 500), fused(RotaryEmbedding(config, head_dim, 500))
        norms: HeadNorms | None = None
        if has_norms:
            norms = make_norm(head_dim, dtype, seed=3), make_norm(head_dim, dtype, seed=4)
        positions = torch.randint(0, 500, (4,), generator=torch.Generator().manual_seed(0))
        merged = randn(4, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        q, k, _ = (x.unflatten(-1, (-1, head_dim)) for x in merged.split(sizes, dim=-1))
        before = merged.clone()
        for result, expected in zip(rotary(positions, q, k, norms), plain(positions, q, k, norms), strict=True):
            assert result.is_contiguous()
            if has_norms:  # values up to 40 are added after rounding
                assert_near(result, expected, 40 * norm_ulps(dtype, head_dim))
            else:
                assert torch.equal(result, expected)
        assert torch.equal(merged, before)
