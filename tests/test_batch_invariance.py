"""The logits of a token do not depend, bit for bit, on what else is computed: batch, chunks, cache, preemption, threads.

CASES are the backends and dtypes for which this holds. Not among them: torch_reference in float32, whose attention sums in
another order for a chunk than for a token. Triton's is in attention/test_triton.py.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from kept_logits import Logits, check, run, run_alone

from nanovllm import LLM

CASES = [("cpu", "float32"), ("cpu", "bfloat16"), ("torch_reference", "bfloat16")]
PROMPTS = [Random(i).choices(range(320), k=5 + 7 * i % 40) for i in range(100)]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def make_llm(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Callable[..., LLM]:
    backend, dtype = request.param
    defaults = {"attention_backend": backend, "dtype": dtype, "device": "cpu", "max_model_len": 64}
    return lambda **options: LLM(checkpoint(), **{**defaults, "num_kvcache_blocks": 400, **options})


@pytest.fixture(scope="module")
def expected(make_llm: Callable[..., LLM]) -> Logits:
    return run(make_llm(enable_prefix_caching=False), PROMPTS)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 9, 12, 16, 17, 33, 64])
def test_batch_sizes(make_llm: Callable[..., LLM], expected: Logits, size: int) -> None:
    check(run(make_llm(), PROMPTS[:size]), expected, size)


@pytest.mark.parametrize("budget", [7, 16, 33, 100])
def test_chunks(make_llm: Callable[..., LLM], expected: Logits, budget: int) -> None:
    check(run(make_llm(max_num_batched_tokens=budget, max_num_seqs=20), PROMPTS[:40]), expected, 40)


def test_cached_prefixes(make_llm: Callable[..., LLM], expected: Logits) -> None:
    llm = make_llm()
    for _ in range(2):
        check(run(llm, PROMPTS[:40]), expected, 40)


def test_preemption(make_llm: Callable[..., LLM], expected: Logits) -> None:
    llm = make_llm(num_kvcache_blocks=30)
    check(run(llm, PROMPTS[:60]), expected, 60)
    assert llm.scheduler.num_preemptions > 0


# ---- the shape of a real model, contexts of several of the kernel's partitions, several threads ----

LONG_PROMPTS = [Random(i).choices(range(320), k=length) for i, length in enumerate((15, 255, 543, 1))]


# With products that are worth dividing among threads.
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_larger_model_on_any_number_of_threads(checkpoint: Callable[..., Path], dtype: str) -> None:
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    more = {"head_dim": 64, "num_hidden_layers": 1, "vocab_size": 1000, "initializer_range": 0.05}
    folder = checkpoint("LlamaForCausalLM", **shape, **more)
    options = {"attention_backend": "cpu", "dtype": dtype, "device": "cpu", "max_model_len": 1024}
    torch.set_num_threads(1)
    llm = LLM(folder, **options, num_kvcache_blocks=100, enable_prefix_caching=False)
    alone = run_alone(llm, LONG_PROMPTS)
    for num_threads, budget, num_blocks in ((2, 2048, 27), (8, 97, 100)):
        torch.set_num_threads(num_threads)
        llm = LLM(folder, **options, num_kvcache_blocks=num_blocks, max_num_batched_tokens=budget)
        check(run(llm, LONG_PROMPTS), alone, len(LONG_PROMPTS))
        assert (llm.scheduler.num_preemptions > 0) == (num_blocks < 100)


def test_what_cannot_be_invariant_is_refused(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="'torch_reference' cannot be used here: its sums depend"):
        LLM(checkpoint(), device="cpu", attention_backend="torch_reference", batch_invariant=True)


def test_asked_for_on_a_cpu_it_changes_nothing_that_is_packed(checkpoint: Callable[..., Path]) -> None:
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "num_kvcache_blocks": 100}
    results = [run(LLM(checkpoint(), **options, batch_invariant=flag), PROMPTS[:8]) for flag in (False, True)]
    check(results[1], results[0], 8)
