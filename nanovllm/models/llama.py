"""Llama (Dubey et al. 2024, "The Llama 3 Herd of Models") and Mistral (Jiang et al. 2023).

Both are Qwen3 without the norms on queries and keys: read qwen3.py. SmolLM2 and DeepSeek-LLM are Llamas by architecture.
"""

from typing import ClassVar

from nanovllm.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM


class LlamaAttention(Qwen3Attention):
    """Grouped-query attention with rotary positions."""

    has_qk_norm: ClassVar[bool] = False


class LlamaDecoderLayer(Qwen3DecoderLayer):
    """Llama's attention and MLP, each added to the residual stream."""

    attention_class: ClassVar[type[Qwen3Attention]] = LlamaAttention


class LlamaForCausalLM(Qwen3ForCausalLM):
    """Llama 2 and 3 and what shares their architecture; biases where the config asks for them."""

    layer_class: ClassVar[type[Qwen3DecoderLayer]] = LlamaDecoderLayer


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral, for contexts within its sliding window, where it is a Llama."""
