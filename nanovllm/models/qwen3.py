"""Qwen3 (Qwen Team 2025, "Qwen3 Technical Report"), dense.

A decoder-only transformer: token embedding, layers of attention and gated MLP, each behind an RMSNorm and added to the
residual stream, a last norm, and the head. Its mark is a norm on each head of the queries and keys before the rotation.

Tokens of all sequences of a step lie in one dimension; only the attention layer knows where a sequence begins.
"""

from typing import ClassVar

from torch import Tensor, nn

from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.config import ModelConfig
from nanovllm.utils.context import get_forward_context
from nanovllm.utils.loader import CheckpointModule
from nanovllm.utils.ranks import Ranks


class Qwen3Attention(nn.Module):
    """Grouped-query attention with rotary positions and normed queries and keys."""

    has_qk_norm: ClassVar[bool] = True  # of the architecture; its relatives have none

    def __init__(self, config: ModelConfig, layer_index: int, ranks: Ranks) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_heads * config.head_dim
        kv = ranks.shard_kv(config.num_heads, config.num_kv_heads, config.head_dim)
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, {"q": q_size, "k": kv, "v": kv}, config.qkv_bias, ranks)
        self.o_proj = RowParallelLinear(q_size, config.hidden_size, config.o_bias, ranks)
        if self.has_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attention = Attention(layer_index)

    def forward(self, hidden_states: Tensor, positions: Tensor, rotary: RotaryEmbedding) -> Tensor:
        """[num_tokens, hidden_size] -> the same shape."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.qkv_proj.forward_split(hidden_states))
        q, k = rotary(positions, q, k, (self.q_norm, self.k_norm) if self.has_qk_norm else None)
        return self.o_proj(self.attention(q, k, v).flatten(1))


class Qwen3MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        super().__init__()
        sizes = {"gate": config.intermediate_size, "up": config.intermediate_size}
        self.gate_up_proj = ColumnParallelLinear(config.hidden_size, sizes, config.mlp_bias, ranks)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, config.mlp_bias, ranks)
        self.activation = SiluAndMul()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> the same shape."""
        return self.down_proj(self.activation(self.gate_up_proj(hidden_states)))


class Qwen3DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    attention_class: ClassVar[type[Qwen3Attention]] = Qwen3Attention

    def __init__(self, config: ModelConfig, layer_index: int, ranks: Ranks) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self.attention_class(config, layer_index, ranks)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config, ranks)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None, positions: Tensor, rotary: RotaryEmbedding
    ) -> tuple[Tensor, Tensor]:
        """The MLP's output, and the residual that it is still to be added to: the next norm adds and norms at once."""
        if residual is None:
            hidden_states, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            hidden_states, residual = self.input_layernorm.add_and_norm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, positions, rotary)
        hidden_states, residual = self.post_attention_layernorm.add_and_norm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Qwen3Model(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig, num_positions: int, layer_class: type[Qwen3DecoderLayer], ranks: Ranks) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, ranks)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, num_positions)
        self.layers = nn.ModuleList(layer_class(config, index, ranks) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """int64 [num_tokens] and int64 [num_tokens] -> [num_outputs, hidden_size], see `ForwardContext.outputs`."""
        hidden_states, residual = self.run_layers(self.embed_tokens(input_ids), positions)
        return self.norm.add_and_norm(hidden_states, residual)[0]

    def run_layers(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, hidden_size] -> the last layer's output, and the residual that it is still to be added to: both
        [num_outputs, hidden_size].
        """
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, positions, self.rotary)
        assert residual is not None, "a model has at least one layer"
        outputs = get_forward_context().outputs
        return (hidden_states, residual) if outputs is None else (hidden_states[outputs], residual[outputs])


class Qwen3ForCausalLM(CheckpointModule):
    """Token ids to hidden states, and hidden states to logits.

    Args:
        config: the checkpoint's shape.
        num_positions: the longest sequence that will be run.
        ranks: who shares the model.
    """

    layer_class: ClassVar[type[Qwen3DecoderLayer]] = Qwen3DecoderLayer
    merged: ClassVar[dict[str, tuple[str, str]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }

    def __init__(self, config: ModelConfig, num_positions: int, ranks: Ranks) -> None:
        super().__init__()
        self.model = Qwen3Model(config, num_positions, self.layer_class, ranks)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, ranks)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            self.tied = ("lm_head.weight",)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """int64 [num_tokens] and int64 [num_tokens] -> hidden states [num_outputs, hidden_size]."""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[num_rows, hidden_size] -> logits [num_rows, vocab_size]; rows of tokens that are sampled only."""
        return self.lm_head(hidden_states)
