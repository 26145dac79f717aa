"""Decoder layers on a CPU, many in one call: cpu_decoder.cpp, which says why. A GPU's counterpart is a CUDA graph."""

from typing import Any

from torch import Tensor, nn

from nanovllm.layers.activation import SiluAndMul
from nanovllm.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3Model
from nanovllm.utils.context import get_forward_context
from nanovllm.utils.methods import replace_methods

# Tokens times layers of one call: Ctrl-C waits until it returns, and beside so much work a call costs nothing.
WORK = 1024


def use_whole_layers(model: nn.Module, kernels: Any, scale: float) -> None:
    """Let the decoder layers of `model` run as C++, if they are qwen3.py's and no other rank has a part of them.

    Args:
        model: changed in place; other models are not. Its weights are on the CPU, in the form in which they are multiplied.
        kernels: what `load_kernels` returns.
        scale: of the attention's scores.
    """

    def run_layers(self: Any, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        context = get_forward_context()
        weights, num_layers, metadata = self.decoder_weights, len(self.layers), context.metadata
        size = len(weights) // num_layers
        batch = (metadata.slot_mapping, metadata.cu_seqlens_q, metadata.context_lens, metadata.block_tables)
        residual = None
        at_once = max(1, WORK // max(1, len(hidden_states)))
        for first in range(0, num_layers, at_once):
            last = first + at_once
            some, caches = weights[first * size : last * size], context.kv_cache[first:last]
            outputs = context.outputs if last >= num_layers else None
            hidden_states, residual = kernels.run_layers(
                hidden_states, residual, some, caches, positions, self.rotary.cos_sin, *batch, self.norm.eps, scale, outputs
            )
        return hidden_states, residual

    for module in model.modules():
        decoder: Any = module
        if isinstance(module, Qwen3Model) and all(map(_is_known, decoder.layers)):
            decoder.decoder_weights = [weight for layer in decoder.layers for weight in _weights(layer)]
            replace_methods(decoder, Qwen3Model, run_layers=run_layers)


def _is_known(layer: Qwen3DecoderLayer) -> bool:
    """Whether a layer does what the C++ does, and nothing more."""
    attention, mlp = layer.self_attn, layer.mlp
    parts = (layer, Qwen3DecoderLayer), (attention, Qwen3Attention), (mlp, Qwen3MLP)
    same_steps = all(type(part).forward is kind.forward for part, kind in parts)
    return same_steps and isinstance(mlp.activation, SiluAndMul) and mlp.down_proj.ranks.size == 1


def _weights(layer: Qwen3DecoderLayer) -> list[Tensor | None]:
    """In the order of `Layer` in cpu_decoder.cpp."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm.weight, attention.k_norm.weight) if attention.has_qk_norm else (None, None)
    qkv, o, gate_up, down = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
    return [
        *(layer.input_layernorm.weight, qkv.weight, qkv.bias, *norms, o.weight, o.bias),
        *(layer.post_attention_layernorm.weight, gate_up.weight, gate_up.bias, down.weight, down.bias),
    ]
