"""Triton for the small layers between the matrix products, on a GPU; the CPU's counterpart is cpu_layers.py.

Each reads and writes memory once, in one launch, and rounds where the plain layer does: after the sum, the norm, and the
activation. A row is the work of one program, whatever the batch. Heads are normed and rotated together, q and k at once.

They take the plain layers' places in a model, one by one, so that models and plain layers know nothing of them; the plain
layers remain what they are tested against.
"""

import triton
import triton.language as tl
from torch import Tensor, nn

from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import HeadNorms, RotaryEmbedding
from nanovllm.utils.methods import replace_methods

COLUMNS = 1024  # of an activation that one program computes


def fuse_layers(model: nn.Module) -> None:
    """Let the small layers of `model` run as Triton kernels.

    Args:
        model: changed in place; other models are not.
    """
    replace_methods(model, SiluAndMul, forward=silu_and_mul)
    replace_methods(model, RMSNorm, forward=rms_norm, add_and_norm=add_and_norm)
    replace_methods(model, RotaryEmbedding, forward=norm_and_rotate)


def silu_and_mul(self: SiluAndMul, x: Tensor) -> Tensor:
    """See `SiluAndMul.forward`."""
    num_tokens, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(num_tokens, size)
    silu_and_mul_kernel[(num_tokens, triton.cdiv(size, COLUMNS))](x, out, x.stride(0), SIZE=size, BLOCK=COLUMNS)
    return out


def rms_norm(self: RMSNorm, x: Tensor) -> Tensor:
    """See `RMSNorm.forward`."""
    return _norm(self, x, None)[0]


def add_and_norm(self: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """See `RMSNorm.add_and_norm`."""
    return _norm(self, x, residual)


def _norm(layer: RMSNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out, total = rows.new_empty(rows.shape), rows
    if residual is not None:
        residual, total = residual.reshape(-1, size).contiguous(), rows.new_empty(rows.shape)
    rms_norm_kernel[(len(rows),)](
        rows,
        rows if residual is None else residual,
        layer.weight,
        out,
        total,
        rows.stride(0),
        layer.eps,
        ADD=residual is not None,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
    )
    return out.view(x.shape), total.view(x.shape)


def norm_and_rotate(
    self: RotaryEmbedding, positions: Tensor, q: Tensor, k: Tensor, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor]:
    """See `RotaryEmbedding.forward`."""
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    q_rows, k_rows = q.flatten(1), k.flatten(1)  # a view of part of a merged projection stays one
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    rotate_kernel[(num_tokens,)](
        q_rows,
        k_rows,
        q_out,
        k_out,
        positions,
        self.cos_sin,
        q if norms is None else norms[0].weight,
        k if norms is None else norms[1].weight,
        q_rows.stride(0),
        k_rows.stride(0),
        0.0 if norms is None else norms[0].eps,
        NORM=norms is not None,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        BLOCK_KV_HEADS=triton.next_power_of_2(num_kv_heads),
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
    )
    return q_out, k_out


@triton.jit
def silu_and_mul_kernel(x_ptr, out_ptr, x_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program a (token, part of its columns): x [num_tokens, 2 * SIZE], rows x_stride apart -> [num_tokens, SIZE]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(x_ptr + token * x_stride + column, mask=mask)
    up = tl.load(x_ptr + token * x_stride + SIZE + column, mask=mask).to(tl.float32)
    gate32 = gate.to(tl.float32)
    activated = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + token * SIZE + column, (activated * up).to(gate.dtype), mask=mask)


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [num_rows, SIZE], rows x_stride apart
    residual_ptr,  # [num_rows, SIZE]
    weight_ptr,
    out_ptr,  # [num_rows, SIZE]
    total_ptr,  # [num_rows, SIZE]: x + residual, if they are added
    x_stride,
    eps,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * SIZE + column, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * SIZE + column, x, mask=mask)
    x32 = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    normed = (x32 * tl.rsqrt(tl.sum(x32 * x32) / SIZE + eps)).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, (weight * normed).to(x.dtype), mask=mask)


@triton.jit
def rotate_kernel(
    q_ptr,  # [num_tokens, NUM_HEADS * 2 * HALF], rows q_stride apart
    k_ptr,
    q_out_ptr,  # the same, without gaps
    k_out_ptr,
    positions_ptr,  # int64 [num_tokens]
    cos_sin_ptr,  # float32 [num_positions, 2 * HALF]
    q_weight_ptr,
    k_weight_ptr,
    q_stride,
    k_stride,
    eps,
    NORM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,  # each rounded up to a power of two
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program a token: all its heads of q and k."""
    token = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_HALF)
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * 2 * HALF + dim
    cos = tl.load(angle_ptr, mask=dim < HALF, other=0.0)[None, :]
    sin = tl.load(angle_ptr + HALF, mask=dim < HALF, other=0.0)[None, :]
    q_out_ptr += token * NUM_HEADS * 2 * HALF
    k_out_ptr += token * NUM_KV_HEADS * 2 * HALF
    _rotate_heads(q_ptr + token * q_stride, q_out_ptr, q_weight_ptr, cos, sin, eps, NORM, NUM_HEADS, HALF, BLOCK_HEADS)
    _rotate_heads(k_ptr + token * k_stride, k_out_ptr, k_weight_ptr, cos, sin, eps, NORM, NUM_KV_HEADS, HALF, BLOCK_KV_HEADS)


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    weight_ptr,
    cos,  # [1, BLOCK_HALF]
    sin,
    eps,
    NORM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """The heads of one token: both halves of each, normed before they are rotated if they are to be."""
    head, dim = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, cos.shape[1])[None, :]
    mask = (head < NUM_HEADS) & (dim < HALF)
    offsets = head * (2 * HALF) + dim
    first = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    dtype = first.dtype
    x1, x2 = first.to(tl.float32), tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]
        weight1 = tl.load(weight_ptr + dim, mask=dim < HALF, other=0.0).to(tl.float32)
        weight2 = tl.load(weight_ptr + dim + HALF, mask=dim < HALF, other=0.0).to(tl.float32)
        x1 = (weight1 * (x1 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        x2 = (weight2 * (x2 * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(out_ptr + offsets, (x1 * cos - x2 * sin).to(dtype), mask=mask)
    tl.store(out_ptr + offsets + HALF, (x2 * cos + x1 * sin).to(dtype), mask=mask)
