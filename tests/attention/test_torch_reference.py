"""The reference backend against a loop over tokens and heads in float64 that knows nothing of blocks."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nanovllm.attention import torch_reference
from nanovllm.attention.backend import AttentionSpec
from nanovllm.attention.torch_reference import TorchReferenceBackend
from nanovllm.utils.context import AttentionMetadata

BEYOND = 2**30  # in a block table, behind a sequence's own blocks: no block has this id


class Batch(NamedTuple):
    """Sequences with everything that was computed before this step, and the step."""

    q: list[Tensor]  # of each sequence, this step: [num_queries, num_heads, head_dim]
    k: list[Tensor]  # of each sequence, from its beginning: [context_len, num_kv_heads, head_dim]
    v: list[Tensor]
    metadata: AttentionMetadata


def make_spec(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(num_heads, num_kv_heads, head_dim, block_size, dtype, torch.device("cpu"))


def make_batch(spec: AttentionSpec, seqlens: list[tuple[int, int]], num_blocks: int, generator: torch.Generator) -> Batch:
    """Random sequences of (context length, queries this step), their blocks scattered over the cache."""

    def random(length: int, heads: int) -> Tensor:
        return torch.randn(length, heads, spec.head_dim, generator=generator).to(spec.dtype)

    blocks = torch.randperm(num_blocks, generator=generator).tolist()
    widest = max(-(-context // spec.block_size) for context, _ in seqlens)
    tables = [[blocks.pop() for _ in range(-(-context // spec.block_size))] for context, _ in seqlens]
    slots = [
        [table[i // spec.block_size] * spec.block_size + i % spec.block_size for i in range(context)]
        for table, (context, _) in zip(tables, seqlens, strict=True)
    ]
    queries = [num_queries for _, num_queries in seqlens]
    return Batch(
        q=[random(num_queries, spec.num_heads) for num_queries in queries],
        k=[random(context, spec.num_kv_heads) for context, _ in seqlens],
        v=[random(context, spec.num_kv_heads) for context, _ in seqlens],
        metadata=AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0).int(),
            context_lens=torch.tensor([context for context, _ in seqlens]).int(),
            block_tables=torch.tensor([table + [BEYOND] * (widest - len(table)) for table in tables]).int(),
            slot_mapping=torch.tensor([s for own, n in zip(slots, queries, strict=True) for s in own[-n:]]),
            max_seqlen_q=max(queries),
            max_context_len=max(context for context, _ in seqlens),
        ),
    )


def fill_cache(backend: TorchReferenceBackend, batch: Batch, num_blocks: int) -> Tensor:
    """A cache with the K and V of each whole context; NaN everywhere else, as if that memory held anything."""
    block_size = backend.spec.block_size
    cache = backend.allocate_cache(num_blocks).fill_(torch.nan)
    for table, k, v in zip(batch.metadata.block_tables.tolist(), batch.k, batch.v, strict=True):
        for position in range(len(k)):
            slot = table[position // block_size] * block_size + position % block_size
            one = slice(position, position + 1)
            backend.store(k[one], v[one], cache, torch.tensor([slot]))
    return cache


def attend_naively(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, one token and one head at a time, in float64."""
    out = torch.empty_like(q, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for index in range(len(q)):
        length = len(k) - len(q) + index + 1
        for head in range(q.shape[1]):
            scores = k[:length, head // group].double() @ q[index, head].double() / q.shape[2] ** 0.5
            out[index, head] = scores.softmax(0) @ v[:length, head // group].double()
    return out


def check(spec: AttentionSpec, seqlens: list[tuple[int, int]], seed: int = 0) -> None:
    """Compare one batch with the loop."""
    num_blocks = 3 + sum(-(-context // spec.block_size) for context, _ in seqlens)
    batch = make_batch(spec, seqlens, num_blocks, torch.Generator().manual_seed(seed))
    backend = TorchReferenceBackend(spec)
    out = backend.attend(torch.cat(batch.q), fill_cache(backend, batch, num_blocks), batch.metadata)
    expected = torch.cat([attend_naively(*one) for one in zip(batch.q, batch.k, batch.v, strict=True)])
    assert out.dtype == spec.dtype
    # Computed in float32 whatever the dtype: a result in 16 bits is rounded once, by half an eps at most.
    eps = torch.finfo(spec.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=max(eps / 2, 1e-5), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 48, 256])
def test_mixed_batches(block_size: int, dtype: torch.dtype) -> None:
    spec = make_spec(num_heads=4, num_kv_heads=2, head_dim=16, block_size=block_size, dtype=dtype)
    # A whole prompt, decodes at, before and after the end of a block, a chunk in the middle, a last chunk, one token.
    check(spec, [(37, 37), (block_size, 1), (block_size - 1, 1), (block_size + 1, 1), (50, 20), (2 * block_size, 3), (1, 1)])


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(4, 4, 64), (4, 2, 80), (9, 3, 64), (14, 2, 64), (8, 1, 128), (3, 3, 24)],  # powers of two and others
)
def test_head_counts_and_sizes(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    check(make_spec(num_heads, num_kv_heads, head_dim, 16, torch.float32), [(20, 20), (33, 1), (18, 5)])


@pytest.mark.parametrize("seed", range(10))
def test_random_batches(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(1, 80, (6,), generator=generator).tolist()
    seqlens = [(n, int(torch.randint(1, n + 1, (), generator=generator)) if i % 2 else 1) for i, n in enumerate(contexts)]
    check(make_spec(4, 2, 16, 16, torch.float32), seqlens, seed)


@pytest.mark.parametrize("num_queries", [6, 7, 8, 14, 15])
def test_long_prompts_are_scored_in_pieces(num_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_reference, "MAX_QUERIES", 7)
    check(make_spec(4, 2, 16, 16, torch.float32), [(30, num_queries), (num_queries, num_queries), (40, 1)])


def test_all_queries_of_a_sequence_in_one_step_or_one_by_one() -> None:
    spec = make_spec(4, 2, 16, 16, torch.float32)
    backend = TorchReferenceBackend(spec)
    whole = make_batch(spec, [(40, 40)], 4, torch.Generator().manual_seed(0))
    cache = fill_cache(backend, whole, 4)
    together = backend.attend(whole.q[0], cache, whole.metadata)
    for index in range(40):
        step = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, 1]).int(),
            context_lens=torch.tensor([index + 1]).int(),
            block_tables=whole.metadata.block_tables,
            slot_mapping=whole.metadata.slot_mapping[index : index + 1],
            max_seqlen_q=1,
            max_context_len=index + 1,
        )
        alone = backend.attend(whole.q[0][index : index + 1], cache, step)
        torch.testing.assert_close(alone[0], together[index])


def test_store_writes_its_slots_and_nothing_else() -> None:
    spec = make_spec(4, 2, 8, 16, torch.float32)
    backend = TorchReferenceBackend(spec)
    cache = backend.allocate_cache(4).fill_(torch.nan)
    k, v = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    # Slot -1 means nowhere; as an index it would be the last slot of the cache.
    backend.store(k, v, cache, torch.tensor([17, -1, 3, 62, -1]))
    slots = cache.flatten(1, 2)
    for token, slot in [(0, 17), (2, 3), (3, 62)]:
        assert torch.equal(slots[0, slot], k[token])
        assert torch.equal(slots[1, slot], v[token])
    written = torch.zeros(64, dtype=torch.bool)
    written[[17, 3, 62]] = True
    assert slots[:, ~written].isnan().all()


def test_attend_leaves_queries_and_cache_as_they_are() -> None:
    spec = make_spec(4, 2, 16, 16, torch.float32)
    backend = TorchReferenceBackend(spec)
    batch = make_batch(spec, [(20, 20), (33, 1)], 6, torch.Generator().manual_seed(0))
    cache, q = fill_cache(backend, batch, 6), torch.cat(batch.q)
    cache_before, q_before = cache.clone(), q.clone()
    backend.attend(q, cache, batch.metadata)
    assert torch.equal(q, q_before)
    assert torch.equal(cache.nan_to_num(7.0), cache_before.nan_to_num(7.0))
