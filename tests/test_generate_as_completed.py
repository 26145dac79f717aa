"""generate_as_completed: what `generate` gives, from an iterable that is read no faster than the scheduler works."""

import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.llm_engine import StepResult
from nanovllm.engine.model_runner import StepOutput
from nanovllm.engine.request_feed import Request
from nanovllm.engine.scheduled_batch import ScheduledBatch

MAX_NUM_SEQS = 4
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"max_model_len": 64, "num_kvcache_blocks": 12, "max_num_seqs": MAX_NUM_SEQS, "device": "cpu"}
    return LLM(folder, **{**defaults, "dtype": "float32", **options})


@pytest.fixture(scope="module")
def llm(tiny_text_model: Path) -> Iterator[LLM]:
    with make_llm(tiny_text_model) as llm:
        yield llm


def assert_clean(llm: LLM) -> None:
    manager = llm.scheduler.block_manager
    assert llm.is_finished()
    assert manager.num_free_blocks == manager.num_blocks


def draw(number: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(0)
    params = [
        SamplingParams(
            temperature=0.8 if i % 2 else 0,
            max_tokens=rng.randint(1, 12),
            seed=i,
            n=3 if i % 6 == 1 else 1,
            logprobs=2 if i % 7 == 0 else None,
            stop="e" if i % 5 == 0 else (),
        )
        for i in range(number)
    ]
    return [([rng.randrange(300) for _ in range(rng.randint(1, 40))], one) for one in params]


def without_times(output: Any) -> Any:
    """What is the same whenever a request runs."""
    left_out = ("num_cached_tokens", "time_to_first_token", "total_time")
    return {key: value for key, value in output.items() if key not in left_out}


def test_outputs_are_those_of_generate(llm: LLM) -> None:
    requests = draw(60)
    expected = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests], use_tqdm=False)
    told = list(llm.generate_as_completed(iter(requests)))
    assert [index for index, _ in told] != list(range(60))  # some end before others that came earlier
    outputs = dict(told)
    assert len(told) == len(outputs) == 60
    assert {index: without_times(output) for index, output in outputs.items()} == {
        index: without_times(output) for index, output in enumerate(expected)
    }
    assert_clean(llm)


def test_texts_and_conversations_with_template_args(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking %} yes{% endif %}"
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    requests = [("Hello", GREEDY), (QUESTION, GREEDY), Request(QUESTION, GREEDY, {"enable_thinking": True})]
    outputs: Any = dict(llm.generate_as_completed(requests))
    expected = [
        *llm.generate(["Hello"], GREEDY, use_tqdm=False),
        *llm.chat([QUESTION], GREEDY, use_tqdm=False),
        *llm.chat([QUESTION], GREEDY, use_tqdm=False, enable_thinking=True),
    ]
    assert [without_times(outputs[index]) for index in range(3)] == [without_times(output) for output in expected]


def test_a_seed_beside_shared_sampling_params(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, max_tokens=6, ignore_eos=True, n=2)
    seeded = SamplingParams(temperature=0.8, max_tokens=6, ignore_eos=True, n=2, seed=5)
    requests = [
        Request([1, 2], params, seed=5),
        Request([1, 2], seeded),
        Request([1, 2], seeded, seed=6),  # the parameters' own is the stronger one
        Request([1, 2], params, seed=6),
        *(Request([1, 2], params, seed=bad) for bad in (-1, True, 2**63)),
    ]
    outputs: Any = dict(llm.generate_as_completed(requests))
    tokens = [[one["token_ids"] for one in outputs[index]["completions"]] for index in range(4)]
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3]
    assert [str(outputs[index]).split(",")[0] for index in (4, 5, 6)] == [
        "seed of request 4 must be at least 0",
        "seed of request 5 must be an integer",
        "seed of request 6 must be at most 9223372036854775807",
    ]


def test_by_step_tells_together_what_finishes_together(llm: LLM) -> None:
    requests = draw(40)
    expected = list(llm.generate_as_completed(requests))
    steps: list[StepResult] = []
    groups = []
    for told in llm.generate_by_step([*requests, "bad"], steps.append):  # type: ignore[list-item]
        assert told
        groups.append(told)
        finished = {seq.prompt_index for seq in steps[-1].finished}
        assert {index for index, output in told if not isinstance(output, Exception)} <= finished
    flat = [(index, without_times(output)) for told in groups for index, output in told if index < 40]
    assert flat == [(index, without_times(output)) for index, output in expected]
    assert len(groups) < 40
    assert_clean(llm)


