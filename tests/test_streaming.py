"""Streaming, stop strings, aborting: the pieces are `generate`'s text, and whoever leaves early leaves nothing behind."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanovllm import LLM, SamplingParams
from nanovllm.engine.detokenizer import LONG_WINDOW, Detokenizer
from nanovllm.outputs import RequestOutput, StreamEvent

PROMPTS = ["Once upon a time", "The capital of France is", "Привет, мир", "1, 2, 3,"]


@pytest.fixture(scope="module")
def llm(tiny_text_model: Path) -> Iterator[LLM]:
    with LLM(tiny_text_model, max_model_len=128, num_kvcache_blocks=64, device="cpu", dtype="float32") as llm:
        yield llm


def join(events: list[StreamEvent]) -> dict[tuple[int, int], tuple[str, list[int], Any, Any]]:
    """By (prompt, completion): text, tokens, finish reason and stop reason."""
    texts: defaultdict[tuple[int, int], list[StreamEvent]] = defaultdict(list)
    for event in events:
        texts[event["index"], event["completion"]].append(event)
    result = {}
    for key, parts in texts.items():
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        text = "".join(part["text"] for part in parts)
        tokens = [token for part in parts for token in part["token_ids"]]
        result[key] = (text, tokens, parts[-1]["finish_reason"], parts[-1]["stop_reason"])
    return result


def is_clean(llm: LLM) -> bool:
    manager = llm.scheduler.block_manager
    return llm.is_finished() and manager.num_free_blocks == manager.num_blocks and not llm.output_processor._followed


def complete(llm: LLM, **options: Any) -> RequestOutput:
    """One completion, always by the same numbers."""
    return llm.generate(["1, 2, 3,"], SamplingParams(seed=1, temperature=0.7, **options), use_tqdm=False)[0]


def test_pieces_are_the_text_of_generate(llm: LLM) -> None:
    stop = complete(llm, max_tokens=30)["text"][-4:]
    params = [
        SamplingParams(temperature=0, max_tokens=30),
        SamplingParams(temperature=1.0, seed=5, max_tokens=30, n=3),
        SamplingParams(temperature=2.5, seed=6, max_tokens=30, skip_special_tokens=False, logit_bias={2: 5.0, 1: 5.0}),
        SamplingParams(temperature=0.7, seed=1, max_tokens=40, stop=[stop, "zebra"], include_stop_str_in_output=True),
    ]
    prompts = [*PROMPTS[:3], "1, 2, 3,"]
    expected = llm.generate(prompts, params, use_tqdm=False)
    joined = join(list(llm.stream(prompts, params)))
    for index, output in enumerate(expected):
        for number, one in enumerate(output.get("completions", [output])):
            assert joined[index, number] == (one["text"], one["token_ids"], one["finish_reason"], one["stop_reason"])
    assert expected[3]["text"].endswith(stop)
    assert expected[3]["stop_reason"] == stop
    assert is_clean(llm)


def test_events_carry_the_log_probabilities_of_their_tokens(llm: LLM) -> None:
    params = [SamplingParams(seed=1, max_tokens=9, logprobs=2), SamplingParams(seed=2, max_tokens=5)]
    expected = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    events = list(llm.stream(PROMPTS[:2], params))
    assert all(event["logprobs"] is None for event in events if event["index"] == 1)
    of_first = [event for event in events if event["index"] == 0]
    assert [len(event["logprobs"] or []) for event in of_first] == [len(event["token_ids"]) for event in of_first]
    assert [one for event in of_first for one in event["logprobs"] or []] == expected[0]["logprobs"]


def test_stop_string_ends_the_text_before_it_and_no_part_of_it_is_shown(llm: LLM) -> None:
    whole = complete(llm, max_tokens=24)
    for length in (1, 3, 7, 20):
        stop = whole["text"][15 : 15 + length]  # begins and ends wherever that is in a token
        params = SamplingParams(seed=1, temperature=0.7, max_tokens=24, stop=["never seen", stop])
        (output,) = llm.generate(["1, 2, 3,"], params, use_tqdm=False)
        assert output["text"] == whole["text"][: whole["text"].index(stop)]
        assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop)
        assert output["token_ids"] == whole["token_ids"][: len(output["token_ids"])]
        shown = ""
        for event in llm.stream(["1, 2, 3,"], params):
            shown += event["text"]
            assert output["text"].startswith(shown)
        assert shown == output["text"]


def test_stop_string_in_the_last_token_and_min_tokens(llm: LLM) -> None:
    whole = complete(llm, max_tokens=12)
    letter = llm.tokenizer.decode(whole["token_ids"][:3])[-1]
    first = whole["text"].index(letter)
    number = next(n for n in range(1, 4) if len(llm.tokenizer.decode(whole["token_ids"][:n])) > first)
    assert complete(llm, max_tokens=number, stop=letter)["finish_reason"] == "stop"
    common = max("aeiou ", key=complete(llm, max_tokens=60)["text"].count)
    late = complete(llm, max_tokens=60, stop=[common], min_tokens=20)
    assert len(late["token_ids"]) > 20
    assert common in late["text"]
    assert late["stop_reason"] == common


def test_stop_token_is_in_the_tokens_and_not_in_the_text(llm: LLM) -> None:
    whole = complete(llm, max_tokens=12)
    token = whole["token_ids"][4]
    end = whole["token_ids"].index(token) + 1
    for include in (False, True):
        options: dict[str, Any] = {"max_tokens": 12, "stop_token_ids": [token], "include_stop_str_in_output": include}
        output = complete(llm, **options)
        assert (output["finish_reason"], output["stop_reason"]) == ("stop", token)
        assert output["token_ids"] == whole["token_ids"][:end]
        text = llm.tokenizer.decode(output["token_ids"][: end if include else end - 1])
        streamed = join(list(llm.stream(["1, 2, 3,"], SamplingParams(seed=1, temperature=0.7, **options))))
        assert output["text"] == text == streamed[0, 0][0]


def test_leaving_early_frees_everything_and_the_engine_goes_on(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    for number, _ in enumerate(llm.stream(PROMPTS, SamplingParams(temperature=0, max_tokens=100))):
        if number == 5:
            break
    assert is_clean(llm)
    again = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert [one["text"] for one in again] == [one["text"] for one in expected]


def test_a_second_call_in_the_loop_is_refused(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[:1], SamplingParams(max_tokens=20))
    next(stream)
    with pytest.raises(RuntimeError, match="unfinished"):
        llm.generate(PROMPTS[:1], use_tqdm=False)
    stream.close()  # type: ignore[attr-defined]
    assert is_clean(llm)


def test_requests_are_checked_at_once(llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        llm.stream([[1], []])


def test_abort_in_the_loop(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (_, expected) = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    events = []
    for event in llm.stream(PROMPTS[:2], params):
        events.append(event)
        if event["index"] == 0 and len(events) == 5:
            llm.abort(event["request_id"])
    joined = join(events)
    assert joined[0, 0][2] == "abort"
    assert 2 <= len(joined[0, 0][1]) < 20
    assert joined[1, 0] == (expected["text"], expected["token_ids"], "length", None)
    assert is_clean(llm)


def test_abort_of_added_requests(llm: LLM) -> None:
    ids = [llm.add_request(prompt, SamplingParams(max_tokens=6, ignore_eos=True)) for prompt in PROMPTS]
    llm.abort(ids[1])
    llm.step()
    llm.abort([ids[3], 10**9])
    finished = []
    while not llm.is_finished():
        finished += [seq_id for seq_id, _ in llm.step()[0]]
    assert finished == [ids[0], ids[2]]
    assert is_clean(llm)


# ---- the detokenizer alone ----


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.all_special_ids = tokenizer.all_special_ids
        self.num_decoded = 0

    def decode(self, token_ids: list[int], **options: Any) -> str:
        self.num_decoded += len(token_ids)
        return self._tokenizer.decode(token_ids, **options)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def detokenize(tokenizer: Any, token_ids: list[int], **options: Any) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=10**6, **options))
    pieces = []
    for token_id in token_ids:
        detokenizer.push(token_id)
        pieces.append(detokenizer.take())
    detokenizer.finish()
    return [*pieces, detokenizer.take()], detokenizer


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_tokens_are_the_decoded_text(tokenizer: Any, seed: int, skip: bool) -> None:
    rng = Random(seed)
    texts = ["héllo wörld ", "你好世界", "👩‍👩‍👧‍👦🏳️‍🌈 ", "мир", " the end.", "\n\n  x", "😀"]
    token_ids: list[int] = []
    for _ in range(12):
        token_ids += tokenizer(rng.choice(texts))["input_ids"]
        token_ids += [rng.randrange(49152) for _ in range(rng.choice([0, 0, 3]))]  # bytes that are no characters
        token_ids += rng.choices([*tokenizer("😀")["input_ids"], 0, 1, 2], k=rng.choice([0, 2, 30]))
    pieces, _ = detokenize(tokenizer, token_ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def test_no_half_characters(tokenizer: Any) -> None:
    text = "a😀b👩‍👩‍👧‍👦你"
    token_ids = tokenizer(text)["input_ids"]
    assert len(token_ids) > len(text)
    pieces, _ = detokenize(tokenizer, token_ids)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["words", "halves of characters"])
def test_a_token_costs_the_same_however_long_the_text_is(tokenizer: Any, kind: str) -> None:
    unit = tokenizer(" and so on")["input_ids"] if kind == "words" else tokenizer("😀")["input_ids"][:1]
    costs = []
    for number in (300, 3000):
        counting = Counting(tokenizer)
        detokenize(counting, (unit * number)[:number])
        costs.append(counting.num_decoded / number)
    assert costs[1] < 1.1 * costs[0] < 1.1 * 20 * LONG_WINDOW


@pytest.mark.parametrize(
    ("text", "stop", "shown", "found"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("aaab", ["aab"], "a", "aab"),
        ("abcabd", ["abd"], "abc", "abd"),
        ("abc", ["bcd"], "abc", None),
        ("hello world", ["lo w", "o"], "hell", "o"),
        ("x</s>y", ["</s>", "</"], "x", "</"),
    ],
)
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(tokenizer: Any, text: str, stop: list[str], shown: str, found: str | None, include: bool) -> None:
    token_ids = [token for character in text for token in tokenizer(character)["input_ids"]]
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stop, include_stop_str_in_output=include))
    for token_id in token_ids:
        detokenizer.push(token_id)
        assert shown.startswith(detokenizer.text) or detokenizer.stop_string is not None
        if detokenizer.stop_string is not None:
            break
    detokenizer.finish()
    assert detokenizer.stop_string == found
    assert detokenizer.text == shown + (found or "") * include
