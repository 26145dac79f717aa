"""Chat: the checkpoint's template, its arguments, and what cannot be a conversation."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.utils.tokenizer import render_chats

GREEDY = SamplingParams(temperature=0, max_tokens=6)
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture(scope="module")
def llm(tiny_text_model: Path) -> Iterator[LLM]:
    with LLM(tiny_text_model, max_model_len=128, num_kvcache_blocks=64, device="cpu", dtype="float32") as llm:
        yield llm


def test_chat_is_generate_on_the_template(llm: LLM) -> None:
    other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}]
    outputs = llm.chat([QUESTION, other], GREEDY, use_tqdm=False)
    prompts = [
        llm.tokenizer.apply_chat_template(one, tokenize=True, add_generation_prompt=True, return_dict=False)
        for one in (QUESTION, other)
    ]
    expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [one["token_ids"] for one in outputs] == [one["token_ids"] for one in expected]
    assert [one["num_prompt_tokens"] for one in outputs] == [len(prompt) for prompt in prompts]
    assert llm.chat(QUESTION, GREEDY, use_tqdm=False)[0]["token_ids"] == outputs[0]["token_ids"]


def test_template_args_reach_the_template(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking %} yes{% else %} no no{% endif %}"
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    lengths = {
        thinking: llm.chat(QUESTION, GREEDY, use_tqdm=False, enable_thinking=thinking)[0]["num_prompt_tokens"]
        for thinking in (True, False)
    }
    assert lengths[False] == lengths[True] + 1


def test_no_template_is_said(llm: LLM, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        llm.chat(QUESTION)
    without = LLM(checkpoint(), max_model_len=64, num_kvcache_blocks=8, device="cpu")
    with pytest.raises(ValueError, match="no tokenizer"):
        without.chat(QUESTION)


def test_what_is_no_conversation_is_refused_by_its_index(llm: LLM) -> None:
    with pytest.raises(TypeError, match="conversation 1 must be a list of messages"):
        llm.chat([QUESTION, "hello"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="refuses conversation 1"):
        llm.chat([QUESTION, [{"role": "user"}, {"content": "x"}]])
    assert llm.is_finished()
    assert llm.chat([], use_tqdm=False) == []


@pytest.mark.parametrize(
    "odd",
    [
        {"role": "user", "content": "What is next?"},
        "no message",
        {"role": "user", "content": "half of a pair: \ud83d"},
        {"content": "whose?"},
    ],
    ids=["as good as the others", "a text", "no text", "no role"],
)
def test_conversations_are_rendered_together_as_each_is_alone(llm: LLM, odd: Any) -> None:
    good = [[{"role": "user", "content": f"What is {number}?"}] for number in range(4)]
    batch: list[Any] = [*good[:2], [{"role": "user", "content": "Hm."}, odd], *good[2:]]
    together = render_chats(batch, list("abcde"), llm.tokenizer, [{}] * 5)
    alone = [render_chats([one], [name], llm.tokenizer, [{}])[0] for one, name in zip(batch, "abcde", strict=True)]
    assert list(map(repr, together)) == list(map(repr, alone))
