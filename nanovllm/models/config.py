"""ModelConfig: what the models need to know of a checkpoint, read from its config.json.

Options that the code does not implement are refused by name, never ignored. Configs written by Transformers 4 and 5 say
the same in different places (`rope_theta` and `rope_scaling` or `rope_parameters`, `torch_dtype` or `dtype`); both, read
by either version of the library, come out the same.
"""

from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.config import DTYPES
from nanovllm.layers.rotary_embedding import ROPE_KINDS, RopeConfig

_NEEDED_ROPE_OPTIONS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder-only transformer with rotary positions, RMSNorm and SwiGLU."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    rope: RopeConfig
    sliding_window: int | None  # contexts up to this length attend to everything
    dtype: torch.dtype  # of the checkpoint


def read_model_config(hf_config: Any, architecture: str) -> ModelConfig:
    """Read a Transformers config object, of version 4.51 or later.

    Raises:
        ValueError: an option that is not implemented, or values that do not fit together.
    """
    _refuse_unknown_options(hf_config)
    num_heads = hf_config.num_attention_heads
    num_kv_heads = getattr(hf_config, "num_key_value_heads", None) or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} does not divide by num_key_value_heads {num_kv_heads}")
    attention_bias = bool(getattr(hf_config, "attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf_config.vocab_size,
        hidden_size=hf_config.hidden_size,
        intermediate_size=hf_config.intermediate_size,
        num_layers=hf_config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads,
        rms_norm_eps=hf_config.rms_norm_eps,
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",  # there it is no option
        o_bias=attention_bias,
        mlp_bias=bool(getattr(hf_config, "mlp_bias", False)),
        tie_word_embeddings=bool(hf_config.tie_word_embeddings),
        rope=_read_rope(hf_config),
        sliding_window=_read_sliding_window(hf_config),
        dtype=_read_dtype(hf_config),
    )


def _refuse_unknown_options(hf_config: Any) -> None:
    if getattr(hf_config, "hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {hf_config.hidden_act!r} is not supported; 'silu' is")
    if getattr(hf_config, "quantization_config", None):
        raise ValueError("quantization_config is set: quantised checkpoints are not supported")


def _read_rope(hf_config: Any) -> RopeConfig:
    """`rope_parameters` holds everything where it exists; else `rope_theta` and `rope_scaling` do."""
    options = dict(getattr(hf_config, "rope_parameters", None) or {})
    if not options:
        options = dict(getattr(hf_config, "rope_scaling", None) or {})
    theta = options.pop("rope_theta", None) or getattr(hf_config, "rope_theta", None)
    if theta is None:
        raise ValueError("the config has neither rope_theta nor rope_parameters['rope_theta']")
    kind, old_kind = options.pop("rope_type", None), options.pop("type", None)
    kind = kind or old_kind or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope_type {kind!r} is not supported; {', '.join(sorted(ROPE_KINDS))} are")
    for rotated in (options.pop("partial_rotary_factor", None), getattr(hf_config, "partial_rotary_factor", None)):
        if rotated not in (None, 1.0):
            raise ValueError(f"partial_rotary_factor {rotated} is not supported; 1.0 is")
    for name in _NEEDED_ROPE_OPTIONS.get(kind, ()):
        if options.get(name) is None:
            raise ValueError(f"rope_type {kind!r} needs {name}")
    return RopeConfig(kind, float(theta), options, hf_config.max_position_embeddings)


def _read_sliding_window(hf_config: Any) -> int | None:
    """The window, if any layer slides. Qwen's configs carry one that use_sliding_window=False turns off."""
    if not getattr(hf_config, "use_sliding_window", True):
        return None
    layer_types = getattr(hf_config, "layer_types", None)
    if layer_types and set(layer_types) == {"full_attention"}:
        return None
    return getattr(hf_config, "sliding_window", None)


def _read_dtype(hf_config: Any) -> torch.dtype:
    dtype = getattr(hf_config, "dtype", None) or getattr(hf_config, "torch_dtype", None) or torch.float32
    dtype = DTYPES.get(dtype.removeprefix("torch."), dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"the checkpoint's dtype {dtype} is not supported; {', '.join(DTYPES)} are")
    return dtype
