"""Log-probabilities of output and prompt tokens, against Transformers, and with bounded memory."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.layers.logprobs import HEAD_ROWS, compute_logprobs
from nanovllm.outputs import RequestOutput

PROMPTS = [Random(length).choices(range(320), k=length) for length in (1, 40, 90, 200)]


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "num_kvcache_blocks": 80}
    return LLM(folder, **{**defaults, **options})


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("Qwen3ForCausalLM")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[list[int]], Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs(token_ids: list[int]) -> Tensor:
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)

    return logprobs


def check_position(entries: list[Any], expected: Tensor, chosen: int, k: int) -> None:
    """One position: k best in order, and the chosen one, with their ranks."""
    assert len(entries) in (k, k + 1)
    for entry in entries:
        assert abs(entry["logprob"] - expected[entry["token_id"]].item()) < 1e-4
    best = expected.topk(k).indices.tolist()
    assert [entry["token_id"] for entry in entries[:k]] == best
    assert [entry["rank"] for entry in entries[:k]] == list(range(1, k + 1))
    (found,) = [entry for entry in entries if entry["token_id"] == chosen]
    assert found["rank"] == (expected > expected[chosen]).sum() + 1
    assert (len(entries) == k) == (chosen in best)


def check(output: RequestOutput, prompt: list[int], reference: Callable[[list[int]], Tensor], k: int, prompt_k: int) -> None:
    tokens = prompt + output["token_ids"]
    expected = reference(tokens)
    assert output["logprobs"] is not None
    assert output["prompt_logprobs"] is not None
    assert len(output["logprobs"]) == len(output["token_ids"])
    assert len(output["prompt_logprobs"]) == len(prompt)
    assert output["prompt_logprobs"][0] is None
    for position, entries in enumerate(output["prompt_logprobs"][1:], start=1):
        assert entries is not None
        check_position(entries, expected[position - 1], tokens[position], prompt_k)
    for position, entries in enumerate(output["logprobs"], start=len(prompt)):
        check_position(entries, expected[position - 1], tokens[position], k)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 33}, {"num_kvcache_blocks": 15, "max_num_batched_tokens": 64}],
    ids=["whole", "chunks", "preempted"],
)
def test_logprobs_are_transformers(folder: Path, reference: Callable[[list[int]], Tensor], options: dict[str, Any]) -> None:
    llm = make_llm(folder, **options)
    # What is reported is the model's own distribution, whatever the options make of it.
    params = [
        SamplingParams(seed=i, max_tokens=40, logprobs=k, prompt_logprobs=2, temperature=1.3, top_k=100, logit_bias={7: 3.0})
        for i, k in enumerate((0, 1, 5, 3))
    ]
    for _ in range(2):  # the second time with all prompts in the prefix cache
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        for output, prompt, one in zip(outputs, PROMPTS, params, strict=True):
            assert one.logprobs is not None
            check(output, prompt, reference, k=one.logprobs, prompt_k=2)
            assert output["num_cached_tokens"] == 0
    if "num_kvcache_blocks" in options:
        assert llm.scheduler.num_preemptions > 0


def test_those_who_do_not_ask_get_none_and_the_same_tokens(folder: Path) -> None:
    llm = make_llm(folder)
    plain = llm.generate(PROMPTS, SamplingParams(seed=1, max_tokens=8), use_tqdm=False)
    mixed = [SamplingParams(seed=1, max_tokens=8, logprobs=2 if i == 1 else None) for i in range(4)]
    outputs = llm.generate(PROMPTS, mixed, use_tqdm=False)
    assert [one["token_ids"] for one in outputs] == [one["token_ids"] for one in plain]
    assert [one["logprobs"] is None for one in outputs] == [True, False, True, True]
    assert outputs[0]["prompt_logprobs"] is None
    assert outputs[2]["num_cached_tokens"] > 0


def test_logits_of_a_few_prompt_tokens_exist_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(folder)
    runner = llm.executor._runner  # type: ignore[attr-defined]
    sizes: list[int] = []
    compute_logits = runner.model.compute_logits
    monkeypatch.setattr(runner.model, "compute_logits", lambda states: sizes.append(len(states)) or compute_logits(states))
    llm.generate(PROMPTS[3:], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    assert max(sizes) <= HEAD_ROWS < len(PROMPTS[3])
    assert sum(sizes) == len(PROMPTS[3])  # each prompt token but the first, and one to sample


@pytest.mark.parametrize("k", [0, 3, 50])
def test_compute_logprobs(k: int) -> None:
    logits = torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    chosen = torch.arange(37)
    expected = logits.log_softmax(-1)
    result = compute_logprobs(logits, chosen, k + 10 * (k == 50))
    assert result.token_ids.shape == (37, k)
    assert torch.allclose(torch.from_numpy(result.logprobs), expected.topk(k).values, atol=1e-6)
    assert torch.allclose(torch.from_numpy(result.chosen_logprobs), expected[chosen, chosen], atol=1e-6)
    assert (result.chosen_ranks == ((expected > expected[chosen, chosen][:, None]).sum(1) + 1).numpy()).all()
