"""Detokenizer: the text of one completion, token by token, and the stop strings in it.

A token costs the same however long the text is: only a window of the last tokens is decoded, and only text that is not
shown yet is searched. Text is shown once no later token can change it: whole characters, and nothing that may turn out to
be the beginning of a stop string.
"""

from transformers import PreTrainedTokenizerBase

from nanovllm.sampling_params import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character, or not yet one, are decoded to
LONG_WINDOW = 8  # tokens; a character has four bytes at most, so most of a longer window is settled


def decode(tokenizer: PreTrainedTokenizerBase | None, token_ids: list[int], skip_special_tokens: bool) -> str:
    """The text of `token_ids`, as the tokenizer's decoder gives it; "" without a tokenizer."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return text


class Detokenizer:
    """Tokens in, text out.

    Args:
        tokenizer: the checkpoint's, if it has one.
        params: the request's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._stop: tuple[str, ...] = tuple(params.stop)
        self._skipped = frozenset(tokenizer.all_special_ids if tokenizer and params.skip_special_tokens else ())
        self._context: list[int] = []  # tokens whose text is known: what precedes a token can change its text
        self._context_text = ""
        self._pending: list[int] = []  # tokens after them, whose text is not
        self._held = ""  # text that may begin a stop string
        self._pieces: list[str] = []  # text that can be shown
        self._num_taken = 0
        self.num_tokens = 0
        self.stop_string: str | None = None  # the one that was found; no more tokens are taken after it

    @property
    def text(self) -> str:
        """All that can be shown so far."""
        return "".join(self._pieces)

    def take(self) -> str:
        """What can be shown and was not taken before."""
        new = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return new

    def push(self, token_id: int) -> None:
        """Take in a token."""
        self.num_tokens += 1
        if token_id not in self._skipped:
            self._pending.append(token_id)
            self._show(self._decode_pending())

    def finish(self) -> None:
        """No token follows: what is held back is shown as it is."""
        if self.stop_string is None:
            self._show(self._decode(self._context + self._pending)[len(self._context_text) :])
            self._pieces.append(self._held)
        self._pending, self._held = [], ""

    # ---- tokens to characters ----

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self._tokenizer, token_ids, self._params.skip_special_tokens)

    def _decode_pending(self) -> str:
        """The text of the pending tokens, as far as it is settled; they become the context then."""
        text = self._decode(self._context + self._pending)[len(self._context_text) :]
        if text.endswith(REPLACEMENT):
            return self._settle_part(text) if len(self._pending) > LONG_WINDOW else ""
        if not text:
            return ""
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return text

    def _settle_part(self, text: str) -> str:
        """Bytes that are no characters go on and on: settle those before a place where no character is cut."""
        for cut in range(len(self._pending) - 4, 0, -1):
            left, right = self._pending[:cut], self._pending[cut:]
            settled = self._decode(self._context + left)[len(self._context_text) :]
            if settled and settled + self._decode(left + right)[len(self._decode(left)) :] == text:
                self._context, self._pending = left, right
                self._context_text = self._decode(left)
                return settled
        return ""

    # ---- stop strings ----

    def _show(self, text: str) -> None:
        """Show new text up to a stop string, or up to what may begin one."""
        if not text:
            return
        text = self._held + text
        if self._stop and self.num_tokens > self._params.min_tokens:
            found = [(text.find(stop) + len(stop), place) for place, stop in enumerate(self._stop) if stop in text]
            if found:
                end, place = min(found)  # the one that is complete first
                self.stop_string = self._stop[place]
                kept = end if self._params.include_stop_str_in_output else end - len(self.stop_string)
                self._pieces.append(text[:kept])
                self._held = ""
                return
        num_held = self._may_begin_stop(text)
        self._held = text[len(text) - num_held :]
        self._pieces.append(text[: len(text) - num_held])

    def _may_begin_stop(self, text: str) -> int:
        """How many characters at the end of `text` begin a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop if len(stop) > length):
                return length
        return 0
