"""The CPU kernel against the plain backend, and against itself: a row is the same, bit for bit, in any batch.

Each test runs on all builds of cpu_builds.py.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from cpu_builds import EMULATED, FLAGS
from torch import Tensor

from nanovllm.attention.backend import AttentionSpec
from nanovllm.attention.cpu import CPUBackend
from nanovllm.attention.torch_reference import TorchReferenceBackend
from nanovllm.utils.context import AttentionMetadata
from nanovllm.utils.cpu_build import load_library

BUILDS = FLAGS | EMULATED
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BEYOND = 2**30  # in a block table, behind a sequence's own blocks: no block has this id


@pytest.fixture(scope="session")
def builds() -> dict[str, Any]:
    with ThreadPoolExecutor() as pool:
        return dict(zip(BUILDS, pool.map(load_library, BUILDS.values()), strict=True))


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest, builds: dict[str, Any]) -> Any:
    return builds[request.param]


class Sequences(NamedTuple):
    """Q, K and V of every token of some sequences, and the blocks that they have been given."""

    spec: AttentionSpec
    q: list[Tensor]  # of each sequence: [context_len, num_heads, head_dim]
    k: list[Tensor]  # [context_len, num_kv_heads, head_dim]
    v: list[Tensor]
    tables: list[list[int]]
    num_blocks: int


def make_spec(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(num_heads, num_kv_heads, head_dim, block_size, dtype, torch.device("cpu"))


def make_sequences(spec: AttentionSpec, lengths: list[int], seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // spec.block_size) for length in lengths]
    blocks = torch.randperm(sum(counts) + 3, generator=generator).tolist()

    def random(heads: int) -> list[Tensor]:
        return [torch.randn(length, heads, spec.head_dim, generator=generator).to(spec.dtype) for length in lengths]

    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    return Sequences(
        spec, random(spec.num_heads), random(spec.num_kv_heads), random(spec.num_kv_heads), tables, sum(counts) + 3
    )


def make_metadata(sequences: Sequences, steps: list[tuple[int, int, int]]) -> AttentionMetadata:
    """One step of (sequence, context length after it, queries) each."""
    size = sequences.spec.block_size
    widest = max(len(sequences.tables[index]) for index, _, _ in steps)
    queries = [num_queries for _, _, num_queries in steps]
    slots = [
        sequences.tables[index][position // size] * size + position % size
        for index, context, num_queries in steps
        for position in range(context - num_queries, context)
    ]
    return AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0).int(),
        context_lens=torch.tensor([context for _, context, _ in steps]).int(),
        block_tables=torch.tensor(
            [sequences.tables[i][: -(-c // size)] + [BEYOND] * (widest - -(-c // size)) for i, c, _ in steps]
        ).int(),
        slot_mapping=torch.tensor(slots),
        max_seqlen_q=max(queries),
        max_context_len=max(context for _, context, _ in steps),
    )


def take(tensors: list[Tensor], steps: list[tuple[int, int, int]]) -> Tensor:
    return torch.cat([tensors[index][context - num : context] for index, context, num in steps])


def make_backend(kernels: Any, spec: AttentionSpec) -> CPUBackend:
    backend = CPUBackend(spec)
    backend._kernels = kernels
    return backend


def run(backend: Any, sequences: Sequences, steps: list[tuple[int, int, int]], v: list[Tensor] | None = None) -> Tensor:
    """The step on a cache where nothing but the contexts was ever written: the rest is NaN."""
    cache = backend.allocate_cache(sequences.num_blocks).fill_(torch.nan)
    whole = [(index, context, context) for index, context, _ in steps]
    v = sequences.v if v is None else v
    backend.store(take(sequences.k, whole), take(v, whole), cache, make_metadata(sequences, whole).slot_mapping)
    return backend.attend(take(sequences.q, steps), cache, make_metadata(sequences, steps))


def check(kernels: Any, spec: AttentionSpec, seqlens: list[tuple[int, int]]) -> None:
    """Compare a batch of (context length, queries) with the plain backend in float32 on the same values."""
    sequences = make_sequences(spec, [context for context, _ in seqlens])
    steps = [(index, context, queries) for index, (context, queries) in enumerate(seqlens)]
    out = run(make_backend(kernels, spec), sequences, steps)
    wide = make_spec(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size, torch.float32)
    exact = Sequences(wide, *([x.float() for x in tensors] for tensors in sequences[1:4]), *sequences[4:])
    expected = run(TorchReferenceBackend(wide), exact, steps)
    # float32 rounds sums of up to 5,000 products; a result in 16 bits is rounded once more, by half an eps at most.
    tolerance = 2e-5 + (torch.finfo(spec.dtype).eps / 2 if spec.dtype != torch.float32 else 1e-5) * expected.abs()
    if spec.dtype == torch.bfloat16:
        # The dot product rounds each probability to bf16: half an eps of each term, so of the sum of their magnitudes.
        magnitudes = run(TorchReferenceBackend(wide), exact, steps, [v.abs() for v in exact.v])
        tolerance = tolerance * 1.01 + torch.finfo(torch.bfloat16).eps / 2 * magnitudes
    assert out.dtype == spec.dtype
    assert ((out.float() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(4, 4, 64, 16), (4, 2, 80, 32), (9, 3, 64, 48), (14, 2, 64, 16), (16, 8, 128, 256), (8, 1, 256, 16), (3, 3, 16, 16),
     (13, 1, 96, 16), (20, 4, 112, 16), (24, 2, 32, 16)],
)  # fmt: skip
def test_heads_and_blocks(
    kernels: Any, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    # Whole prompts, decodes around the ends of tiles and blocks, chunks in the middle and at the end, a single token.
    seqlens = [(37, 37), (16, 1), (15, 1), (17, 1), (block_size, 1), (block_size + 1, 2), (50, 20), (300, 45), (1, 1)]
    check(kernels, make_spec(num_heads, num_kv_heads, head_dim, block_size, dtype), seqlens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_context_lengths(kernels: Any, dtype: torch.dtype) -> None:
    lengths = [1, 2, 240, 241, 255, 256, 257, 272, 273, 511, 512, 513, 1000, 3000, 4999, 5000]
    spec = make_spec(4, 2, 32, 16, dtype)
    check(kernels, spec, [(length, 1) for length in lengths])
    check(kernels, spec, [(length, min(length, 30)) for length in lengths])


@pytest.mark.parametrize("seed", range(5))
def test_random_batches(kernels: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    contexts = torch.randint(1, 700, (8,), generator=generator).tolist()
    queries = [int(torch.randint(1, n + 1, (), generator=generator)) if i % 2 else 1 for i, n in enumerate(contexts)]
    check(kernels, make_spec(6, 2, 32, 16, torch.bfloat16), list(zip(contexts, queries, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (7, 1)])
def test_a_row_is_the_same_bit_for_bit_in_any_batch(
    kernels: Any, threads: None, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    sequences = make_sequences(make_spec(num_heads, num_kv_heads, 48, 16, dtype), [700, 64, 1, 333])
    backend = make_backend(kernels, sequences.spec)
    torch.set_num_threads(1)
    whole = run(backend, sequences, [(0, 700, 700)])
    pieces = [(1, 1), (2, 1), (7, 7), (17, 10), (256, 1), (257, 1), (257, 2), (300, 44), (511, 255), (700, 64), (700, 1)]
    for num_threads in (2, 8):
        torch.set_num_threads(num_threads)
        for end, size in pieces:  # of the prompt
            assert torch.equal(run(backend, sequences, [(0, end, size)]), whole[end - size : end])
        among_others = run(backend, sequences, [(1, 64, 64), (3, 333, 1), (0, 700, 30), (2, 1, 1)])
        assert torch.equal(among_others[65:95], whole[670:])


def test_a_long_context_is_split_among_threads_without_a_trace(kernels: Any, threads: None) -> None:
    sequences = make_sequences(make_spec(2, 1, 32, 16, torch.bfloat16), [5000])
    backend = make_backend(kernels, sequences.spec)
    results = []
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        results.append(run(backend, sequences, [(0, 5000, 3)]))
    assert all(torch.equal(result, results[0]) for result in results)


def make_tree(spec: AttentionSpec, lengths: list[int], parents: list[int], common: list[int]) -> tuple[Sequences, Sequences]:
    """Sequences that begin as an earlier one does, for some tokens: with its blocks, and with blocks of their own."""
    apart = make_sequences(spec, lengths)
    tables = [list(table) for table in apart.tables]
    for index, (parent, num_tokens) in enumerate(zip(parents, common, strict=True)):
        for values in (apart.k, apart.v):
            values[index][:num_tokens] = values[parent][:num_tokens]
        num_blocks = num_tokens // spec.block_size
        tables[index][:num_blocks] = tables[parent][:num_blocks]
    return apart._replace(tables=tables), apart


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_blocks_in_common_are_read_together_without_a_trace(
    kernels: Any, threads: None, block_size: int, dtype: torch.dtype
) -> None:
    # 0 to 5 are one tree: 2, 3 and 5 branch off 0 in its third, first and second partition, 4 branches off 2; 1 has the
    # first block alone in common with it. 6 and 7 are another; of 8 nothing was computed before.
    spec = make_spec(4, 2, 32, block_size, dtype)
    lengths = [900, 500, 850, 400, 800, 600, 300, 700, 70]
    together, apart = make_tree(spec, lengths, [0, 0, 0, 0, 2, 0, 6, 6, 8], [0, 48, 720, 336, 768, 528, 0, 288, 0])
    backend = make_backend(kernels, spec)
    queries = [1, 1, 70, 30, 1, 1, 2, 390, 70]
    every = [(index, lengths[index], queries[index]) for index in (6, 0, 3, 8, 1, 4, 2, 7, 5)]
    decodes = [(index, lengths[index] - offset, 1) for index, offset in ((5, 0), (0, 1), (2, 0), (0, 0), (4, 3), (7, 300))]
    for steps in (every, decodes):
        torch.set_num_threads(1)
        alone = torch.cat([run(backend, apart, [step]) for step in steps])
        for num_threads in (1, 2, 8):
            torch.set_num_threads(num_threads)
            assert torch.equal(run(backend, together, steps), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [[1] * 7, [1, 1, 30, 1, 1, 70, 1]], ids=["decodes", "chunks, too"])
def test_storing_and_attending_at_once_leaves_what_both_leave_one_after_the_other(
    kernels: Any, threads: None, queries: list[int], dtype: torch.dtype
) -> None:
    # 0 to 3 begin alike, 3 up to the token before its last; 4 has one token, 5 a partition and one more, 6 a partition.
    spec = make_spec(4, 2, 32, 16, dtype)
    lengths = [900, 500, 850, 897, 1, 257, 256]
    queries = [min(pair) for pair in zip(queries, lengths, strict=True)]
    sequences, _ = make_tree(spec, lengths, [0, 0, 0, 0, 4, 5, 6], [0, 48, 720, 896, 0, 0, 0])
    backend = make_backend(kernels, spec)
    steps = [(index, lengths[index], queries[index]) for index in (6, 3, 0, 4, 2, 5, 1)]
    metadata, (q, k, v) = make_metadata(sequences, steps), (take(x, steps) for x in sequences[1:4])
    before = [(index, length - count, length - count) for index, length, count in steps if length > count]
    stored = make_metadata(sequences, before).slot_mapping
    for num_threads in (1, 2, 8):
        torch.set_num_threads(num_threads)
        one, other = (backend.allocate_cache(sequences.num_blocks).fill_(torch.nan) for _ in range(2))
        for cache in (one, other):
            backend.store(take(sequences.k, before), take(sequences.v, before), cache, stored)
        backend.store(k, v, one, metadata.slot_mapping)
        out, batch = torch.empty_like(q), (metadata.cu_seqlens_q, metadata.context_lens, metadata.block_tables)
        kernels.store_and_attend(q, k, v, other, out, metadata.slot_mapping, *batch, backend.scale)
        assert torch.equal(out, backend.attend(q, one, metadata))
        assert torch.equal(other.nan_to_num(9e9), one.nan_to_num(9e9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_writes_its_slots_and_nothing_else(kernels: Any, dtype: torch.dtype) -> None:
    spec = make_spec(4, 2, 32, 32, dtype)
    cache = make_backend(kernels, spec).allocate_cache(4).fill_(torch.nan)
    k, v = torch.randn(2, 5, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    # Slot -1 means nowhere; as an index it would be the last slot of the cache.
    make_backend(kernels, spec).store(k, v, cache, torch.tensor([3, -1, 64, 100, -1]))
    written = cache[~cache.isnan()]
    expected = torch.cat([x[[0, 2, 3]].flatten() for x in (k, v)])
    assert torch.equal(written.sort().values, expected.sort().values)
    assert cache[[1, 0, 2, 3]].isnan().flatten(1).all(dim=1).tolist() == [True, False, False, False]


def test_offsets_beyond_32_bits(kernels: Any) -> None:
    spec = make_spec(1, 1, 256, 256, torch.float16)
    num_blocks = 2**31 // (2 * 256 * 256) + 2
    cache = make_backend(kernels, spec).allocate_cache(num_blocks)  # 4 GiB, of which little is ever touched
    sequences = make_sequences(spec, [40])._replace(tables=[[num_blocks - 1]], num_blocks=num_blocks)
    metadata = make_metadata(sequences, [(0, 40, 40)])
    backend = make_backend(kernels, spec)
    backend.store(sequences.k[0], sequences.v[0], cache, metadata.slot_mapping)
    small = sequences._replace(tables=[[1]], num_blocks=2)
    assert torch.equal(backend.attend(sequences.q[0], cache, metadata), run(backend, small, [(0, 40, 40)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_that_was_written_is_not_hidden(kernels: Any, dtype: torch.dtype) -> None:
    sequences = make_sequences(make_spec(2, 1, 32, 16, dtype), [40])
    sequences.k[0][20] = torch.nan
    out = run(make_backend(kernels, sequences.spec), sequences, [(0, 40, 40)])
    assert out[20:].isnan().all(), "they see it"
    assert not out[:20].isnan().any(), "it is in the future"


def test_queries_and_values_may_be_views(kernels: Any) -> None:
    sequences = make_sequences(make_spec(4, 2, 32, 16, torch.float32), [40])
    backend = make_backend(kernels, sequences.spec)
    q, k, v = sequences.q[0], sequences.k[0], sequences.v[0]
    merged = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)  # as a merged projection leaves them
    parts = (x.unflatten(-1, (-1, 32)) for x in merged.split([128, 64, 64], dim=1))
    view = sequences._replace(**{name: [part] for name, part in zip("qkv", parts, strict=True)})
    metadata, cache = make_metadata(sequences, [(0, 40, 40)]), backend.allocate_cache(sequences.num_blocks)
    backend.store(view.k[0], view.v[0], cache, metadata.slot_mapping)
    assert torch.equal(backend.attend(view.q[0], cache, metadata), run(backend, sequences, [(0, 40, 40)]))
