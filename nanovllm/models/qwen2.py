"""Qwen2 and Qwen2.5 (Qwen Team 2024, "Qwen2 Technical Report"): Llama with a bias on queries, keys and values."""

from nanovllm.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """The bias comes with the config: see `ModelConfig.qkv_bias`."""
