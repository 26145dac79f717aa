"""The sampler alone, without a model."""

import time
from contextlib import suppress

import torch

from nanovllm.layers.cpu_layers import fuse_layers
from nanovllm.layers.sampler import Filters, Sampler
from nanovllm.utils.cpu_build import BuildError, load_kernels


def time_sampler(num_rows: int = 96, vocab_size: int = 151_936, repeat: int = 7) -> dict[str, float]:
    """Milliseconds for one token of each row, the best of some, by sampling settings."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = 3 * torch.randn(num_rows, vocab_size, device=device)
    logits[:, ::5000] += 15  # as peaked as a model's often are
    uniforms = torch.rand(num_rows)
    sampler = Sampler()
    if device == "cpu":
        with suppress(BuildError):  # as in the engine: without a compiler the plain one runs
            fuse_layers(sampler, load_kernels())

    def measure(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> float:
        columns = (torch.full((num_rows,), value) for value in (top_k, top_p, min_p))
        filters = None if (top_k, top_p, min_p) == (0, 1.0, 0.0) else Filters(*columns)
        seconds = []
        for _ in range(repeat + 1):
            start = time.perf_counter()
            sampler(logits, torch.full((num_rows,), temperature), uniforms, filters)
            seconds.append(time.perf_counter() - start)
        return round(1e3 * min(seconds[1:]), 1)

    return {
        "greedy_ms": measure(0.0),
        "temperature_ms": measure(0.7),
        "top_k_50_top_p_0.95_ms": measure(0.7, top_k=50, top_p=0.95),
        "top_p_0.95_ms": measure(0.7, top_p=0.95),
        "min_p_0.05_ms": measure(0.7, min_p=0.05),
    }
