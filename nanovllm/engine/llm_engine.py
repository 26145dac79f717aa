"""LLMEngine: the loop. Requests are added, steps are run, finished requests come out."""

import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from random import Random
from typing import NamedTuple

from nanovllm.config import DEFAULT_MAX_MODEL_LEN, EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.executor import Executor, SingleRankExecutor
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.parallel_executor import ParallelExecutor
from nanovllm.engine.request_limits import RequestLimits
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.models import load_model_config
from nanovllm.models.config import ModelConfig
from nanovllm.sampling_params import MAX_SEED, SamplingParams
from nanovllm.utils.checkpoint import resolve_checkpoint
from nanovllm.utils.text_codec import TextCodec
from nanovllm.utils.tokenizer import Prompt, Refusal, load_eos_token_ids, load_tokenizer, raise_refused, tokenize

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What one step did.

    finished: the sequences that ended in it.
    num_prefill_tokens, num_decode_tokens: tokens that it computed.
    num_seqs: how many sequences were in its batch.
    kv_usage: share of the KV blocks that hold running sequences at its end, 0 to 1.
    seconds: how long it took.
    """

    finished: list[Sequence]
    num_prefill_tokens: int
    num_decode_tokens: int
    num_seqs: int
    kv_usage: float
    seconds: float


class LLMEngine:
    """One model and the requests that run on it.

    Args:
        model: a checkpoint's folder, a `.gguf` file, or an id on the Hugging Face hub.
        **kwargs: see `EngineConfig`.
    """

    def __init__(self, model: str | os.PathLike[str], **kwargs: object) -> None:
        config = EngineConfig.from_kwargs(**kwargs)
        folder = resolve_checkpoint(model)
        model_config = load_model_config(folder)
        self.max_model_len = choose_max_model_len(config, model_config)
        self.vocab_size = model_config.vocab_size
        self.tokenizer = load_tokenizer(folder)
        self.codec = None if self.tokenizer is None else TextCodec(self.tokenizer)
        executor_class = SingleRankExecutor if config.tensor_parallel_size == 1 else ParallelExecutor
        self.executor: Executor = executor_class(folder, model_config, config, self.max_model_len)
        self.scheduler = Scheduler(
            BlockManager(self.executor.num_kvcache_blocks, self.executor.block_size, config.enable_prefix_caching),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=self.executor.max_num_batched_tokens,
            eos_token_ids=load_eos_token_ids(folder, self.tokenizer),
        )
        self._limits = RequestLimits(
            self.vocab_size,
            self.max_model_len,
            self.scheduler.block_manager,
            self.scheduler.stop_tokens,
            has_tokenizer=self.tokenizer is not None,
        )
        self.output_processor = OutputProcessor(self.codec)
        self._seq_ids = itertools.count()
        self._exited = False
        self._seed_source = Random(config.seed)

    # ---- the loop ----

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams) -> int:
        """Queue one request.

        Returns:
            Its id, under which `step` will return it.

        Raises:
            TypeError, ValueError: it can not be run, or asks for several completions; nothing was queued.
        """
        if isinstance(sampling_params, SamplingParams) and sampling_params.n > 1:
            raise ValueError(f"add_request takes n=1, got {sampling_params.n}: use generate, or add the request n times")
        (seq,) = self._make_sequences([prompt], [sampling_params])
        self._add(seq)
        return seq.seq_id

    def abort(self, request_ids: int | Iterable[int]) -> None:
        """End requests now; their blocks are freed. Ids of requests that have ended already are ignored."""
        wanted = {request_ids} if isinstance(request_ids, int) else set(request_ids)
        sequences = [seq for seq in (*self.scheduler.running, *self.scheduler.waiting) if seq.seq_id in wanted]
        self.scheduler.end(sequences, "abort")

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Run one step.

        Returns:
            (id, generated token ids) of each request that finished, and the number of tokens that the step computed:
            positive if it held any prefill, else the number of decoded tokens, negative (nano-vLLM's convention).
        """
        if self.is_finished():
            return [], 0
        with self._clean_after_exceptions():
            result = self._run_step()
            outputs = [(seq.seq_id, seq.completion_token_ids) for seq in result.finished]
            return outputs, result.num_prefill_tokens or -result.num_decode_tokens

    def is_finished(self) -> bool:
        """Whether no request is waiting or running."""
        return self.scheduler.is_finished()

    def _run_step(self) -> StepResult:
        """Schedule, compute, take in."""
        start = time.perf_counter()
        batch = self.scheduler.schedule()
        output = self.executor.execute(batch)
        if output.logprobs is not None or output.prompt_logprobs:
            sampled = self.scheduler.sampled_sequences(batch)
            self.output_processor.take_logprobs(output, sampled, self.scheduler.running)
        finished = self.scheduler.update(batch, output.token_ids)
        if self.output_processor.is_following:
            self.scheduler.running.append_recent()
        stopped = self.output_processor.follow()
        if stopped:
            self.scheduler.end(stopped, "stop")
            finished += stopped
        return StepResult(
            finished=finished,
            num_prefill_tokens=batch.num_prefill_tokens,
            num_decode_tokens=batch.num_decode_tokens,
            num_seqs=len(batch.rows),
            kv_usage=1 - self.scheduler.block_manager.num_free_blocks / self.scheduler.block_manager.num_blocks,
            seconds=time.perf_counter() - start,
        )

    @contextmanager
    def _clean_after_exceptions(self) -> Iterator[None]:
        """After any exception inside, Ctrl-C included, no request is left and all blocks are free: the engine can go on."""
        try:
            yield
        except GeneratorExit:  # a caller left the loop, which has aborted its requests
            raise
        except BaseException:
            self._drop_all()
            raise

    def _drop_all(self) -> None:
        """Forget every request and free every block."""
        self.scheduler.reset()
        self.output_processor.reset()

    # ---- requests ----

    def _add(self, seq: Sequence, streams: bool = False) -> None:
        self.output_processor.add(seq, streams)
        self.scheduler.add(seq)

    def _make_sequences(self, prompts: Items[Prompt], params: Items[SamplingParams]) -> list[Sequence]:
        """Check all requests, then make a sequence of each, or n with the same prompt.

        Raises:
            TypeError, ValueError: the first request that can not be run.
        """
        checked = self.check_requests(prompts, params, [f"prompt {index}" for index in range(len(prompts))])
        token_ids = raise_refused(checked)
        return [
            seq
            for index, (tokens, one) in enumerate(zip(token_ids, params, strict=True))
            for seq in self.sequences_of(index, tokens, one)
        ]

    def check_requests(
        self, prompts: Items[Prompt | Refusal], params: Items[SamplingParams], names: Items[str]
    ) -> list[list[int] | Refusal]:
        """The token ids of each request, which then can be run to its end; or why it can not."""
        if self._exited:
            raise RuntimeError("the engine has exited: make a new LLM")
        checked = tokenize(prompts, names, self.codec, self.vocab_size)
        sound: SamplingParams | None = None  # often the next ones', too
        for index, (tokens, one, name) in enumerate(zip(checked, params, names, strict=True)):
            if isinstance(tokens, Refusal):
                continue
            try:
                if not isinstance(one, SamplingParams):
                    raise TypeError(f"sampling_params of {name} must be SamplingParams, got {type(one).__name__}")
                self._limits.check_length(name, len(tokens), one)
                if one is not sound:
                    self._limits.check_tokens(name, one)
                sound = one
            except (TypeError, ValueError) as error:
                checked[index] = error
        return checked

    def sequences_of(
        self, index: int, token_ids: list[int], params: SamplingParams, seed: int | None = None
    ) -> list[Sequence]:
        """The sequences of a request that was checked, the index-th of those that came together.

        seed: where `params` has none; None: one is drawn for each.
        """
        seed = seed if params.seed is None else params.seed
        max_total_tokens = self._limits.max_total_tokens(len(token_ids), params)
        return [
            Sequence(
                seq_id=next(self._seq_ids),
                token_ids=token_ids,
                sampling_params=params,
                seed=self._seed_source.randint(0, MAX_SEED) if seed is None else derive_seed(seed, completion),
                max_total_tokens=max_total_tokens,
                prompt_index=index,
                completion_index=completion,
            )
            for completion in range(params.n)
        ]

    # ---- the end ----

    def exit(self) -> None:
        """Drop all requests and give back the memory. May be called twice; afterwards nothing can be generated."""
        self._exited = True
        self._drop_all()
        self.executor.exit()


def derive_seed(seed: int, completion: int) -> int:
    """The seed of the i-th of several completions; that of the first is the request's own."""
    return seed if completion == 0 else Random(f"{seed}/{completion}").randint(0, MAX_SEED)


def choose_max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    """The longest sequence to run: as configured, but no longer than the model was made for.

    Raises:
        ValueError: longer than a sliding window, which is not implemented.
    """
    longest = model_config.rope.max_positions
    wanted = config.max_model_len or min(DEFAULT_MAX_MODEL_LEN, longest)
    if wanted > longest:
        logger.warning("max_model_len=%d is reduced to %d, the positions that the model was made for", wanted, longest)
    window = model_config.sliding_window
    if window is not None and min(wanted, longest) > window:
        raise ValueError(
            f"the checkpoint has sliding_window={window}, which is not supported beyond its size; "
            f"max_model_len is {min(wanted, longest)}: set it to {window} at most"
        )
    return min(wanted, longest)
