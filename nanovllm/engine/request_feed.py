"""RequestFeed: requests of an iterable of any length, taken in as the scheduler needs them."""

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import MAX_SEED, SamplingParams, check_int
from nanovllm.utils.tokenizer import Conversation, Prompt, Refusal, is_conversation, render_chats


class Request(NamedTuple):
    """What `LLM.generate_as_completed` is given; the first two may come as a pair.

    prompt: a text, token ids, or a conversation: a list of messages, of which the chat template makes a text.
    sampling_params: how to continue it.
    template_args: passed on to the chat template.
    name: what errors call it; None: "request INDEX".
    seed: where its sampling parameters have none; so that those can be shared by requests that are alike but for it.
    """

    prompt: Prompt | Conversation
    sampling_params: SamplingParams
    template_args: Mapping[str, Any] = MappingProxyType({})
    name: str | None = None
    seed: int | None = None


class RequestFeed(Iterator[list[Sequence]]):
    """Iterates over the sequences to queue before the next step, none if enough are waiting.

    It owns what is known of requests that are unfinished: their sequences, by their index in the iterable.

    Args:
        requests: what to read.
        engine: whose scheduler is to be kept busy.
    """

    def __init__(
        self, requests: Iterable[Request | tuple[Prompt | Conversation, SamplingParams]], engine: LLMEngine
    ) -> None:
        self._requests = enumerate(requests)
        self._engine = engine
        self._refused: list[tuple[int, Refusal]] = []
        self._unfinished: dict[int, list[Sequence]] = {}

    def __next__(self) -> list[Sequence]:
        scheduler = self._engine.scheduler
        if len(scheduler.waiting) >= scheduler.max_num_seqs:
            return []
        # Up to twice as many, so that the tokenizer, whose every call costs, is called for many at once.
        batch = self._read(2 * scheduler.max_num_seqs - len(scheduler.waiting))
        if not batch:
            raise StopIteration
        return self._take_in(batch)

    def take_refused(self) -> list[tuple[int, Refusal]]:
        """Requests that can not be run and have not been taken yet, and why."""
        refused, self._refused = self._refused, []
        return refused

    def take_completed(self, finished: Iterable[Sequence]) -> dict[int, list[Sequence]]:
        """The requests of which `finished` are the last sequences to finish; they are forgotten here."""
        completed: dict[int, list[Sequence]] = {}
        for seq in finished:
            group = self._unfinished.get(seq.prompt_index, ())
            if group and all(one.finish_reason is not None for one in group):
                completed[seq.prompt_index] = self._unfinished.pop(seq.prompt_index)
        return completed

    def take_aborted(self) -> dict[int, list[Sequence]]:
        """When nothing runs any more: the requests that are left, since `LLM.abort` ended them."""
        return self.take_completed([group[-1] for group in self._unfinished.values()])

    def _read(self, room: int) -> list[tuple[int, Request]]:
        """The next requests, of `room` sequences or a few more."""
        batch: list[tuple[int, Request]] = []
        while room > 0 and (one := next(self._requests, None)) is not None:
            index, item = one
            request = _as_request(index, item)
            batch.append((index, request))
            room -= request.sampling_params.n if isinstance(request.sampling_params, SamplingParams) else 1
        return batch

    def _take_in(self, batch: list[tuple[int, Request]]) -> list[Sequence]:
        """Check requests and make their sequences; texts and conversations are tokenized in one call each."""
        requests = [request for _, request in batch]
        names = [request.name or f"request {index}" for index, request in batch]
        prompts = [_checked_prompt(request, name) for request, name in zip(requests, names, strict=True)]
        chats = [position for position, prompt in enumerate(prompts) if is_conversation(prompt)]
        if chats:
            rendered = render_chats(
                [prompts[position] for position in chats],
                [names[position] for position in chats],
                self._engine.tokenizer,
                [requests[position].template_args for position in chats],
            )
            for position, text in zip(chats, rendered, strict=True):
                prompts[position] = text
        checked = self._engine.check_requests(prompts, [request.sampling_params for request in requests], names)
        sequences: list[Sequence] = []
        for (index, request), tokens_or_error in zip(batch, checked, strict=True):
            if isinstance(tokens_or_error, Refusal):
                self._refused.append((index, tokens_or_error))
            else:
                group = self._engine.sequences_of(index, tokens_or_error, request.sampling_params, request.seed)
                self._unfinished[index] = group
                sequences += group
        return sequences


def _checked_prompt(request: Request, name: str) -> Any:
    """The prompt; or why the request's seed is none."""
    if request.seed is not None:
        try:
            check_int(f"seed of {name}", request.seed, minimum=0, maximum=MAX_SEED)
        except (TypeError, ValueError) as error:
            return error
    return request.prompt


def _as_request(index: int, item: object) -> Request:
    """The request that a caller gave; of something else, one whose prompt is the reason to refuse it."""
    if isinstance(item, tuple) and 2 <= len(item) <= len(Request._fields):
        return Request(*item)
    error: Any = TypeError(f"request {index} must be a Request or a pair (prompt, sampling_params), got {item!r:.80}")
    return Request(error, SamplingParams())
