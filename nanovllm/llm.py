"""LLM: the facade. Prompts in, completions out."""

import time
from collections.abc import Sequence as Items
from contextlib import closing

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.progress import Progress
from nanovllm.utils.tokenizer import Prompt


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
            RuntimeError: requests of `add_request` are unfinished, or the engine has exited.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Items):
            raise TypeError(f"prompts must be a list, got {type(prompts).__name__}")
        if not self.is_finished():
            raise RuntimeError("requests of add_request are unfinished: run step() until is_finished()")
        sequences = self._make_sequences(prompts, _one_for_each(sampling_params, len(prompts)))
        self._run(sequences, use_tqdm)
        return self._make_outputs(sequences)

    def _run(self, sequences: list[Sequence], use_tqdm: bool) -> None:
        with self._clean_after_exceptions(), closing(Progress(len(sequences), use_tqdm)) as progress:
            for seq in sequences:
                self.scheduler.add(seq)
            while not self.is_finished():
                start = time.perf_counter()
                result = self._run_step()
                seconds = time.perf_counter() - start
                progress.update(len(result.finished), result.num_prefill_tokens, result.num_decode_tokens, seconds)

    def _make_outputs(self, sequences: list[Sequence]) -> list[RequestOutput]:
        completions = [seq.completion_token_ids for seq in sequences]
        texts = [""] * len(sequences)
        if self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        outputs: list[RequestOutput] = []
        for seq, text, token_ids in zip(sequences, texts, completions, strict=True):
            assert seq.finish_reason is not None, f"request {seq.seq_id} is unfinished"
            assert seq.num_cached_tokens is not None, f"request {seq.seq_id} never ran"
            outputs.append(
                RequestOutput(
                    text=text,
                    token_ids=token_ids,
                    finish_reason=seq.finish_reason,
                    num_prompt_tokens=seq.num_prompt_tokens,
                    num_cached_tokens=seq.num_cached_tokens,
                )
            )
        return outputs

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
