"""The tokenizer and the end-of-sequence tokens of a checkpoint, and the way from prompts and conversations to token ids."""

import itertools
import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.utils.text_codec import TextCodec

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]
Refusal = TypeError | ValueError  # why a request can not be run
T = TypeVar("T")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class ChatText(str):
    """A prompt that a chat template made: the special tokens that it needs are in it."""

    __slots__ = ()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None when the folder has none, so that token ids in and out still work."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def load_eos_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Every token that ends a sequence: those of generation_config.json, else of config.json, and the tokenizer's."""
    token_ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not token_ids and (folder / name).exists():
            token_ids |= _read_eos(folder / name)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        token_ids.add(tokenizer.eos_token_id)
    return frozenset(token_ids)


def _read_eos(file: Path) -> set[int]:
    try:
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a config: {error}") from error
    token_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) for token in token_ids):
        raise ValueError(f"{file}: eos_token_id must be a token id or a list of them, got {eos!r}")
    return set(token_ids)


def tokenize(
    prompts: Sequence[Prompt | Refusal],
    names: Sequence[str],
    codec: TextCodec | None,
    vocab_size: int,
) -> list[list[int] | Refusal]:
    """The token ids of prompts that are strings or token ids; the strings are tokenized in one call.

    A tokenizer that begins every text with a beginning-of-sequence token does not add a second one to a text that has it
    already, as the output of many chat templates does.

    Args:
        prompts: those that were refused before stay so.
        names: what errors call each of them.
        codec: of the checkpoint's tokenizer; None if it has none.
        vocab_size: the checkpoint's.

    Returns:
        For each its token ids, or why it has none: neither a string nor token ids, empty, a token outside the vocabulary.
    """
    checked: list[str | list[int] | Refusal] = [
        prompt if isinstance(prompt, Refusal) else _check_types(name, prompt, has_tokenizer=codec is not None)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    texts = {index: one for index, one in enumerate(checked) if isinstance(one, str)}
    encoded = {} if codec is None else _encode(texts, codec)
    return [
        one
        if isinstance(one, Refusal)
        else _check_range(name, encoded[index] if isinstance(one, str) else one, vocab_size, is_given=index not in encoded)
        for index, (one, name) in enumerate(zip(checked, names, strict=True))
    ]


def _check_types(name: str, prompt: object, *, has_tokenizer: bool) -> str | list[int] | Refusal:
    """A text that can be encoded, or token ids as Python's integers; or why it is neither."""
    if isinstance(prompt, str):
        if not has_tokenizer:
            return ValueError(f"{name} is text, but the checkpoint has no tokenizer: give token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            return ValueError(f"{name} is no valid text: {error}")
        return prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        return TypeError(f"{name} must be a str or a list of token ids, got {type(prompt).__name__}")
    if set(map(type, prompt)) <= {int}:
        return list(prompt)
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, Integral):
            return TypeError(f"{name} must be a str or a list of token ids, it holds {token!r}")
    return [int(token) for token in prompt]  # such as numpy's


def _check_range(name: str, token_ids: list[int], vocab_size: int, *, is_given: bool) -> list[int] | Refusal:
    """A tokenizer makes no negative tokens; but it may have more tokens than the model."""
    if not token_ids:
        return ValueError(f"{name} is empty: it needs at least one token")
    if max(token_ids) >= vocab_size or (is_given and min(token_ids) < 0):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        return ValueError(f"{name} has token {wrong}; the vocabulary is 0 to {vocab_size - 1}")
    return token_ids


def _encode(texts: dict[int, str], codec: TextCodec) -> dict[int, list[int]]:
    """The token ids of texts, in one call for each kind."""
    chats = {index: text for index, text in texts.items() if isinstance(text, ChatText)}
    others = {index: text for index, text in texts.items() if index not in chats} if chats else texts
    encoded = dict(zip(chats, codec.encode(list(chats.values()), add_special_tokens=False), strict=True))
    encoded |= zip(others, codec.encode(list(others.values())), strict=True)
    tokenizer = codec.tokenizer
    if tokenizer.bos_token is not None:
        for index, text in others.items():
            if text.startswith(tokenizer.bos_token):
                _drop_second_bos(encoded[index], text, tokenizer)
    return encoded


def _drop_second_bos(token_ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop the first token if it was added to those that `text` itself begins with."""
    bos: str = tokenizer.bos_token
    in_text = next(count for count in itertools.count() if not text.startswith(bos, count * len(bos)))
    in_ids = sum(1 for _ in itertools.takewhile(lambda token: token == tokenizer.bos_token_id, token_ids))
    if in_ids > in_text:
        del token_ids[0]


def is_conversation(prompt: object) -> bool:
    """Whether it is a list that begins with a message."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def render_chats(
    conversations: Sequence[Conversation],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    template_args: Sequence[Mapping[str, Any]],
) -> list[ChatText | Refusal]:
    """The texts that the checkpoint's chat template makes of conversations, ready for the assistant's answer.

    Args:
        conversations: lists of messages.
        names: what errors call each of them.
        tokenizer: the checkpoint's, if it has one.
        template_args: passed on to the template, for each of them.

    Returns:
        For each its text, or why it has none: no conversation, no chat template, or one that refuses it.
    """
    return _render_together(conversations, tokenizer, template_args) or [
        _render_chat(conversation, name, tokenizer, args)
        for conversation, name, args in zip(conversations, names, template_args, strict=True)
    ]


def _render_together(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase | None,
    template_args: Sequence[Mapping[str, Any]],
) -> list[ChatText | Refusal] | None:
    """What `_render_chat` makes of each, by one call; None if they differ in arguments, or one of them may be refused."""
    if tokenizer is None or not conversations or any(args != template_args[0] for args in template_args):
        return None
    options = {"add_generation_prompt": True, **template_args[0]}
    try:
        if not all(isinstance(message, Mapping) for conversation in conversations for message in conversation):
            return None
        texts = tokenizer.apply_chat_template(list(map(list, conversations)), tokenize=False, **options)
    except Exception:  # see `_render_chat`, which will say which it is
        return None
    return list(map(ChatText, texts))


def _render_chat(
    conversation: Conversation, name: str, tokenizer: PreTrainedTokenizerBase | None, template_args: Mapping[str, Any]
) -> ChatText | Refusal:
    if tokenizer is None or not tokenizer.chat_template:
        missing = "tokenizer" if tokenizer is None else "chat template"
        return ValueError(f"the checkpoint has no {missing}: chat needs one. Use generate with prompts of your own")
    if not isinstance(conversation, Sequence) or not all(isinstance(message, Mapping) for message in conversation):
        return TypeError(f"{name} must be a list of messages, dicts with 'role' and 'content'")
    options = {"add_generation_prompt": True, **template_args}
    try:
        return ChatText(tokenizer.apply_chat_template(list(conversation), tokenize=False, **options))
    except Exception as error:  # whatever the template's code raises
        return ValueError(f"the chat template refuses {name}: {error}")


def raise_refused(checked: Sequence[T | Refusal]) -> list[T]:
    """Those that were checked, none of which was refused.

    Raises:
        TypeError, ValueError: one was; the first.
    """
    for one in checked:
        if isinstance(one, Refusal):
            raise one
    return [one for one in checked if not isinstance(one, Refusal)]
