"""The logits of a token do not depend, bit for bit, on what else is computed: batch, chunks, cache, preemption.

CASES are the backends and dtypes for which this holds. Not among them: torch_reference in float32, whose matrix products
take other ways for a few rows than for many, and whose attention sums in another order for a chunk than for a token.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.engine.input_batch import StepInputs

CASES = [("torch_reference", "bfloat16"), ("cpu", "float32"), ("cpu", "bfloat16")]
PROMPTS = [Random(i).choices(range(320), k=5 + 7 * i % 40) for i in range(100)]
PARAMS = SamplingParams(seed=1, max_tokens=6, top_p=0.95)
Logits = dict[tuple[int, int], Tensor]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def make_llm(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Callable[..., LLM]:
    backend, dtype = request.param
    defaults = {"attention_backend": backend, "dtype": dtype, "device": "cpu", "max_model_len": 64}
    return lambda **options: LLM(checkpoint(), **{**defaults, "num_kvcache_blocks": 400, **options})


def run(llm: LLM, prompts: list[list[int]]) -> Logits:
    """The logits that each output token was sampled from, by (prompt, position)."""
    runner: Any = llm.executor._runner  # type: ignore[attr-defined]
    kept: Logits = {}
    sample = runner._sample

    def keep(inputs: StepInputs, logits: Tensor) -> Any:
        for row, row_logits in zip(inputs.sampled_rows, logits, strict=True):
            seq_id, position = int(runner.input_batch.seq_ids[row]), int(runner.input_batch.num_tokens[row])
            kept[seq_id, position] = row_logits.clone()
        return sample(inputs, logits)

    runner._sample = keep
    llm.generate(prompts, PARAMS, use_tqdm=False)
    runner._sample = sample
    first = min(seq_id for seq_id, _ in kept)
    return {(seq_id - first, position): row for (seq_id, position), row in kept.items()}


@pytest.fixture(scope="module")
def expected(make_llm: Callable[..., LLM]) -> Logits:
    return run(make_llm(enable_prefix_caching=False), PROMPTS)


def check(logits: Logits, expected: Logits, num_prompts: int) -> None:
    assert len(logits) == 6 * num_prompts
    assert [key for key, row in logits.items() if not torch.equal(row, expected[key])] == []


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
