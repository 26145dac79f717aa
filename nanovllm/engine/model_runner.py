"""ModelRunner: one rank. It owns the model, the KV cache and the rows of the running sequences."""

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, AttentionSpec, choose_backend
from nanovllm.config import DEFAULT_BATCHED_TOKENS, EngineConfig
from nanovllm.engine.input_batch import InputBatch, StepInputs
from nanovllm.engine.kv_cache import allocate_kv_cache, decide_num_blocks
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.layers.packed_weight import pack_weights
from nanovllm.layers.sampler import sample
from nanovllm.models import get_model_class
from nanovllm.models.config import ModelConfig
from nanovllm.utils.context import AttentionMetadata, ForwardContext, forward_context
from nanovllm.utils.device import choose_device, choose_dtype
from nanovllm.utils.loader import load_weights, materialize
from nanovllm.utils.ranks import Ranks

logger = logging.getLogger(__name__)


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
        with torch.device("meta"):
            model = get_model_class(model_config.architecture)(model_config, max_model_len, ranks)
        materialize(model, self.dtype, self.device)
        load_weights(model, folder, ranks)
        pack_weights(model)
        self.model = model.to(self.device).eval()  # the tables of the rotary embedding are still to be moved

        def make_spec(backend: type[AttentionBackend]) -> AttentionSpec:
            return AttentionSpec(
                num_heads=ranks.num_heads(model_config.num_heads),
                num_kv_heads=len(ranks.kv_heads(model_config.num_heads, model_config.num_kv_heads)),
                head_dim=model_config.head_dim,
                block_size=config.kvcache_block_size or backend.DEFAULT_BLOCK_SIZE,
                dtype=self.dtype,
                device=self.device,
            )

        self.backend = choose_backend(config.attention_backend, make_spec)
        self.block_size = self.backend.spec.block_size
        num_blocks = decide_num_blocks(config, self.backend.spec, model_config.num_layers, max_model_len)
        self.num_kvcache_blocks = ranks.minimum(num_blocks)  # which includes what the last to load has left over
        self.kv_cache = allocate_kv_cache(self.backend, model_config.num_layers, self.num_kvcache_blocks)
        self.max_num_batched_tokens = config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[self.device.type]
        self.input_batch = InputBatch(config.max_num_seqs, max_model_len, self.block_size)
        self._sampled_rows = np.zeros(0, np.int64)  # by the last step
        logger.info("%s, %s, %d KV blocks of %d", self.device, self.dtype, self.num_kvcache_blocks, self.block_size)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> NDArray[np.int64]:
        """Compute one step.

        Returns:
            [num_sampled]: one token for each sequence whose last token was in the batch, in batch order. Rank 0 alone
            samples; others return nothing, and are told by `append_sampled`.

        Raises:
            FloatingPointError: a request's logits are NaN or infinite.
        """
        inputs = self.input_batch.apply(batch)
        self._sampled_rows = inputs.sampled_rows
        context = ForwardContext(self._metadata(inputs), self.backend, self.kv_cache)
        with forward_context(context):
            hidden_states = self.model(self._tensor(inputs.input_ids), self._tensor(inputs.positions))
        if len(inputs.sampled_rows) == 0:
            return np.zeros(0, np.int64)
        logits = self.model.compute_logits(hidden_states[self._tensor(inputs.logits_indices)])
        if self.ranks.rank != 0:
            return np.zeros(0, np.int64)
        sampled = sample(logits, self._tensor(inputs.temperatures), self._tensor(inputs.uniforms))
        token_ids: NDArray[np.int64] = sampled.cpu().numpy()
        if token_ids.min() < 0:
            seq_id = self.input_batch.seq_ids[inputs.sampled_rows[token_ids.argmin()]]
            raise FloatingPointError(f"the logits of request {seq_id} are NaN or infinite: are the weights sound?")
        self.append_sampled(token_ids)
        return token_ids

    def append_sampled(self, token_ids: NDArray[np.int64]) -> None:
        """Take in the tokens that were sampled in the last step."""
        self.input_batch.append(self._sampled_rows, token_ids)

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
