"""Triton kernels of paged attention, for any GPU that Triton compiles for.

The cache of one layer is [2 (K, V), num_blocks, block_size, num_kv_heads, head_dim], contiguous: a slot is
`block * block_size + offset`, its K of all heads lie together, TOKEN_STRIDE elements from those of the next slot.

Attention is FlashAttention's online softmax (Dao et al. 2022) over tiles of the context that are gathered by block table.
A tile of queries has a row for each (token, head) that shares a KV head, so K and V are read once for the whole group.
Memory behind a context is never loaded: it may hold NaN, which no mask on scores would remove.
"""

import triton
import triton.language as tl

# Arguments that change from step to step: Triton would compile again for 1, and for multiples of 16.
BATCH_SIZES = ("table_stride", "num_seqs", "max_parts")


@triton.jit
def store_kvcache_kernel(
    k_ptr,  # [num_tokens, num_kv_heads * head_dim], rows k_stride apart
    v_ptr,
    cache_ptr,
    slot_mapping_ptr,  # int64 [num_tokens]; -1: nowhere
    k_stride,
    v_stride,
    plane_stride,  # from K to V
    TOKEN_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # TOKEN_STRIDE, rounded up to a power of two
):
    """One program a token: copy its K and V to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot >= 0:
        element = tl.arange(0, BLOCK)
        mask = element < TOKEN_STRIDE
        target = cache_ptr + slot * TOKEN_STRIDE + element
        tl.store(target, tl.load(k_ptr + token * k_stride + element, mask=mask), mask=mask)
        tl.store(target + plane_stride, tl.load(v_ptr + token * v_stride + element, mask=mask), mask=mask)


@triton.jit
def _load_queries(
    q_ptr, first_token, row, is_row, kv_head, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The tile of queries, and the offsets of its elements in q and out; row r is token r // GROUP, head r % GROUP."""
    dim = tl.arange(0, BLOCK_D)
    token = first_token.to(tl.int64) + row // GROUP
    head = kv_head * GROUP + row % GROUP
    offsets = (token * tl.num_programs(1) * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
    mask = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(q_ptr + offsets, mask=mask, other=0.0), offsets, mask


@triton.jit
def _attend_range(
    q,  # [BLOCK_M, BLOCK_D]
    last_visible,  # [BLOCK_M]: position of the last token that each row sees
    begin,
    end,  # positions begin, begin + 1, ..., end - 1, all of them written
    block_table_ptr,
    k_ptr,  # of this KV head
    v_ptr,
    scale,  # of scores, times log2(e): powers of two are what the hardware has
    BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over a range of the context: row maximum, row sum, and the sum of V weighted by both, in float32."""
    dim = tl.arange(0, q.shape[1])
    row_max = tl.full([q.shape[0]], float("-inf"), tl.float32)
    row_sum = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    for first in range(begin, end, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        inside = position < end
        block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offsets = (block * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * TOKEN_STRIDE + dim[None, :]
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = inside[None, :] & (position[None, :] <= last_visible[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that sees nothing yet: no inf - inf
        weights = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(row_max - shift)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        acc = acc * correction[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit
def _first_tile(seq, cu_seqlens_q_ptr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a sequence's tiles begin among those of the batch.

    It has (floor of the rows up to its end) - (floor of those up to its begin) + 1 of them: at least as many as it needs, so
    that nobody has to count the tiles of those before it.
    """
    return tl.load(cu_seqlens_q_ptr + seq) * GROUP // BLOCK_M + seq


@triton.jit
def _find_sequence(tile, num_seqs, cu_seqlens_q_ptr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The last sequence whose tiles do not begin behind `tile`."""
    seq, behind = 0, num_seqs
    while behind - seq > 1:
        middle = (seq + behind) // 2
        is_behind = _first_tile(middle, cu_seqlens_q_ptr, GROUP, BLOCK_M) > tile
        seq, behind = tl.where(is_behind, seq, middle), tl.where(is_behind, middle, behind)
    return seq


@triton.jit(do_not_specialize=BATCH_SIZES)
def prefill_kernel(
    q_ptr,  # [num_tokens, num_heads, head_dim]
    out_ptr,
    cache_ptr,
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1]
    context_lens_ptr,  # int32 [num_seqs]
    block_tables_ptr,  # int32 [num_seqs, table_stride]
    table_stride,
    plane_stride,
    num_seqs,
    scale,
    min_queries,  # of a sequence; those with fewer are left alone
    GROUP: tl.constexpr,  # query heads that share a KV head
    BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a (tile of queries, KV head); the tiles of all sequences lie one after the other.

    A row's sums are over the same tiles of the context in the same order whatever the other rows of its tile see: what is
    masked adds 0. It is 0 in a padding row, whose context is empty.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    seq = _find_sequence(tile, num_seqs, cu_seqlens_q_ptr, GROUP, BLOCK_M)
    tile -= _first_tile(seq, cu_seqlens_q_ptr, GROUP, BLOCK_M)
    first_token = tl.load(cu_seqlens_q_ptr + seq)
    num_rows = (tl.load(cu_seqlens_q_ptr + seq + 1) - first_token) * GROUP
    if (num_rows >= min_queries * GROUP) & (tile * BLOCK_M < num_rows):
        context_len = tl.load(context_lens_ptr + seq)
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        q, offsets, mask = _load_queries(q_ptr, first_token, row, row < num_rows, kv_head, GROUP, HEAD_DIM, BLOCK_D)
        first_position = context_len - num_rows // GROUP
        end = tl.minimum(first_position + ((tile + 1) * BLOCK_M - 1) // GROUP + 1, context_len)
        k_ptr = cache_ptr + kv_head * HEAD_DIM
        _, row_sum, acc = _attend_range(
            q,
            first_position + row // GROUP,
            0,
            end,
            block_tables_ptr + seq.to(tl.int64) * table_stride,
            k_ptr,
            k_ptr + plane_stride,
            scale,
            BLOCK_SIZE,
            TOKEN_STRIDE,
            HEAD_DIM,
            BLOCK_N,
        )
        out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def decode_kernel(
    q_ptr,
    partial_ptr,  # float32 [num_seqs, num_heads, max_parts, head_dim]
    lse_ptr,  # float32 [num_seqs, num_heads, max_parts]: log2 of each part's sum of exponentials
    cache_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    block_tables_ptr,
    table_stride,
    plane_stride,
    max_parts,
    scale,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,  # GROUP, rounded up to what a matrix product takes
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a (sequence, KV head, split): every num_splits-th part of the context, each part on its own.

    Parts are PART tokens whatever the number of splits, so a sequence's result does not depend on how busy the batch is.
    """
    seq, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_token = tl.load(cu_seqlens_q_ptr + seq)
    num_parts = tl.cdiv(tl.load(context_lens_ptr + seq), PART)  # 0 in a padding row
    if tl.load(cu_seqlens_q_ptr + seq + 1) - first_token == 1:
        row = tl.arange(0, BLOCK_M)
        for part in range(tl.program_id(2), num_parts, tl.num_programs(2)):
            context_len = tl.load(context_lens_ptr + seq)
            q, _, mask = _load_queries(q_ptr, first_token, row, row < GROUP, kv_head, GROUP, HEAD_DIM, BLOCK_D)
            k_ptr = cache_ptr + kv_head * HEAD_DIM
            row_max, row_sum, acc = _attend_range(
                q,
                tl.zeros([BLOCK_M], tl.int32) + context_len,  # all of it
                part * PART,
                tl.minimum((part + 1) * PART, context_len),
                block_tables_ptr + seq * table_stride,
                k_ptr,
                k_ptr + plane_stride,
                scale,
                BLOCK_SIZE,
                TOKEN_STRIDE,
                HEAD_DIM,
                BLOCK_N,
            )
            head = kv_head * GROUP + row
            index = (seq * tl.num_programs(1) * GROUP + head) * max_parts + part
            tl.store(lse_ptr + index, row_max + tl.log2(row_sum), mask=row < GROUP)
            target = partial_ptr + index[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :]
            tl.store(target, acc / row_sum[:, None], mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def merge_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    max_parts,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a (sequence, head): the parts' results, weighted by their sums of exponentials; 0 in a padding row."""
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(cu_seqlens_q_ptr + seq).to(tl.int64)
    num_parts = tl.cdiv(tl.load(context_lens_ptr + seq), PART)
    if tl.load(cu_seqlens_q_ptr + seq + 1) - token == 1:
        dim = tl.arange(0, BLOCK_D)
        first = (seq * tl.num_programs(1) + head) * max_parts
        largest = tl.max(tl.full([1], float("-inf"), tl.float32))
        total = tl.sum(tl.zeros([1], tl.float32))
        acc = tl.zeros([BLOCK_D], tl.float32)
        for part in range(0, num_parts):
            lse = tl.load(lse_ptr + first + part)
            new_largest = tl.maximum(largest, lse)
            correction, weight = tl.exp2(largest - new_largest), tl.exp2(lse - new_largest)
            partial = tl.load(partial_ptr + (first + part) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
            acc = acc * correction + partial * weight
            total = total * correction + weight
            largest = new_largest
        out = acc / tl.where(num_parts > 0, total, 1.0)
        target = out_ptr + (token * tl.num_programs(1) + head) * HEAD_DIM + dim
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
