"""torch.compile for the sampler, where there is a GPU to gain from it.

Weighing all tokens of the vocabulary is a chain of elementwise operations and sums; compiled, it reads the logits once. All
sizes are dynamic from the first call, so that no number of rows makes it compile again; only a size of 1 is a case of its
own. (The layers of the model have kernels: triton_layers.py. Called thirty times a step, what torch.compile does around each
call took longer than the GPU, and its kernels for rotation and activation reached a third of the memory's speed.)
"""

from collections.abc import Callable
from typing import Any

import torch

from nanovllm.layers.sampler import Sampler
from nanovllm.utils.methods import replace_methods

METHODS = ("pick_largest", "pick_any")


def compile_sampler(sampler: Sampler, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile `METHODS` of a sampler, at their first calls.

    Args:
        sampler: changed in place; others are not.
        backend: torch.compile's.
    """
    compiled = {name: torch.compile(getattr(Sampler, name), backend=backend, dynamic=True) for name in METHODS}
    replace_methods(sampler, Sampler, **compiled)
