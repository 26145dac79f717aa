"""ModelRunner: one rank. It owns the model, the KV cache and the rows of the running sequences."""

import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, AttentionSpec, choose_backend
from nanovllm.config import DEFAULT_BATCHED_TOKENS, EngineConfig
from nanovllm.engine.cuda_graph import Capture, CudaCapture, Run, StepGraphs, chunk_sizes, decode_sizes
from nanovllm.engine.input_batch import InputBatch
from nanovllm.engine.input_buffer import InputBuffer, StepTensors
from nanovllm.engine.kv_cache import BlockMemory, allocate_kv_cache, decide_num_blocks
from nanovllm.engine.model_loading import load_model
from nanovllm.engine.scheduled_batch import ScheduledBatch
from nanovllm.engine.step_inputs import StepInputs, StepShape, placeholder_inputs
from nanovllm.layers.logits_processors import edit_logits
from nanovllm.layers.logprobs import Logprobs, compute_logprobs, compute_prompt_logprobs
from nanovllm.layers.sampler import Sampler
from nanovllm.models import get_model_class
from nanovllm.models.config import ModelConfig
from nanovllm.utils.compile import compile_sampler
from nanovllm.utils.context import ForwardContext, forward_context
from nanovllm.utils.device import choose_device, choose_dtype
from nanovllm.utils.ranks import Ranks

logger = logging.getLogger(__name__)

NO_TOKENS = np.zeros(0, np.int64)


class PromptLogprobs(NamedTuple):
    """Log-probabilities of some prompt tokens of one sequence, the first of them at `first_position`."""

    seq_id: int
    first_position: int
    logprobs: Logprobs


class StepOutput(NamedTuple):
    """What one step computed."""

    token_ids: NDArray[np.int64]  # [num_sampled]: one for each sequence whose last token was in the batch, in its order
    logprobs: Logprobs | None = None  # of all rows of token_ids if one asks for them, as many as the most demanding asks
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