def test_what_can_not_run_is_told_and_the_others_run(llm: LLM) -> None:
    bad: list[tuple[Any, type[Exception], str]] = [
        (("", GREEDY), ValueError, "request {} is empty"),
        (([1] * 64, GREEDY), ValueError, "request {} has 64 tokens; with max_model_len=64"),
        ((["a"], GREEDY), TypeError, "request {} must be a str or a list of token ids, it holds 'a'"),
        (("\ud800", GREEDY), ValueError, "request {} is no valid text"),
        (("Hello", None), TypeError, "sampling_params of request {} must be SamplingParams, got NoneType"),
        (("Hello", SamplingParams(stop_token_ids=[10**6])), ValueError, "stop_token_ids of request {} has token 1000000"),
        (([{"role": "user"}], GREEDY), ValueError, "the chat template refuses request {}"),
        (([{"role": "user", "content": "x"}, 3], GREEDY), TypeError, "request {} must be a list of messages"),
        ("Hello", TypeError, "request {} must be a Request or a pair"),
        (Request("", GREEDY, name="row 7"), ValueError, "row 7 is empty"),
    ]
    requests = [item for one, _, _ in bad for item in (one, ("Good", GREEDY))]
    outputs: Any = dict(llm.generate_as_completed(requests))
    assert len(outputs) == 2 * len(bad)
    (expected,) = llm.generate(["Good"], GREEDY, use_tqdm=False)
    for place, (_, error, message) in enumerate(bad):
        assert type(outputs[2 * place]) is error
        assert str(outputs[2 * place]).startswith(message.format(2 * place))
        assert outputs[2 * place + 1]["token_ids"] == expected["token_ids"]
    assert_clean(llm)


def test_no_request_can_run(llm: LLM) -> None:
    """More of them than are taken in at once, so that the loop goes on without a step."""
    for bad in ([], "no pair"):
        told = list(llm.generate_as_completed([(bad, GREEDY)] * 50 if bad == [] else [bad] * 50))  # type: ignore[list-item]
        assert [index for index, _ in told] == list(range(50))
        assert all(isinstance(error, (TypeError, ValueError)) for _, error in told)
    assert list(llm.generate_as_completed([])) == []
    assert_clean(llm)


def test_reads_no_further_than_it_needs_and_fills_the_batch(llm: LLM) -> None:
    num_read = num_told = 0
    steps: list[StepResult] = []

    def requests() -> Iterator[tuple[list[int], SamplingParams]]:
        nonlocal num_read
        for index in range(200):
            num_read += 1
            assert num_read - num_told <= 3 * MAX_NUM_SEQS
            yield [1 + index, 2], GREEDY

    for _, output in llm.generate_as_completed(requests(), on_step=steps.append):
        assert not isinstance(output, Exception)
        num_told += 1
        assert num_told == 200 or num_read == 200 or num_read - num_told >= MAX_NUM_SEQS
    assert num_read == num_told == 200
    assert {step.num_seqs for step in steps} == {MAX_NUM_SEQS}  # 200 equal requests: never fewer at a time
    assert sum(step.num_prefill_tokens for step in steps) == 400
    assert sum(step.num_prefill_tokens > 0 for step in steps) * 5 == len(steps)
    assert all(0 <= step.kv_usage <= 1 and step.seconds > 0 for step in steps)


def test_leaving_the_loop_aborts_the_rest(llm: LLM) -> None:
    for index, _ in llm.generate_as_completed(draw(30)):
        if index > 3:
            break
    assert_clean(llm)
    assert len(llm.generate([[1]], GREEDY, use_tqdm=False)) == 1


def test_aborted_requests_are_told(llm: LLM) -> None:
    told: Any = {}

    def abort_second(step: StepResult) -> None:
        llm.abort([seq.seq_id for seq in llm.scheduler.running if seq.prompt_index == 1])

    told = dict(llm.generate_as_completed([([1], GREEDY), ([2], GREEDY), ([3], GREEDY)], on_step=abort_second))
    assert [told[index]["finish_reason"] for index in range(3)] == ["length", "abort", "length"]


@pytest.mark.parametrize("place", ["requests", "on_step", "step"])
def test_exceptions_leave_nothing_behind(llm: LLM, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def requests() -> Iterator[tuple[list[int], SamplingParams]]:
        yield from draw(20)
        if place == "requests":
            raise KeyboardInterrupt

    def on_step(step: StepResult) -> None:
        if place == "on_step" and step.finished:
            raise KeyboardInterrupt

    if place == "step":
        monkeypatch.setattr(llm.scheduler, "update", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(llm.generate_as_completed(requests(), on_step=on_step))
    monkeypatch.undo()
    assert_clean(llm)
    assert len(list(llm.generate_as_completed(draw(5)))) == 5


def test_one_at_a_time(llm: LLM) -> None:
    running = llm.generate_as_completed(draw(5))
    next(running)
    with pytest.raises(RuntimeError, match="unfinished"):
        llm.generate_as_completed(draw(5))
    running.close()  # type: ignore[attr-defined]
    assert_clean(llm)


def test_memory_does_not_grow_with_the_number_of_requests(checkpoint: Callable[..., Path]) -> None:
    llm = make_llm(checkpoint())
    llm.executor.execute = lambda batch: stub_output(batch)  # type: ignore[method-assign]
    one_token = SamplingParams(temperature=0, max_tokens=1)

    def peak_of(number: int) -> int:
        tracemalloc.start()
        try:
            for _ in llm.generate_as_completed(([i % 300, 2, 3], one_token) for i in range(number)):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_of(100)
    assert peak_of(5_000) - peak_of(500) < 45_000, "10 bytes a request would be"


def stub_output(batch: ScheduledBatch) -> StepOutput:
    return StepOutput(np.ones(len(batch.rows), np.int64))
