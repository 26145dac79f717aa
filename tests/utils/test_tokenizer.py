"""tokenize: what is done with a beginning-of-sequence token that a text already has."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanovllm.utils.text_codec import TextCodec
from nanovllm.utils.tokenizer import raise_refused, tokenize

BOS = 1
VOCAB_SIZE = 300


@dataclass
class StubTokenizer:
    """Each character is a token, and `<s>` is one; every text begins with that token if `adds_bos`."""

    adds_bos: bool = True
    bos_token: str | None = "<s>"
    calls: list[list[str]] = field(default_factory=list)

    @property
    def bos_token_id(self) -> int | None:
        return BOS if self.bos_token else None

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        self.calls.append(texts)
        return {"input_ids": [[BOS] * (self.adds_bos and add_special_tokens) + self.encode(text) for text in texts]}

    def encode(self, text: str) -> list[int]:
        pieces = text.split("<s>")
        token_ids = [ord(char) for char in pieces[0]]
        for piece in pieces[1:]:
            token_ids += [BOS, *map(ord, piece)]
        return token_ids


def run(tokenizer: Any, *prompts: str | list[int]) -> list[list[int]]:
    return raise_refused(tokenize(prompts, [""] * len(prompts), TextCodec(tokenizer), VOCAB_SIZE))


def test_a_text_that_has_the_token_gets_no_second_one() -> None:
    assert run(StubTokenizer(), "<s>ab") == [[BOS, 97, 98]]


def test_a_text_without_the_token_gets_one() -> None:
    assert run(StubTokenizer(), "ab", "a<s>b") == [[BOS, 97, 98], [BOS, 97, BOS, 98]]


def test_tokens_that_the_text_repeats_are_its_own() -> None:
    assert run(StubTokenizer(), "<s><s>a") == [[BOS, BOS, 97]]


@pytest.mark.parametrize("text", ["<s>ab", "ab", "a<s><s>b"])
def test_a_tokenizer_that_adds_none_is_left_alone(text: str) -> None:
    tokenizer = StubTokenizer(adds_bos=False)
    assert run(tokenizer, text) == [tokenizer.encode(text)]


def test_a_tokenizer_without_such_a_token_is_left_alone() -> None:
    tokenizer = StubTokenizer(adds_bos=False, bos_token=None)
    assert run(tokenizer, "ab") == [[97, 98]]


def test_token_ids_are_taken_as_they_are() -> None:
    assert run(StubTokenizer(), [BOS, BOS, 97], "<s>a", [BOS]) == [[BOS, BOS, 97], [BOS, 97], [BOS]]


def test_all_texts_are_tokenized_in_one_call() -> None:
    tokenizer = StubTokenizer()
    run(tokenizer, "a", [5], "<s>b", "c")
    assert tokenizer.calls == [["a", "<s>b", "c"]]


def test_an_empty_text_that_begins_with_the_token_is_that_token() -> None:
    assert run(StubTokenizer(), "", "<s>") == [[BOS], [BOS]]


def test_tokens_are_those_of_transformers_and_all_of_them(tiny_text_model: Path) -> None:
    """Also where the tokenizer's own file asks for truncation and padding."""
    texts = ["one two three four five six", "Привет, мир", "<|im_start|>user", " "]
    tokenizer = AutoTokenizer.from_pretrained(tiny_text_model)
    expected = tokenizer(texts)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    checked = tokenize(texts, texts, TextCodec(tokenizer), len(tokenizer))
    assert raise_refused(checked) == expected
