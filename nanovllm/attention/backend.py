"""The interface of attention backends, and the choice of one.

A backend owns the layout of its KV cache. Once a step and layer, `store` writes K and V of all tokens of the step, then
`attend` reads. Blocks that were never written may hold anything, NaN included, and must not reach a result.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.utils.context import AttentionMetadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What a backend has to serve: one rank's heads, and the cache's block size."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    max_context_len: int = 4096  # the longest sequence that will be run
    batch_invariant: bool = False  # a query's result must be the same bits in a chunk of any size and in any batch

    @property
    def bytes_per_block(self) -> int:
        """Bytes of K and V in one block of one layer."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class AttentionBackend(ABC):
    """Paged attention for one model on one rank."""

    DEFAULT_BLOCK_SIZE: ClassVar[int] = 16
    # In a CUDA graph: nothing looks at a tensor's values on the host.
    CAN_CAPTURE_DECODES: ClassVar[bool] = False
    CAN_CAPTURE_CHUNKS: ClassVar[bool] = False  # queries of any length, in a batch whose shape says only how long at most
    HAS_PRODUCTS: ClassVar[bool] = False  # its library multiplies weights too

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.scale: float = spec.head_dim**-0.5

    @staticmethod
    @abstractmethod
    def why_not(spec: AttentionSpec) -> str | None:
        """Why this backend cannot serve `spec` on this machine, or None when it can."""

    def fuse_layers(self, model: nn.Module) -> None:
        """Let layers of `model`, or a sampler, changed in place, run as kernels where this backend runs, if it has some."""
        return

    @abstractmethod
    def allocate_cache(self, num_blocks: int) -> Tensor:
        """The cache of one layer, in this backend's layout, not initialised."""

    def get_memory(self, kv_cache: list[Tensor], first_block: int, end_block: int, in_large_pages: bool) -> None:
        """Get the memory of some blocks of all layers from the operating system before a step needs it, if that pays.

        Args:
            kv_cache: the cache of every layer.
            first_block, end_block: the first to get and the one behind the last; all before them have been got.
            in_large_pages: whether large pages are wished for, where the system has some.
        """
        return

    @abstractmethod
    def store(self, k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
        """Write K and V of each token to its slot.

        Args:
            k, v: [num_tokens, num_kv_heads, head_dim].
            cache: one layer's cache.
            slot_mapping: int64 [num_tokens]; -1 writes nothing.
        """

    @abstractmethod
    def attend(self, q: Tensor, cache: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Causal attention of each query over its sequence's context.

        Args:
            q: [num_tokens, num_heads, head_dim], the tokens of each sequence together, in its order.
            cache: one layer's cache, with K and V of this step already stored.
            metadata: the batch.

        Returns:
            [num_tokens, num_heads, head_dim].
        """


class _Entry(NamedTuple):
    """Where a backend lives, and the devices on which "auto" considers it."""

    module: str
    class_name: str
    devices: tuple[str, ...]


# In the order in which "auto" tries them.
BACKENDS = {
    "cpu": _Entry("nanovllm.attention.cpu", "CPUBackend", ("cpu",)),
    "triton": _Entry("nanovllm.attention.triton", "TritonBackend", ("cuda",)),
    "flash_attn": _Entry("nanovllm.attention.flash_attn", "FlashAttnBackend", ("cuda",)),
    "torch_reference": _Entry("nanovllm.attention.torch_reference", "TorchReferenceBackend", ("cpu", "cuda")),
}


def choose_backend(name: str, make_spec: Callable[[type[AttentionBackend]], AttentionSpec]) -> AttentionBackend:
    """Make the backend called `name`, or for "auto" the first that can serve the spec.

    A warning says which faster backends for this device cannot be used, and why.

    Args:
        name: "auto" or one of `BACKENDS`.
        make_spec: gives the spec for a backend class, which may wish for a block size.

    Raises:
        ValueError: no such backend, or it cannot serve the spec.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"attention_backend must be 'auto' or one of {', '.join(BACKENDS)}, got {name!r}")
        backend_class, spec, reason = _consider(name, make_spec)
        if reason is not None:
            raise ValueError(f"attention_backend={name!r} cannot be used here: {reason}")
        return backend_class(spec)
    refusals: list[str] = []
    for candidate, entry in BACKENDS.items():
        backend_class, spec, reason = _consider(candidate, make_spec)
        if spec.device.type not in entry.devices:
            continue  # it might run there, for those who ask for it, but not well
        if reason is None:
            why = f" ({'; '.join(refusals)})" if refusals else f" (the first choice on {spec.device.type})"
            logger.log(logging.WARNING if refusals else logging.INFO, "attention backend: %s%s", candidate, why)
            return backend_class(spec)
        refusals.append(f"{candidate}: {reason}")
    raise ValueError(f"no attention backend can be used here: {'; '.join(refusals)}")


def _consider(
    name: str, make_spec: Callable[[type[AttentionBackend]], AttentionSpec]
) -> tuple[type[AttentionBackend], AttentionSpec, str | None]:
    entry = BACKENDS[name]
    backend_class: type[AttentionBackend] = getattr(import_module(entry.module), entry.class_name)
    spec = make_spec(backend_class)
    return backend_class, spec, backend_class.why_not(spec)
