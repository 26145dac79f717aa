"""From rows to requests: what a body may hold, and the reason for every row that cannot run."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.batch.reader import InputRow
from nanovllm.batch.requests import BatchRequest, RowParser
from nanovllm.batch.rows import BadRow, Row, open_row

MESSAGES = [{"role": "user", "content": "Hi"}]
DEFAULTS = {"max_tokens": 100, "temperature": 0.5}


def read(content: Any, number: int = 7) -> BatchRequest | BadRow:
    row = open_row(InputRow(number, content if isinstance(content, bytes) else json.dumps(content).encode()))
    return RowParser(DEFAULTS, {"enable_thinking": False}, seed=3).parse(row) if isinstance(row, Row) else row


def read_good(content: Any, number: int = 7) -> BatchRequest:
    row = read(content, number)
    assert isinstance(row, BatchRequest), row
    return row


def chat(**body: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": MESSAGES, **body}
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}


def text(**body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", **body}}


def test_chat_in_openais_format() -> None:
    row = read_good(chat(max_completion_tokens=5, top_p=0.9, stop=["a"], logit_bias={"12": -3}, user="me", stream=False))
    assert (row.number, row.custom_id, row.is_chat) == (7, "a", True)
    assert row.request.prompt == MESSAGES
    assert row.request.template_args == {"enable_thinking": False}
    expected = SamplingParams(temperature=0.5, max_tokens=5, top_p=0.9, stop="a", logit_bias={12: -3.0})
    assert row.request.sampling_params == expected


def test_completion_in_openais_format() -> None:
    extras = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "stop_token_ids": [3],
        "min_tokens": 2,
        "ignore_eos": True,
    }
    others = {"prompt_logprobs": 1, "skip_special_tokens": False, "include_stop_str_in_output": True, "logprobs": 3}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "allowed_token_ids": [3, 4], "seed": 11, "n": 2}
    row = read_good(text(prompt=[1, 2, 3], **extras, **others, **penalties, suffix=None))
    assert row.request.prompt == [1, 2, 3]
    assert not row.is_chat
    assert row.request.template_args == {}
    assert row.request.sampling_params == SamplingParams(**DEFAULTS, **extras, **others, **penalties)


def test_plain_rows() -> None:
    row = read_good({"prompt": "Hi", "max_tokens": 3})
    assert (row.custom_id, row.is_chat, row.request.prompt) == (None, False, "Hi")
    row = read_good({"custom_id": 5, "messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": True, "x": 1}})
    assert (row.custom_id, row.is_chat, row.request.prompt) == (5, True, MESSAGES)
    assert row.request.template_args == {"enable_thinking": True, "x": 1}


def test_logprobs_of_chats_are_told_apart() -> None:
    assert read_good(chat(logprobs=True)).request.sampling_params.logprobs == 0
    assert read_good(chat(logprobs=True, top_logprobs=4)).request.sampling_params.logprobs == 4
    assert read_good(chat(logprobs=False)).request.sampling_params.logprobs is None


def test_contents_in_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    row = read_good(chat(messages=[{"role": "user", "content": parts, "name": None}]))
    assert row.request.prompt == [{"role": "user", "content": "Hello"}]


def test_seeds_are_functions_of_the_number() -> None:
    seeds = [read_good(text(), number).request.seed for number in range(100)]
    assert len(set(seeds)) == 100
    assert seeds[5] == read_good(chat(), 5).request.seed


def test_rows_that_say_the_same_share_their_sampling_params(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.batch.requests.MAX_OPTIONS", 3)
    parser = RowParser({"max_tokens": 3, "seed": 5}, {}, seed=3)

    def params_of(**body: Any) -> SamplingParams:
        row = open_row(InputRow(0, json.dumps(text(**body)).encode()))
        request = parser.parse(row)  # type: ignore[arg-type]
        assert isinstance(request, BatchRequest)
        return request.request.sampling_params

    first = params_of(top_k=1, stop=["a"])
    assert params_of(top_k=1, stop=["a"], user="other") is first
    assert first == SamplingParams(max_tokens=3, top_k=1, stop=["a"])  # the row's own number makes its seed
    assert params_of(seed=1).seed == 1
    with pytest.raises(AssertionError):
        params_of(seed=True)
    for number in range(10):
        assert params_of(top_k=number).top_k == number
        assert len(parser._options) <= 3


BAD: list[tuple[Any, str, str]] = [
    (b"{", "invalid_json", "not JSON"),
    (b"\xff{}", "invalid_json", "not JSON"),
    (b"[" * 100_000, "invalid_json", "maximum recursion depth"),
    (b"null", "invalid_row", "must be an object, got NoneType"),
    ([1], "invalid_row", "must be an object, got list"),
    ({}, "invalid_request", "either prompt or messages"),
    ({"prompt": "x", "messages": MESSAGES}, "invalid_request", "it has both"),
    ({"prompt": "x", "max_token": 3}, "invalid_request", "unknown field 'max_token'; did you mean 'max_tokens'?"),
    ({"prompt": "x", "custom_id": [1]}, "invalid_request", "custom_id must be a string, got [1]"),
    ({**text(), "custom_id": None}, "invalid_request", "custom_id must be a string, got None"),
    ({**text(), "custom_id": 3}, "invalid_request", "custom_id must be a string, got 3"),
    ({**text(), "temperature": 1}, "invalid_request", "unknown field 'temperature' beside body"),
    ({**text(), "method": "GET"}, "invalid_request", "method must be 'POST', got 'GET'"),
    ({**text(), "url": "/v1/embeddings"}, "invalid_request", "url must be '/v1/chat/completions' or"),
    ({**text(), "url": "/v1/chat/completions"}, "invalid_request", "must have messages, not prompt"),
    ({**chat(), "url": "/v1/completions"}, "invalid_request", "must have prompt, not messages"),
    ({**chat(), "body": 3}, "invalid_request", "body must be an object, got int"),
    ({**chat(), "body": None}, "invalid_request", "body must be an object, got NoneType"),
    (text(prompt=["a", "b"]), "invalid_request", "one string or one list of token ids"),
    (text(stream=True), "invalid_request", "stream=True is not supported"),
    (chat(tools=[{"type": "function"}]), "invalid_request", "tools=[{"),
    (chat(response_format={"type": "json_object"}), "invalid_request", "response_format={"),
    (chat(messages=[]), "invalid_request", "messages must be a list of objects, not empty"),
    (chat(messages="Hi"), "invalid_request", "messages must be a list of objects"),
    (chat(messages=["Hi"]), "invalid_request", "each of messages must be an object with role and content"),
    (chat(messages=[{"role": "user", "content": 3}]), "invalid_request", "content of a message must be a string"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "invalid_request", "must be of type text"),
    (chat(logprobs=3), "invalid_request", "must be true or false, got 3: use top_logprobs"),
    (chat(top_logprobs=3), "invalid_request", "top_logprobs needs logprobs"),
    (text(top_logprobs=3), "invalid_request", "top_logprobs is for chats"),
    (text(chat_template_kwargs={"x": 1}), "invalid_request", "chat_template_kwargs must be an object, beside messages"),
    (text(max_tokens=3, max_completion_tokens=4), "invalid_request", "max_tokens and max_completion_tokens differ"),
    (text(max_tokens=0), "invalid_request", "max_tokens must be at least 1, got 0"),
    (text(temperature="hot"), "invalid_request", "temperature must be a number, got 'hot'"),
    (text(temperature=10**400), "invalid_request", "temperature must be finite"),
    (text(n=3, temperature=0), "invalid_request", "n must be 1 at temperature 0"),
    (text(logit_bias={"a": 1}), "invalid_request", "each token id of logit_bias must be an integer, got 'a'"),
    (text(logit_bias=[[1, 2, 3]]), "invalid_request", "too many values"),
]


@pytest.mark.parametrize(("content", "code", "message"), BAD)
def test_bad_rows_say_why(content: Any, code: str, message: str) -> None:
    bad = read(content)
    assert isinstance(bad, BadRow)
    assert (bad.number, bad.code) == (7, code)
    assert message in bad.message


@pytest.mark.parametrize("innermost", ["", "1"])
def test_how_deep_rows_may_be_nested(innermost: str) -> None:
    """Below Python's limit of recursion there are values that can be read, but not compared, or shown in an error."""
    for name in ("stop", "chat_template_kwargs", "no_field", "user", "prompt"):
        for depth in (98, 99, 100, *range(800, 1000)):
            fields = f'{{"prompt": "x", "{name}": [1, {"[" * (depth - 1)}{innermost}{"]" * (depth - 1)}]}}'
            for row in (fields.encode(), {**text(), "body": fields}):
                result = read(row)
                if depth < 100:  # and the row itself is a level
                    assert isinstance(result, BatchRequest) == (name in ("user", "prompt"))
                else:
                    assert isinstance(result, BadRow)
                    assert "nested deeper than 100 levels" in result.message or "maximum recursion" in result.message


def test_brackets_in_text_are_no_nesting() -> None:
    read_good({"prompt": "[{" * 1000, "stop": ["{" * 1000]})
    assert isinstance(read(json.dumps("[" * 1000).encode()), BadRow)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*SamplingParams.__dataclass_fields__, "prompt", "messages", "max_completion_tokens", "top_logprobs"]
FIELDS += ["chat_template_kwargs", "model", "stream", "tools", "best_of", "custom_id", "method", "url", "body"]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4), st.booleans(), st.booleans())
def test_no_row_stops_the_others(content: dict[str, Any], is_chat: bool, is_plain: bool) -> None:
    """Whatever is in a row, it is a request or has a reason why not."""
    envelope = chat() if is_chat else text()
    row = {**envelope["body"], **content} if is_plain else {**envelope, "body": {**envelope["body"], **content}}
    result = read(row)
    assert isinstance(result, BatchRequest) or result.message
