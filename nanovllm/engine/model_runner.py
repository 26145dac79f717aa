"""ModelRunner: one rank. It owns the model, the KV cache and the rows of the running sequences."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, AttentionSpec, choose_backend
from nanovllm.config import DEFAULT_BATCHED_TOKENS, EngineConfig
from nanovllm.engine.input_batch import InputBatch, StepInputs
from nanovllm.engine.kv_cache import allocate_kv_cache, decide_num_blocks
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.layers.logits_processors import edit_logits
from nanovllm.layers.logprobs import Logprobs, compute_logprobs, compute_prompt_logprobs
from nanovllm.layers.sampler import sample
from nanovllm.models import get_model_class
from nanovllm.models.config import ModelConfig
from nanovllm.utils.context import AttentionMetadata, ForwardContext, forward_context
from nanovllm.utils.device import choose_device, choose_dtype
from nanovllm.utils.loader import load_weights, materialize
from nanovllm.utils.ranks import Ranks

logger = logging.getLogger(__name__)


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
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, model_config.dtype, self.device)
        with torch.device("meta"):
            model = get_model_class(model_config.architecture)(model_config, max_model_len, ranks)
        materialize(model, self.dtype, self.device)
        load_weights(model, folder)
        self.model = model.to(self.device).eval()  # the tables of the rotary embedding are still to be moved

        def make_spec(backend: type[AttentionBackend]) -> AttentionSpec:
            return AttentionSpec(
                num_heads=ranks.shard(model_config.num_heads, "num_attention_heads"),
                num_kv_heads=ranks.shard(model_config.num_kv_heads, "num_key_value_heads"),
                head_dim=model_config.head_dim,
                block_size=config.kvcache_block_size or backend.DEFAULT_BLOCK_SIZE,
                dtype=self.dtype,
                device=self.device,
            )

        self.backend = choose_backend(config.attention_backend, make_spec)
        self.block_size = self.backend.spec.block_size
        self.num_kvcache_blocks = decide_num_blocks(config, self.backend.spec, model_config.num_layers, max_model_len)
        self.kv_cache = allocate_kv_cache(self.backend, model_config.num_layers, self.num_kvcache_blocks)
        self.max_num_batched_tokens = config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[self.device.type]
        self.input_batch = InputBatch(config.max_num_seqs, max_model_len, self.block_size)
        logger.info("%s, %s, %d KV blocks of %d", self.device, self.dtype, self.num_kvcache_blocks, self.block_size)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """Compute one step.

        Raises:
            FloatingPointError: a request's logits are NaN or infinite.
        """
        inputs = self.input_batch.apply(batch)
        context = ForwardContext(self._metadata(inputs), self.backend, self.kv_cache)
        with forward_context(context):
            hidden_states = self.model(self._tensor(inputs.input_ids), self._tensor(inputs.positions))
        prompt_logprobs = self._prompt_logprobs(inputs, hidden_states)
        if len(inputs.sampled_rows) == 0:
            return StepOutput(np.zeros(0, np.int64), None, prompt_logprobs)
        logits = self.model.compute_logits(hidden_states[self._tensor(inputs.logits_indices)])
        token_ids, logprobs = self._sample(inputs, logits)
        self.input_batch.append(inputs.sampled_rows, token_ids)
        return StepOutput(token_ids, logprobs, prompt_logprobs)

    def _sample(self, inputs: StepInputs, logits: Tensor) -> tuple[NDArray[np.int64], Logprobs | None]:
        options = inputs.sampling_options
        edited, filters = logits, None
        if options is not None:
            filters = options.filters
            edited = logits if options.edits is None else edit_logits(logits, options.edits)
        sampled = sample(edited, torch.from_numpy(inputs.temperatures), torch.from_numpy(inputs.uniforms), filters)
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
            chosen = self._tensor(target.token_ids)
            logprobs = compute_prompt_logprobs(states, chosen, target.num_logprobs, self.model.compute_logits)
            result.append(PromptLogprobs(target.seq_id, target.first_position, logprobs))
        return tuple(result)

    def _metadata(self, inputs: StepInputs) -> AttentionMetadata:
        return AttentionMetadata(
            cu_seqlens_q=self._tensor(inputs.cu_seqlens_q),
            context_lens=self._tensor(inputs.context_lens),
            block_tables=self._tensor(inputs.block_tables),
            slot_mapping=self._tensor(inputs.slot_mapping),
            max_seqlen_q=inputs.max_seqlen_q,
            max_context_len=inputs.max_context_len,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)
