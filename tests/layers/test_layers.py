"""The layers one by one, and the forward context that the attention layer reads."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RopeConfig, RotaryEmbedding
from nanovllm.utils.context import AttentionMetadata, ForwardContext, forward_context, get_forward_context

EPS = 1e-5


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def make_norm(size: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(size, EPS).to(dtype)
    norm.weight.data.copy_(randn(size) + 1)
    return norm.requires_grad_(False)


# ---- RMSNorm ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_is_the_formula(dtype: torch.dtype) -> None:
    norm, x = make_norm(64, dtype), 30 * randn(3, 5, 64, dtype=dtype)
    x64 = x.double()
    expected = norm.weight.double() * x64 / (x64.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert norm(x).dtype == dtype
    # In 16 bits the normed value is rounded before it is scaled, then the product: one eps in all.
    torch.testing.assert_close(norm(x).double(), expected, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6)


def test_rms_norm_of_large_float16_values_does_not_overflow() -> None:
    norm = make_norm(64, torch.float16)
    assert norm(torch.full((64,), 6e4, dtype=torch.float16)).isfinite().all()


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(make_norm(8, torch.float32)(torch.zeros(2, 8)), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_does_not_change_its_inputs(dtype: torch.dtype) -> None:
    # float32 is the trap: there `.float()` copies nothing, and arithmetic in place would change the residual.
    norm, x, residual = make_norm(64, dtype), randn(4, 64, dtype=dtype), randn(5, 64, dtype=dtype)[:4]
    x_before, residual_before, weight_before = x.clone(), residual.clone(), norm.weight.clone()
    norm(x)
    normed, total = norm.add_and_norm(x, residual)
    assert torch.equal(x, x_before)
    assert torch.equal(residual, residual_before)
    assert torch.equal(norm.weight, weight_before)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm(x + residual))


# ---- activation, rotary embedding ----


def test_silu_and_mul() -> None:
    gate, up = randn(3, 8), randn(4, 8)[:3]
    before = torch.cat((gate, up), dim=-1)
    x = before.clone()
    torch.testing.assert_close(SiluAndMul()(x), F.silu(gate) * up)
    assert torch.equal(x, before)


def make_rotary(head_dim: int = 16, num_positions: int = 64) -> RotaryEmbedding:
    return RotaryEmbedding(RopeConfig("default", 10000.0, {}, num_positions), head_dim, num_positions)


def test_rotary_embedding_rotates_pairs_by_position_over_wavelength() -> None:
    positions, q, k = torch.tensor([0, 5, 63]), randn(3, 2, 16), randn(3, 1, 16)
    q_before, k_before = q.clone(), k.clone()
    for x, rotated in zip((q, k), make_rotary()(positions, q, k), strict=True):
        # As complex numbers: the two halves of a head are the real and the imaginary parts.
        numbers = torch.complex(x[..., :8].double(), x[..., 8:].double())
        angles = positions[:, None, None] * 10000.0 ** (-torch.arange(8).double() / 8)
        expected = numbers * torch.polar(torch.ones_like(angles), angles)
        torch.testing.assert_close(rotated.double(), torch.cat((expected.real, expected.imag), -1), rtol=0, atol=1e-5)
    assert torch.equal(q, q_before)
    assert torch.equal(k, k_before)


@pytest.mark.parametrize("truncate", [False, True])
def test_yarn_ramps_between_the_dimensions_that_turn_fast_and_slow(truncate: bool) -> None:
    # Not a part of the parity with Transformers, whose older versions do not know `truncate`.
    original, theta, factor, size = 64, 10000.0, 4.0, 64
    options = {"factor": factor, "original_max_position_embeddings": original, "beta_fast": 4.0, "truncate": truncate}
    table = RotaryEmbedding(RopeConfig("yarn", theta, options, 256), size, 2).cos_sin[1, 0].double()
    # The dimension d whose angle turns `beta` times over the original context: original * theta ** (-2d / size) = 2 pi beta
    fast, slow = (size / 2 * math.log(original / (2 * math.pi * beta), theta) for beta in (4.0, 1.0))
    low, high = (math.floor(fast), math.ceil(slow)) if truncate else (fast, slow)
    ramp = ((torch.arange(size // 2).double() - low) / (high - low)).clamp(0, 1)
    frequencies = theta ** (-torch.arange(size // 2).double() / (size / 2)) * (1 - ramp + ramp / factor)
    magnitude = 0.1 * math.log(factor) + 1
    expected = torch.cat((frequencies.cos(), frequencies.sin())) * magnitude  # the angles at position 1
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)


def test_rotary_embedding_keeps_the_dtype() -> None:
    q, k = make_rotary()(torch.tensor([1, 2]), randn(2, 4, 16, dtype=torch.bfloat16), randn(2, 2, 16, dtype=torch.bfloat16))
    assert q.dtype == k.dtype == torch.bfloat16


def test_rotary_table_is_real_and_float32_while_parameters_are_on_meta() -> None:
    with torch.device("meta"):
        rotary = make_rotary()
    assert rotary.cos_sin.device.type == "cpu"
    assert rotary.cos_sin.dtype == torch.float32
    assert torch.equal(rotary.cos_sin, make_rotary().cos_sin)
    assert not rotary.state_dict(), "the table is no parameter: no checkpoint has it"


# ---- the forward context ----


class RecordingBackend:
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Tensor]] = []

    def store(self, k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        self.calls.append(("store", cache))

    def attend(self, q: Tensor, cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.calls.append(("attend", cache))
        return q + 1


def make_context() -> tuple[ForwardContext, RecordingBackend]:
    backend = RecordingBackend()
    one = torch.ones(1, dtype=torch.int32)
    metadata = AttentionMetadata(torch.tensor([0, 1]).int(), one, one[:, None], one.long(), 1, 1)
    return ForwardContext(metadata, cast(AttentionBackend, backend), [torch.zeros(1), torch.ones(1)]), backend


def test_forward_context_is_readable_inside_only() -> None:
    context, _ = make_context()
    with pytest.raises(RuntimeError, match="outside of a forward context"):
        get_forward_context()
    with forward_context(context):
        assert get_forward_context() is context
    with pytest.raises(RuntimeError, match="outside of a forward context"):
        get_forward_context()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_forward_context_is_left_on_exceptions(error: type[BaseException]) -> None:
    context, _ = make_context()
    with pytest.raises(error), forward_context(context):
        raise error
    with pytest.raises(RuntimeError, match="outside of a forward context"):
        get_forward_context()


def test_forward_contexts_nest() -> None:
    (outer, _), (inner, _) = make_context(), make_context()
    with forward_context(outer):
        with forward_context(inner):
            assert get_forward_context() is inner
        assert get_forward_context() is outer


def test_forward_context_of_one_thread_is_not_seen_in_another() -> None:
    context, _ = make_context()
    with (
        forward_context(context),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(RuntimeError, match="outside of a forward context"),
    ):
        pool.submit(get_forward_context).result()


def test_attention_layer_stores_then_attends_in_the_cache_of_its_layer() -> None:
    context, backend = make_context()
    q = randn(1, 2, 8)
    with forward_context(context):
        out = Attention(layer_index=1)(q, q, q)
    assert torch.equal(out, q + 1)
    assert [name for name, _ in backend.calls] == ["store", "attend"]
    assert all(cache is context.kv_cache[1] for _, cache in backend.calls)


def test_attention_layer_outside_of_a_forward_context_is_an_error() -> None:
    q = randn(1, 2, 8)
    with pytest.raises(RuntimeError, match="outside of a forward context"):
        Attention(layer_index=0)(q, q, q)
