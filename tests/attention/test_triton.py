"""The Triton kernels in Triton's interpreter, against the plain backend."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_parity import Seqlens, check_against_plain, random_seqlens
from kept_logits import check, run, run_alone

from nanovllm import LLM, SamplingParams
from nanovllm.attention import triton as triton_backend
from nanovllm.attention.backend import AttentionSpec
from nanovllm.attention.triton import TritonBackend
from nanovllm.utils.context import AttentionMetadata

# Whole prompts, decodes around the ends of parts and blocks, chunks behind a cached prefix, a single token.
MIXED: Seqlens = [(19, 19), (32, 1), (33, 1), (40, 9), (1, 1)]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    # As long as they are on a GPU, no context here would have a second one.
    monkeypatch.setattr(triton_backend, "PART", 32)


def make_backend(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int = 16, dtype: torch.dtype = torch.float32
) -> TritonBackend:
    return TritonBackend(AttentionSpec(num_heads, num_kv_heads, head_dim, block_size, dtype, torch.device("cpu")))


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    [
        (4, 2, 64, 16, torch.float32),
        (2, 2, 80, 32, torch.float32),
        (9, 3, 96, 48, torch.float32),  # groups of 3: tiles end within a token
        (14, 2, 64, 16, torch.float16),
        (4, 1, 128, 256, torch.float16),
        (17, 1, 16, 16, torch.float32),  # a group larger than the smallest tile
        (1, 1, 256, 16, torch.float32),
    ],
)
def test_shapes(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    check_against_plain(make_backend(num_heads, num_kv_heads, head_dim, block_size, dtype), MIXED, seed=0)


@pytest.mark.parametrize("seed", range(4))
def test_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    num_kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5])
    backend = make_backend(group * num_kv_heads, num_kv_heads, rng.choice([16, 24, 40]), rng.choice([16, 32, 48]))
    check_against_plain(backend, random_seqlens(rng, longest=48, num_seqs=4), seed)


def test_a_sequence_does_not_depend_on_how_busy_the_batch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # Programs that share a context: from one for each part down to one for all. The sums must be the same to the bit.
    backend = make_backend(4, 2, 16)
    results = []
    for target in (1, 6, 1000):
        monkeypatch.setattr(triton_backend, "TARGET_PROGRAMS", target)
        results.append(check_against_plain(backend, [(130, 1), (33, 1)], seed=0))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_parts_grow_with_the_longest_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "MAX_PARTS", 2)
    backend = TritonBackend(replace(make_backend(4, 2, 16).spec, max_context_len=200))
    assert backend._part == 128
    check_against_plain(backend, [(200, 1), (129, 1), (128, 1), (3, 1)], seed=0)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_padding_rows_are_zero_and_read_nothing(batch_invariant: bool) -> None:
    backend = TritonBackend(replace(make_backend(4, 2, 16).spec, batch_invariant=batch_invariant))
    cache = backend.allocate_cache(4).fill_(torch.nan)
    k = torch.full((3, 2, 16), torch.nan)
    k[0] = 1.0
    slot_mapping = torch.tensor([16, -1, -1])
    backend.store(k, k, cache, slot_mapping)
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.arange(4, dtype=torch.int32),
        context_lens=torch.tensor([1, 0, 0], dtype=torch.int32),
        block_tables=torch.tensor([[1, 0], [2**30, 0], [2**30, 0]], dtype=torch.int32),
        slot_mapping=slot_mapping,
        max_seqlen_q=1,
        max_context_len=32,
    )
    out = backend.attend(torch.full((3, 4, 16), torch.nan).index_fill(0, torch.tensor([0]), 1.0), cache, metadata)
    assert torch.equal(out, torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand_as(out))
    assert cache.isnan().sum() == cache.numel() - 2 * 2 * 16


def test_offsets_into_large_caches_are_64_bit() -> None:
    # Memory that is reserved and never touched but for the last block: 2**31 elements lie before it.
    backend = make_backend(2, 2, 64, dtype=torch.float16)
    num_blocks = 2**31 // (16 * 2 * 64) + 1
    cache = backend.allocate_cache(num_blocks)
    k, v = torch.randn(2, 1, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    slot_mapping = torch.tensor([num_blocks * 16 - 16])
    backend.store(k, v, cache, slot_mapping)
    for num_rows in (1, 2):  # a decode, then a prompt of two tokens of which the second is the same
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, num_rows], dtype=torch.int32),
            context_lens=torch.tensor([num_rows], dtype=torch.int32),
            block_tables=torch.tensor([[num_blocks - 1]], dtype=torch.int32),
            slot_mapping=slot_mapping,
            max_seqlen_q=num_rows,
            max_context_len=num_rows,
        )
        backend.store(k, v, cache, slot_mapping + num_rows - 1)
        out = backend.attend(torch.ones(num_rows, 2, 64).half(), cache, metadata)
        torch.testing.assert_close(out, v.expand(num_rows, 2, 64))


def test_whole_model_gives_the_plain_backends_tokens(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("Qwen3ForCausalLM")
    rng = random.Random(0)
    shared = rng.choices(range(320), k=20)
    prompts = [shared + rng.choices(range(320), k=length) for length in (11, 27, 10)]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=6, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
    results = []
    for backend in ("torch_reference", "triton"):
        llm = LLM(
            folder,
            device="cpu",
            dtype="float32",
            attention_backend=backend,
            max_model_len=64,
            max_num_batched_tokens=33,  # chunks, and decodes beside prefills
            num_kvcache_blocks=6,  # too few: one is preempted
        )
        results.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
        assert llm.scheduler.num_preemptions > 0
    assert results[0] == results[1]


@pytest.fixture
def rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile products in which no row is special, as a GPU's: numpy's last bits depend on a row's place in the tile."""
    from triton.runtime import interpreter

    def create_dot(self: object, a: Any, b: Any, d: Any, *precision: object) -> Any:
        total = d.data.copy()
        for step in range(a.data.shape[1]):
            total += a.data[:, step, None] * b.data[step]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("rows_alike")
