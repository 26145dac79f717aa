"""From texts to token ids and back: by the checkpoint's tokenizer, and where there are many, by fastokens, which is faster.

What the checkpoint's tokenizer gives is right. fastokens takes a second to be made, on a thread of its own; then it takes
over, if it gives the same for the texts that come next. What it does not support, or refuses, is left to the other.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastokens import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ENOUGH = 500_000  # characters that show that there are many texts: the other takes a tenth of a second for them
TRIAL = 50_000  # characters for which the two must give the same tokens
TEXTS_AT_ONCE = 2048


class TextCodec:
    """Texts <-> token ids.

    Args:
        tokenizer: the checkpoint's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # of Rust; not every tokenizer has one
        self._num_characters = 0
        self._num_agreed = 0  # characters of which the two made the same
        self._vocab_size = 0  # of what fastokens was made of
        self._candidate: Future[FastTokenizer] | None = None  # being made, or to be tried out
        self._fast: FastTokenizer | None = None  # in use
        self._is_settled = self._backend is None  # whether it is in use, or never will be

    def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """What `tokenizer(texts)["input_ids"]` is."""
        result: list[list[int]] = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[first : first + TEXTS_AT_ONCE]
            token_ids = None if self._fast is None else self._encode_fast(self._fast, some, add_special_tokens)
            if token_ids is None:
                token_ids = self._encode(some, add_special_tokens)
                self._consider(some, add_special_tokens, token_ids)
            result += token_ids
        return result

    def decode(self, token_ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """What `tokenizer.decode` makes of each, without a cleaning of spaces."""
        if self._backend is None:
            options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
            texts: list[str] = self.tokenizer.batch_decode(token_ids, **options)
        elif self._fast is not None and self._is_current() and self._is_byte_level():
            texts = self._fast.decode_batch(token_ids, skip_special_tokens)
        else:
            texts = self._backend.decode_batch(token_ids, skip_special_tokens=skip_special_tokens)
        return texts

    def _is_current(self) -> bool:
        """Whether no tokens were added to the tokenizer after fastokens was made of it."""
        return self._backend.get_vocab_size() == self._vocab_size

    def _is_byte_level(self) -> bool:
        """Whether tokens are bytes, which fastokens decodes as the other does; not so all that other kinds make of them."""
        return isinstance(self._backend.decoder, ByteLevel)

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """By the checkpoint's tokenizer; one of Rust is called itself, which saves a third of the time."""
        if self._backend is None:
            token_ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
            return token_ids
        self._backend.no_truncation()  # which its file may ask for, and Transformers undoes
        self._backend.no_padding()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def _encode_fast(self, fast: FastTokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]] | None:
        """By fastokens; None if it refuses a text, or tokens were added to the tokenizer after it was made."""
        if not self._is_current():
            return None
        try:
            return [encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens)]
        except ValueError:  # such as a byte without a token, which the other leaves out
            return None

    def _consider(self, texts: list[str], add_special_tokens: bool, token_ids: list[list[int]]) -> None:
        """Whether it is time to make a faster tokenizer, or for one that is made to take over."""
        if self._is_settled:
            return
        num_characters = sum(map(len, texts))
        if self._candidate is None:
            self._num_characters += num_characters
            if self._num_characters >= ENOUGH:
                self._candidate = self._begin_to_make()
        elif self._candidate.done():
            error = self._candidate.exception()
            if error is not None:
                logger.info("fastokens does not support this tokenizer: %s", error)
                self._is_settled = True
            elif (encoded := self._encode_fast(self._candidate.result(), texts, add_special_tokens)) is not None:
                fast = self._candidate.result()
                self._num_agreed += num_characters
                self._settle(fast, agrees=encoded == token_ids and self._decodes_alike(fast, token_ids))

    def _decodes_alike(self, fast: FastTokenizer, token_ids: list[list[int]]) -> bool:
        expected = self._backend.decode_batch(token_ids, skip_special_tokens=False)
        return not self._is_byte_level() or fast.decode_batch(token_ids, skip_special_tokens=False) == expected

    def _begin_to_make(self) -> Future[FastTokenizer]:
        self._vocab_size = self._backend.get_vocab_size()
        pool = ThreadPoolExecutor(1, "make-fastokens")
        future = pool.submit(FastTokenizer.from_json_str, self._backend.to_str())
        pool.shutdown(wait=False)
        return future

    def _settle(self, fast: FastTokenizer, agrees: bool) -> None:
        """Let it take over once it has given enough texts their tokens."""
        if not agrees:
            logger.warning("fastokens is not used: it gives other tokens or texts than this tokenizer")
            self._is_settled = True
        elif self._num_agreed >= TRIAL:
            self._fast, self._is_settled = fast, True
