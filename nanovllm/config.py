"""EngineConfig: what the user may set on `LLM(model, **config)`. Validated once, then frozen.

None means "choose for me"; what is chosen is passed on as a value and never written back here.
"""

import difflib
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch

from nanovllm.sampling_params import MAX_SEED, check_int

DEFAULT_MAX_MODEL_LEN = 4096
MAX_MEMORY_GB = 1e6
DEFAULT_BATCHED_TOKENS = {"cuda": 16384, "cpu": 2048}  # on a CPU larger matrices are no faster and need more memory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engine's settings.

    Args:
        max_num_batched_tokens: tokens computed in one step at most; longer prompts are prefilled in chunks.
            Default 16384 on a GPU, 2048 on a CPU.
        max_num_seqs: requests that run at the same time at most.
        max_model_len: prompt and output tokens of a request together at most. Default 4096, or what the model was
            made for if that is less.
        gpu_memory_utilization: share of the GPU's memory to use, above 0 and up to 1.
        tensor_parallel_size: ranks that share the model: GPUs of one machine, or processes on a CPU.
        enforce_eager: neither compile nor capture anything.
        kvcache_block_size: tokens in a KV block, a multiple of 16. Default: the attention backend's wish, else 16.
        num_kvcache_blocks: KV blocks to allocate. Default: what memory allows and the work can use.
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        dtype: "auto" (the checkpoint's), "float32", "bfloat16", "float16", or the torch dtype.
        attention_backend: "auto" or the name of one of nanovllm.attention's.
        kvcache_memory_gb: GiB for the KV cache, over all ranks. On the CPU the default is half of the memory that is free.
        enable_prefix_caching: share KV blocks between requests that begin with the same tokens.
        batch_invariant: make sure that a token's logits do not depend, bit for bit, on what else is computed. On an x86 CPU
            the default backend has this property anyway; elsewhere it costs speed.
        seed: makes the seeds drawn for requests without one reproducible.
    """

    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 512
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    kvcache_block_size: int | None = None
    num_kvcache_blocks: int | None = None
    device: str = "auto"
    dtype: str | torch.dtype = "auto"
    attention_backend: str = "auto"
    kvcache_memory_gb: float | None = None
    enable_prefix_caching: bool = True
    batch_invariant: bool = False
    seed: int | None = None

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> "EngineConfig":
        """Make a config of keyword arguments.

        Raises:
            TypeError: an unknown keyword (the message names the nearest known one) or a value of the wrong type.
            ValueError: a value out of its range.
        """
        known = [field.name for field in fields(cls)]
        for name in kwargs:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise TypeError(f"LLM got an unknown keyword {name!r}; did you mean {nearest!r}?")
        return cls(**kwargs)

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_model_len", "kvcache_block_size", "num_kvcache_blocks"):
            if getattr(self, name) is not None:
                self._set_int(name, minimum=1)
        self._set_int("max_num_seqs", minimum=1)
        self._set_int("tensor_parallel_size", minimum=1)
        if self.kvcache_block_size is not None and self.kvcache_block_size % 16:
            raise ValueError(f"kvcache_block_size must be a multiple of 16, got {self.kvcache_block_size}")
        if self.seed is not None:
            self._set_int("seed", minimum=0, maximum=MAX_SEED)
        for name in ("enforce_eager", "enable_prefix_caching", "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _check_positive("gpu_memory_utilization", self.gpu_memory_utilization, maximum=1.0)
        if self.kvcache_memory_gb is not None:
            _check_positive("kvcache_memory_gb", self.kvcache_memory_gb, maximum=MAX_MEMORY_GB)
        for name in ("device", "attention_backend"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a str, got {getattr(self, name)!r}")
        if not isinstance(self.dtype, (str, torch.dtype)):
            raise TypeError(f"dtype must be a str or a torch dtype, got {self.dtype!r}")
        if not isinstance(self.dtype, torch.dtype) and self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if isinstance(self.dtype, torch.dtype) and self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")

    def _set_int(self, name: str, minimum: int, maximum: int | None = None) -> None:
        """Check, and make numpy's integers, which overflow, Python's."""
        object.__setattr__(self, name, check_int(name, getattr(self, name), minimum, maximum))


def _check_positive(name: str, value: object, maximum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 < value <= maximum:  # type: ignore[operator]  # NaN fails every comparison
        raise ValueError(f"{name} must be above 0 and at most {maximum:g}, got {value}")
