"""LLM: the facade. Prompts in, completions out."""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import closing
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine, StepResult
from nanovllm.engine.request_feed import Request, RequestFeed
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput, StreamEvent
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.progress import Progress
from nanovllm.utils.tokenizer import Conversation, Prompt, Refusal, is_conversation, raise_refused, render_chats


class LLM(LLMEngine):
    """A language model for offline batch inference.

        with LLM("~/huggingface/Qwen3-0.6B") as llm:
            outputs = llm.generate(["Hello"], SamplingParams(temperature=0.6, max_tokens=256))
            print(outputs[0]["text"])

    Args:
        model: a checkpoint's folder, a `.gguf` file, or an id on the Hugging Face hub.
        **kwargs: see `nanovllm.config.EngineConfig`.
    """

    def generate(
        self,
        prompts: str | Items[Prompt],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: strings, or lists of token ids; or one string.
            sampling_params: for all prompts, or one for each.
            use_tqdm: whether to show a progress bar.

        Returns:
            One output a prompt, in the order of the prompts.

        Raises:
            TypeError, ValueError: a request that cannot be run, named by its index; then none was started.
            RuntimeError: other requests are unfinished, or the engine has exited.
        """
        sequences = self._prepare(prompts, sampling_params)
        with self._clean_after_exceptions(), closing(Progress(len(sequences), use_tqdm)) as progress:
            for _ in self._run(iter([sequences]), progress.update):
                pass
        return self.output_processor.make_outputs(sequences)

    def generate_as_completed(
        self,
        requests: Iterable[Request | tuple[Prompt | Conversation, SamplingParams]],
        on_step: Callable[[StepResult], None] | None = None,
    ) -> Iterator[tuple[int, RequestOutput | Refusal]]:
        """Complete any number of requests, telling of each as it finishes.

        `requests` is read only as far as the scheduler needs it: up to 2 * max_num_seqs of them wait, and nothing is kept of
        those that were told, so that a million need no more memory than a thousand. One that can not be run is told as the
        error that `generate` would raise, and the others go on. Leaving the loop early aborts what is unfinished.

        Args:
            requests: any iterable of `Request`, or of pairs of a prompt or conversation and its sampling parameters.
            on_step: is given what each step did, before the requests that it finished are told.

        Returns:
            An iterator over (index in `requests`, output or error).

        Raises:
            RuntimeError: other requests are unfinished, or the engine has exited.
            And what `requests` or `on_step` raise.
        """
        return _one_by_one(self.generate_by_step(requests, on_step))

    def generate_by_step(
        self,
        requests: Iterable[Request | tuple[Prompt | Conversation, SamplingParams]],
        on_step: Callable[[StepResult], None] | None = None,
    ) -> Iterator[list[tuple[int, RequestOutput | Refusal]]]:
        """As `generate_as_completed`, but telling together of what a step finished, and of what was refused before it."""
        self._check_idle()
        return self._completed(RequestFeed(requests, self), on_step)

    def stream(
        self,
        prompts: str | Items[Prompt],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
    ) -> Iterator[StreamEvent]:
        """Complete prompts, telling of each token as it comes.

        The requests are checked at once and start with the first `next`. Leaving the loop early aborts what is unfinished.

        Args:
            prompts, sampling_params: as for `generate`.

        Returns:
            An iterator over the events of all prompts. The texts of a completion's events are `generate`'s text in pieces.

        Raises:
            As `generate`.
        """
        return self._events(self._prepare(prompts, sampling_params))

    def chat(
        self,
        conversations: Conversation | Items[Conversation],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_args: Any,
    ) -> list[RequestOutput]:
        """Answer conversations: `generate` on what the checkpoint's chat template makes of them.

        Args:
            conversations: each a list of messages, dicts with "role" and "content"; or one conversation.
            sampling_params, use_tqdm: as for `generate`.
            **template_args: passed on to the template, such as `enable_thinking=False`.

        Returns:
            One output a conversation, in their order.

        Raises:
            ValueError: the checkpoint has no chat template, or it refuses a conversation.
            And as `generate`.
        """
        if not isinstance(conversations, Items) or isinstance(conversations, str):
            raise TypeError(f"conversations must be lists of messages, got {type(conversations).__name__}")
        batch: Any = [conversations] if is_conversation(conversations) else conversations
        names = [f"conversation {index}" for index in range(len(batch))]
        texts = raise_refused(render_chats(batch, names, self.tokenizer, [template_args] * len(batch)))
        return self.generate(texts, sampling_params, use_tqdm)

    def _prepare(
        self, prompts: str | Items[Prompt], sampling_params: SamplingParams | Items[SamplingParams] | None
    ) -> list[Sequence]:
        """Check the requests, and that nothing else is running."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Items):
            raise TypeError(f"prompts must be a list, got {type(prompts).__name__}")
        self._check_idle()
        return self._make_sequences(prompts, _one_for_each(sampling_params, len(prompts)))

    def _check_idle(self) -> None:
        if not self.is_finished():
            raise RuntimeError(
                "requests of add_request or of a stream are unfinished: run step() until is_finished(), or abort them"
            )

    def _run(
        self,
        feed: Iterator[list[Sequence]],
        on_step: Callable[[StepResult], None] | None = None,
        streams: bool = False,
    ) -> Iterator[list[Sequence]]:
        """The loop behind `generate`, `generate_as_completed` and `stream`. Whatever ends it, no request is left.

        Args:
            feed: asked before each step for sequences to queue; none is an answer, too.
            on_step: is given what each step did.
            streams: whether text is needed as it comes.

        Returns:
            An iterator over the sequences that each step finished.
        """
        self._check_idle()
        unfinished: dict[int, Sequence] = {}
        with self._clean_after_exceptions():
            try:
                while (new := next(feed, None)) is not None or not self.is_finished():
                    for seq in new or ():
                        unfinished[seq.seq_id] = seq
                        self._add(seq, streams)
                    if self.is_finished():  # everything that was fed has been refused
                        yield []
                        continue
                    step = self._run_step()
                    for seq in step.finished:
                        unfinished.pop(seq.seq_id, None)
                    if on_step is not None:
                        on_step(step)
                    yield step.finished
            except GeneratorExit:  # the caller left the loop
                self.abort(unfinished)
                raise
            finally:
                self.output_processor.reset()

    def _completed(
        self, feed: RequestFeed, on_step: Callable[[StepResult], None] | None
    ) -> Iterator[list[tuple[int, RequestOutput | Refusal]]]:
        with self._clean_after_exceptions(), closing(self._run(feed, on_step)) as steps:  # type: ignore[type-var]
            for finished in steps:
                if told := self._tell(feed, feed.take_completed(finished)):
                    yield told
            if told := self._tell(feed, feed.take_aborted()):
                yield told

    def _tell(self, feed: RequestFeed, completed: dict[int, list[Sequence]]) -> list[tuple[int, RequestOutput | Refusal]]:
        """What is new: requests that were refused, and those that are completed, all decoded in one call."""
        sequences = [seq for group in completed.values() for seq in group]
        return [*feed.take_refused(), *zip(completed, self.output_processor.make_outputs(sequences), strict=True)]

    def _events(self, sequences: list[Sequence]) -> Iterator[StreamEvent]:
        num_told = dict.fromkeys(sequences, 0)  # unfinished sequences, and how many of their tokens were told
        with closing(self._run(iter([sequences]), streams=True)) as steps:  # type: ignore[type-var]
            for _ in steps:
                for seq, num_known in list(num_told.items()):
                    num_tokens = len(seq) - seq.num_prompt_tokens
                    if num_tokens == num_known and seq.finish_reason is None:
                        continue
                    event = self.output_processor.make_event(seq, num_known)
                    num_told[seq] = num_tokens
                    if event["finish_reason"] is not None:
                        del num_told[seq]
                    yield event
        for seq, num_known in num_told.items():  # aborted after the last step
            yield self.output_processor.make_event(seq, num_known)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.exit()


def _one_by_one(
    groups: Iterator[list[tuple[int, RequestOutput | Refusal]]],
) -> Iterator[tuple[int, RequestOutput | Refusal]]:
    with closing(groups):  # type: ignore[type-var]
        for group in groups:
            yield from group


def _one_for_each(sampling_params: SamplingParams | Items[SamplingParams] | None, num_prompts: int) -> Items[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    if not isinstance(sampling_params, Items):
        raise TypeError(f"sampling_params must be SamplingParams or a list, got {type(sampling_params).__name__}")
    if len(sampling_params) != num_prompts:
        raise ValueError(f"there are {num_prompts} prompts but {len(sampling_params)} sampling_params: give one for each")
    return sampling_params
