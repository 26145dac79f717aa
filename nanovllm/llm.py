"""LLM: the facade. Prompts in, completions out."""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import closing
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput, StreamEvent
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.progress import Progress
from nanovllm.utils.tokenizer import Conversation, Prompt, render_chats


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
        with self._clean_after_exceptions():  # those between two steps, which `_run` does not see
            for _ in self._run(sequences, use_tqdm):
                pass
        return self.output_processor.make_outputs(sequences)

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
        prompts = render_chats(conversations, self.tokenizer, **template_args)
        return self.generate(prompts, sampling_params, use_tqdm)

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

    def _run(self, sequences: list[Sequence], use_tqdm: bool, streams: bool = False) -> Iterator[None]:
        """The loop behind `generate` and `stream`: step by step. Whatever ends it, no request is left."""
        self._check_idle()
        with self._clean_after_exceptions(), closing(Progress(len(sequences), use_tqdm)) as progress:
            try:
                for seq in sequences:
                    self._add(seq, streams)
                while not self.is_finished():
                    start = time.perf_counter()
                    result = self._run_step()
                    seconds = time.perf_counter() - start
                    progress.update(len(result.finished), result.num_prefill_tokens, result.num_decode_tokens, seconds)
                    yield
            except GeneratorExit:  # the caller left the loop
                self.abort(seq.seq_id for seq in sequences)
                raise
            finally:
                self.output_processor.reset()

    def _events(self, sequences: list[Sequence]) -> Iterator[StreamEvent]:
        num_told = dict.fromkeys(sequences, 0)  # unfinished sequences, and how many of their tokens were told
        with closing(self._run(sequences, use_tqdm=False, streams=True)) as steps:  # type: ignore[type-var]
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


def _one_for_each(sampling_params: SamplingParams | Items[SamplingParams] | None, num_prompts: int) -> Items[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    if not isinstance(sampling_params, Items):
        raise TypeError(f"sampling_params must be SamplingParams or a list, got {type(sampling_params).__name__}")
    if len(sampling_params) != num_prompts:
        raise ValueError(f"there are {num_prompts} prompts but {len(sampling_params)} sampling_params: give one for each")
    return sampling_params