def test_logits_do_not_depend_on_the_batch_if_asked_for(checkpoint: Callable[..., Path]) -> None:
    options = {"device": "cpu", "dtype": "float32", "attention_backend": "triton", "max_model_len": 96}
    prompts = [random.Random(i).choices(range(320), k=length) for i, length in enumerate((15, 47, 31))]

    def make_llm(num_kvcache_blocks: int = 20, batch_invariant: bool = True, **more: int) -> LLM:
        sizes = {"num_kvcache_blocks": num_kvcache_blocks, **more}
        return LLM(checkpoint("Qwen3ForCausalLM"), **options, batch_invariant=batch_invariant, **sizes)

    expected = run_alone(make_llm(), prompts)
    few_blocks = make_llm(num_kvcache_blocks=7)
    for llm in (few_blocks, make_llm(max_num_batched_tokens=23)):
        check(run(llm, prompts), expected, len(prompts))
    assert few_blocks.scheduler.num_preemptions > 0
    # Else a token alone and one in a chunk are two kernels' work, and these contexts have several parts.
    other = run(make_llm(batch_invariant=False), prompts)
    assert any(not torch.equal(row, expected[key]) for key, row in other.items())


def test_batch_invariance_of_single_queries_is_right_too() -> None:
    spec = replace(make_backend(9, 3, 24).spec, batch_invariant=True)
    check_against_plain(TritonBackend(spec), MIXED, seed=0)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_backend(4, 2, 64).spec
    assert TritonBackend.why_not(spec) is None
    assert "bfloat16" in str(TritonBackend.why_not(replace(spec, dtype=torch.bfloat16)))
    assert "512 dimensions" in str(TritonBackend.why_not(replace(spec, head_dim=512)))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in str(TritonBackend.why_not(spec))
    assert TritonBackend.why_not(replace(spec, device=torch.device("cuda"), dtype=torch.bfloat16)) is None
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    assert TritonBackend.why_not(spec) == "triton is not installed"