class ModelRunner:
    """Scheduled batch -> tensors -> model -> token ids.

    Args:
        folder: the checkpoint.
        model_config: its shape.
        config: the user's settings.
        max_model_len: tokens of the longest sequence that will be run.
        ranks: who shares the model.
    """

    def __init__(
        self, folder: Path, model_config: ModelConfig, config: EngineConfig, max_model_len: int, ranks: Ranks
    ) -> None:
        self.ranks = ranks
        self.device = ranks.place(choose_device(config.device))
        self.dtype = choose_dtype(config.dtype, model_config.dtype, self.device)

        def make_spec(backend: type[AttentionBackend]) -> AttentionSpec:
            return AttentionSpec(
                num_heads=ranks.num_heads(model_config.num_heads),
                num_kv_heads=len(ranks.kv_heads(model_config.num_heads, model_config.num_kv_heads)),
                head_dim=model_config.head_dim,
                block_size=config.kvcache_block_size or backend.DEFAULT_BLOCK_SIZE,
                dtype=self.dtype,
                device=self.device,
                max_context_len=max_model_len,
                batch_invariant=config.batch_invariant,
            )

        self.backend = choose_backend(config.attention_backend, make_spec)
        with torch.device("meta"):
            self.model = get_model_class(model_config.architecture)(model_config, max_model_len, ranks)
        load_model(self.model, folder, self.backend, ranks)
        self.sampler = Sampler()
        self.backend.fuse_layers(self.sampler)
        if self.device.type == "cuda" and not (config.enforce_eager or config.batch_invariant):
            compile_sampler(self.sampler)
        self.block_size = self.backend.spec.block_size
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[self.device.type]
        self.input_batch = InputBatch(config.max_num_seqs, max_model_len, self.block_size)
        self.input_buffer = self._make_input_buffer(config.max_num_seqs)
        on_gpu = self.device.type == "cuda" and ranks.size == 1
        self.can_capture = on_gpu and not config.enforce_eager and self.backend.CAN_CAPTURE_DECODES
        num_layers = model_config.num_layers
        num_blocks = decide_num_blocks(
            config, self.backend.spec, num_layers, max_model_len, partial(self.compute_largest_steps, num_layers)
        )
        self.num_kvcache_blocks = ranks.minimum(num_blocks)  # which includes what the last to load has left over
        self.kv_cache = allocate_kv_cache(self.backend, num_layers, self.num_kvcache_blocks)
        on_cpu = self.device.type == "cpu"
        self.block_memory = BlockMemory(self.backend, self.kv_cache, self.num_kvcache_blocks) if on_cpu else None
        self.graphs: StepGraphs | None = None
        if self.can_capture:
            result = torch.empty(self._largest_step(), model_config.hidden_size, dtype=self.dtype, device=self.device)
            self.capture_graphs(CudaCapture(result))
        logger.info("%s, %s, %d KV blocks of %d", self.device, self.dtype, self.num_kvcache_blocks, self.block_size)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """Compute one step.

        Rank 0 alone samples; the others return no tokens, and are told by `append_sampled`.

        Raises:
            FloatingPointError: a request's logits are NaN or infinite.
        """
        inputs = self.input_batch.apply(batch)
        if self.block_memory is not None:
            self.block_memory.reach(int(inputs.slot_mapping.max()) // self.block_size)
        outputs, hidden_states = self._compute(inputs)
        prompt_logprobs = self._prompt_logprobs(inputs, hidden_states)
        if len(inputs.sampled_rows) == 0:
            self._wait()
            return StepOutput(NO_TOKENS, None, prompt_logprobs)
        logits = self.model.compute_logits(outputs)
        if self.ranks.rank != 0:
            self._wait()
            return StepOutput(NO_TOKENS)
        token_ids, logprobs = self._sample(inputs, logits)
        self.append_sampled(token_ids)
        return StepOutput(token_ids, logprobs, prompt_logprobs)

    def _sample(self, inputs: StepInputs, logits: Tensor) -> tuple[NDArray[np.int64], Logprobs | None]:
        how = self.input_batch.sampling_inputs()  # made while a GPU computes the logits
        options = how.options
        edited, filters = logits, None
        if options is not None:
            filters = options.filters
            edited = logits if options.edits is None else edit_logits(logits, options.edits)
        sampled = self.sampler(edited, torch.from_numpy(how.temperatures), torch.from_numpy(how.uniforms), filters)
        token_ids: NDArray[np.int64] = sampled.numpy()
        if token_ids.min() < 0:
            seq_id = self.input_batch.seq_ids[inputs.sampled_rows[token_ids.argmin()]]
            raise FloatingPointError(f"the logits of request {seq_id} are NaN or infinite: are the weights sound?")
        if options is None or options.num_logprobs is None:
            return token_ids, None
        return token_ids, compute_logprobs(logits, sampled.to(self.device), int(options.num_logprobs.max()))

    def _prompt_logprobs(self, inputs: StepInputs, hidden_states: Tensor) -> tuple[PromptLogprobs, ...]:
        result: list[PromptLogprobs] = []
        for target in inputs.prompt_targets:
            states = hidden_states[target.first_index : target.first_index + len(target.token_ids)]
            chosen = torch.from_numpy(target.token_ids).to(self.device)
            if self.ranks.rank != 0:
                chosen = torch.zeros_like(chosen)  # what it computes of its part of the vocabulary is of no use
            logprobs = compute_prompt_logprobs(states, chosen, target.num_logprobs, self.model.compute_logits)
            result.append(PromptLogprobs(target.seq_id, target.first_position, logprobs))
        return tuple(result)

    def append_sampled(self, token_ids: NDArray[np.int64]) -> None:
        """Take in the tokens that were sampled in the last step."""
        self.input_batch.append(token_ids)

    def _wait(self) -> None:
        """Until the input buffer is free again; where tokens are sampled, reading them does it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _compute(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Hidden states: by replaying a graph where there is one for the batch.

        Returns:
            [num_sampled, hidden_size]: of the tokens that are sampled from.
            [at least as many, hidden_size]: of all tokens, if log-probabilities of prompts are asked for.
        """
        is_decode = inputs.max_seqlen_q == 1
        captured = None if self.graphs is None else self.graphs.find(len(inputs.input_ids), is_decode)
        step = self.input_buffer.upload(inputs, None if captured is None else captured.shape)
        if captured is None and not inputs.prompt_targets:
            outputs = self._forward(step, step.logits_indices)
            return outputs, outputs
        hidden_states = self._forward(step) if captured is None else captured.replay()
        return hidden_states[step.logits_indices], hidden_states

    def _forward(self, step: StepTensors, outputs: Tensor | None = None) -> Tensor:
        with forward_context(ForwardContext(step.metadata, self.backend, self.kv_cache, outputs)):
            hidden_states: Tensor = self.model(step.input_ids, step.positions)
        return hidden_states

    @torch.inference_mode()
    def compute_largest_steps(self, num_layers: int) -> int:
        """Compute the steps that need most memory, before there is a KV cache: most tokens, and most and longest decodes.

        The cache is one block, of which they read whatever it holds; what comes out is of no use.

        Returns:
            Bytes that captured steps will keep for their activations.
        """
        self.kv_cache = allocate_kv_cache(self.backend, num_layers, 1)
        num_tokens = self._largest_step()
        num_seqs = min(self.input_batch.max_num_seqs, num_tokens)
        keeps = self.can_capture and self.backend.CAN_CAPTURE_CHUNKS
        before = torch.cuda.memory_allocated(self.device) if keeps else 0
        num_bytes = 0
        most_tokens = [num_tokens // num_seqs + (index < num_tokens % num_seqs) for index in range(num_seqs)]
        for seqlens_q in (most_tokens, [1] * num_seqs):
            inputs = placeholder_inputs(seqlens_q, self.max_model_len, self.input_batch.max_blocks)
            step = self.input_buffer.upload(inputs)
            hidden_states = self._forward(step)
            if keeps and num_bytes == 0:  # in the first, which has most tokens
                num_bytes = torch.cuda.max_memory_allocated(self.device) - before
            logits = self.model.compute_logits(hidden_states[step.logits_indices])
            self.sampler(logits, torch.ones(len(logits)), torch.zeros(len(logits)))
            self._wait()  # the input buffer is used again
        return num_bytes

    def _largest_step(self) -> int:
        """Tokens of the largest step that there can be."""
        return min(self.max_num_batched_tokens, self.input_batch.max_num_seqs * self.max_model_len)

    @torch.inference_mode()
    def capture_graphs(self, capture: Capture) -> None:
        """Capture the steps that the backend lets be captured; from now on they are replayed."""

        def make_run(shape: StepShape) -> Run:
            step = self.input_buffer.upload(placeholder_inputs([], 0, 0), shape)
            return lambda: self._forward(step)

        largest = self._largest_step()
        max_num_seqs = min(self.input_batch.max_num_seqs, largest)
        max_blocks, max_len = self.input_batch.max_blocks, self.max_model_len
        shapes = [StepShape(size, size, max_blocks, 1, max_len) for size in decode_sizes(max_num_seqs)[::-1]]
        if self.backend.CAN_CAPTURE_CHUNKS and largest > 1:
            sizes = chunk_sizes(largest)[::-1]
            shapes += [StepShape(size, min(size, max_num_seqs) + 1, max_blocks, size, max_len) for size in sizes]
        self.graphs = StepGraphs(shapes, make_run, capture)

    def _make_input_buffer(self, max_num_seqs: int) -> InputBuffer:
        num_bytes = InputBuffer.num_bytes(self.max_num_batched_tokens, max_num_seqs, self.input_batch.max_blocks)
        if self.device.type == "cpu":
            both = torch.zeros(num_bytes, dtype=torch.uint8)
            return InputBuffer(both, both)
        host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        return InputBuffer(host, torch.zeros(num_bytes, dtype=torch.uint8, device=self.device))
