"""Options of requests from end to end: together, alone, in chunks, preempted; n completions; what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams

PROMPTS = [Random(length).choices(range(320), k=length) for length in (1, 15, 16, 17, 33, 60, 47, 3)]
PARAMS = [
    SamplingParams(seed=1, max_tokens=25, temperature=1.2, top_p=0.8),
    SamplingParams(seed=2, max_tokens=30, top_k=9, repetition_penalty=1.4, logprobs=2),
    SamplingParams(temperature=0, max_tokens=20, frequency_penalty=1.0, presence_penalty=-0.5),
    SamplingParams(seed=4, max_tokens=25, logit_bias={5: 4.0, 6: 4.0}, min_p=0.05),
    SamplingParams(seed=5, max_tokens=25),
    SamplingParams(seed=6, max_tokens=30, allowed_token_ids=range(100, 140), frequency_penalty=0.3),
    SamplingParams(temperature=0, max_tokens=25, repetition_penalty=1.3, min_tokens=10, stop_token_ids=range(0, 320, 4)),
    SamplingParams(seed=8, max_tokens=25, n=3, top_k=50, top_p=0.9),
]


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "device": "cpu", "max_model_len": 128, "num_kvcache_blocks": 80}
    return LLM(folder, **{**defaults, **options})


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("Qwen3ForCausalLM")


def tokens(llm: LLM, indices: list[int]) -> list[list[list[int]]]:
    outputs = llm.generate([PROMPTS[i] for i in indices], [PARAMS[i] for i in indices], use_tqdm=False)
    return [[one["token_ids"] for one in output.get("completions", [output])] for output in outputs]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[list[int]]]:
    llm = make_llm(folder, enable_prefix_caching=False)
    return [tokens(llm, [index])[0] for index in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 16}, {"max_num_seqs": 3}, {"num_kvcache_blocks": 14, "max_num_batched_tokens": 32}],
    ids=["one batch", "chunks", "few at a time", "preempted"],
)
def test_requests_get_the_same_in_any_company(folder: Path, alone: list[Any], options: dict[str, int]) -> None:
    llm = make_llm(folder, **options)
    order = list(range(len(PROMPTS)))
    for seed in (None, 0):
        if seed is not None:
            Random(seed).shuffle(order)
        assert tokens(llm, order) == [alone[index] for index in order]
    if "num_kvcache_blocks" in options:
        assert llm.scheduler.num_preemptions > 0


def test_options_do_what_they_say(alone: list[list[list[int]]]) -> None:
    assert set(alone[5][0]) <= set(range(100, 140))
    assert {5, 6} & set(alone[3][0])
    counts = np.bincount(alone[5][0], minlength=320)
    assert counts.max() < 6  # a penalty of 0.3 for each time
    assert len(alone[6][0]) >= 10
    assert all(token % 4 for token in alone[6][0][:-1])
    assert len(alone[6][0]) == 25 or alone[6][0][-1] % 4 == 0


def test_min_tokens_holds_back_the_end_of_sequence(checkpoint: Callable[..., Path]) -> None:
    llm = make_llm(checkpoint("Qwen3ForCausalLM", eos_token_id=list(range(0, 320, 2))))
    for min_tokens in (0, 1, 7):
        params = SamplingParams(seed=3, max_tokens=40, min_tokens=min_tokens)
        (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
        assert output["finish_reason"] == "stop"
        assert output["stop_reason"] is None
        assert len(output["token_ids"]) > min_tokens
        assert all(token % 2 for token in output["token_ids"][:-1])


def test_n_completions_share_the_blocks_of_their_prompt(folder: Path) -> None:
    llm = make_llm(folder, kvcache_block_size=16)
    prompt = PROMPTS[5]
    ids: set[int] = set()
    params = SamplingParams(seed=9, max_tokens=12, n=4)
    used = []
    for event in llm.stream([prompt], params):
        ids.add(event["request_id"])
        tables = [seq.block_table for seq in llm.scheduler.running]
        if len(tables) == 4:
            used.append({table[2] for table in tables})
    assert len(ids) == 4
    assert used
    assert all(len(third) == 1 for third in used)  # 60 tokens: three full blocks
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    completions = [one["token_ids"] for one in output["completions"]]
    assert len({tuple(one) for one in completions}) == 4
    assert output["token_ids"] == completions[0]
    (first,) = llm.generate([prompt], SamplingParams(seed=9, max_tokens=12), use_tqdm=False)
    assert first["token_ids"] == completions[0]
    assert "completions" not in first


def test_outputs_are_ready_for_json(folder: Path) -> None:
    llm = make_llm(folder)
    params = SamplingParams(max_tokens=3, logprobs=1, prompt_logprobs=1, n=2, stop_token_ids=(np.int64(9),))
    outputs = llm.generate([[1, 2], [3]], params, use_tqdm=False)
    assert json.loads(json.dumps(outputs)) == outputs
    for output in outputs:
        first = output["time_to_first_token"]
        assert first is not None
        assert 0 < first <= output["total_time"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_token_ids": [320]}, "stop_token_ids of prompt 1 has token 320; the vocabulary is 0 to 319"),
        ({"allowed_token_ids": [1, 999]}, "allowed_token_ids of prompt 1 has token 999"),
        ({"logit_bias": {400: 1.0}}, "logit_bias of prompt 1 has token 400"),
        ({"stop": "x"}, "prompt 1 has stop strings, but the checkpoint has no tokenizer"),
        ({"allowed_token_ids": [4], "stop_token_ids": [4], "min_tokens": 1}, "nothing could be sampled"),
    ],
)
def test_what_the_model_cannot_do_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    llm = make_llm(folder)
    with pytest.raises(ValueError, match=message):
        llm.generate([[1], [2]], [SamplingParams(), SamplingParams(**options)], use_tqdm=False)
    assert llm.is_finished()
    with pytest.raises(ValueError, match="n=1, got 2"):
        llm.add_request([1], SamplingParams(n=2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_p": 0}, ValueError, "^top_p must be finite and above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, ValueError, "^top_p must be"),
        ({"top_k": -2}, ValueError, "^top_k must be at least -1, got -2"),
        ({"top_k": 1.5}, TypeError, "^top_k must be an integer"),
        ({"min_p": -0.1}, ValueError, "^min_p must be"),
        ({"repetition_penalty": 0}, ValueError, "^repetition_penalty must be finite and above 0, got 0"),
        ({"presence_penalty": 2.1}, ValueError, "^presence_penalty must be finite and at least -2 and at most 2, got 2.1"),
        ({"frequency_penalty": "1"}, TypeError, "^frequency_penalty must be a number"),
        ({"min_tokens": 65}, ValueError, "^min_tokens must be at most 64, got 65"),
        ({"stop": [1]}, TypeError, "^stop must be a string or strings, it holds 1"),
        ({"stop": ["a", ""]}, ValueError, "^stop must not hold an empty string"),
        ({"stop_token_ids": [-1]}, ValueError, "^each of stop_token_ids must be at least 0, got -1"),
        ({"allowed_token_ids": []}, ValueError, "^allowed_token_ids must hold at least one"),
        ({"allowed_token_ids": "12"}, TypeError, "^allowed_token_ids must be token ids"),
        ({"logit_bias": {1: float("nan")}}, ValueError, "^logit_bias of token 1 must be finite"),
        ({"logit_bias": 3}, TypeError, "^logit_bias must be a dict"),
        ({"logprobs": -1}, ValueError, "^logprobs must be at least 0, got -1"),
        ({"n": 0}, ValueError, "^n must be at least 1, got 0"),
        ({"n": 2, "temperature": 0}, ValueError, "^n must be 1 at temperature 0, got 2"),
        ({"skip_special_tokens": 1}, TypeError, "^skip_special_tokens must be True or False"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(**options)


def test_params_cannot_change_and_are_keys() -> None:
    stop, bias = ["a"], {3: 1, 1: 2.5}
    params = SamplingParams(stop=stop, logit_bias=bias, allowed_token_ids=np.arange(3), stop_token_ids=[5, 5])
    stop.append("b")
    bias[9] = 1.0
    assert (params.stop, params.logit_bias) == (("a",), ((1, 2.5), (3, 1.0)))
    assert (params.allowed_token_ids, params.stop_token_ids) == ((0, 1, 2), (5,))
    again = SamplingParams(stop="a", logit_bias=params.logit_bias, allowed_token_ids=[0, 1, 2], stop_token_ids=(5,))
    assert {params: 1}[again] == 1
