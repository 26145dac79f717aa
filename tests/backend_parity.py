"""Attention backends against the plain one, on random batches; for the tests on the CPU and for gpu_check.py on a GPU."""

import random

import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, AttentionSpec
from nanovllm.attention.torch_reference import TorchReferenceBackend
from nanovllm.utils.context import AttentionMetadata

BEYOND = 2**30  # in a block table, behind a sequence's own blocks: no block has this id
# One rounding of the result, and in 16 bits one of the softmax weights before they meet V.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Seqlens = list[tuple[int, int]]  # (context length, of these the queries of this step) of each sequence


def random_seqlens(rng: random.Random, longest: int, num_seqs: int) -> Seqlens:
    """Whole prompts, chunks behind a cached prefix, and decodes, in any mixture."""
    contexts = [rng.randint(1, longest) for _ in range(num_seqs)]
    return [(context, rng.choice([1, rng.randint(1, context), context])) for context in contexts]


def make_metadata(spec: AttentionSpec, seqlens: Seqlens, num_blocks: int, rng: random.Random) -> AttentionMetadata:
    """A batch whose blocks are scattered over the cache; its slot mapping covers the whole contexts."""
    free = rng.sample(range(num_blocks), num_blocks)
    tables = [[free.pop() for _ in range(-(-context // spec.block_size))] for context, _ in seqlens]
    width = max(map(len, tables)) + rng.randint(0, 2)
    slots = [
        table[position // spec.block_size] * spec.block_size + position % spec.block_size
        for table, (context, _) in zip(tables, seqlens, strict=True)
        for position in range(context)
    ]
    starts = torch.tensor([0, *(num_queries for _, num_queries in seqlens)]).cumsum(0)
    return AttentionMetadata(
        cu_seqlens_q=starts.to(spec.device, torch.int32),
        context_lens=torch.tensor([context for context, _ in seqlens], dtype=torch.int32, device=spec.device),
        block_tables=torch.tensor(
            [table + [BEYOND] * (width - len(table)) for table in tables], dtype=torch.int32, device=spec.device
        ),
        slot_mapping=torch.tensor(slots, device=spec.device),
        max_seqlen_q=max(num_queries for _, num_queries in seqlens),
        max_context_len=max(context for context, _ in seqlens),
    )


def check_against_plain(backend: AttentionBackend, seqlens: Seqlens, seed: int) -> Tensor:
    """Store whole contexts into caches full of NaN, attend, compare with the plain backend; the result, if it is right."""
    spec, rng = backend.spec, random.Random(seed)
    num_blocks = 3 + sum(-(-context // spec.block_size) for context, _ in seqlens)
    metadata = make_metadata(spec, seqlens, num_blocks, rng)
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, num_heads: int) -> Tensor:
        return torch.randn(length, num_heads, spec.head_dim, generator=generator).to(spec.device, spec.dtype)

    num_tokens = len(metadata.slot_mapping)
    # K and V as the merged projection gives them: views whose rows lie further apart than they are long.
    merged = draw(num_tokens, 2 * spec.num_kv_heads + 1)
    k, v = merged[:, : spec.num_kv_heads], merged[:, spec.num_kv_heads : -1]
    q = draw(int(metadata.cu_seqlens_q[-1]), spec.num_heads)
    slot_mapping = metadata.slot_mapping.clone()
    slot_mapping[rng.randrange(num_tokens)] = -1  # left out by both; the plain one writes it below
    plain = TorchReferenceBackend(spec)
    results, caches = [], []
    for one in (plain, backend):
        cache = one.allocate_cache(num_blocks).fill_(torch.nan)
        one.store(k, v, cache, slot_mapping)
        left_out = (slot_mapping < 0).nonzero().flatten()
        caches.append(cache.clone())
        one.store(k[left_out], v[left_out], cache, metadata.slot_mapping[left_out])
        results.append(one.attend(q, cache, metadata))
    if caches[0].shape == caches[1].shape:  # the same layout: the caches must agree bit for bit, and outside be NaN still
        assert torch.equal(caches[0].nan_to_num(7.0), caches[1].nan_to_num(7.0)), "K and V are not where they belong"
    tolerance = TOLERANCE[spec.dtype]
    torch.testing.assert_close(results[1].float(), results[0].float(), rtol=tolerance, atol=tolerance)
    return results[1]
