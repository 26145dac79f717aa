"""The forward context: what attention must know of the step that is being computed.

The model's code passes hidden states from layer to layer; what belongs to the step (who the tokens belong to, where their
K and V go) reaches the attention layers through here. It is entered around one forward pass and left on any exit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from nanovllm.attention.backend import AttentionBackend


class AttentionMetadata(NamedTuple):
    """The shape of one variable-length batch. A decode is a query of length 1."""

    cu_seqlens_q: Tensor  # int32 [num_seqs + 1]: where each sequence's tokens begin in the batch
    context_lens: Tensor  # int32 [num_seqs]: tokens in the cache after this step, so the last query's position + 1
    block_tables: Tensor  # int32 [num_seqs, max_blocks]: KV blocks of each sequence; what lies beyond its own is arbitrary
    slot_mapping: Tensor  # int64 [num_tokens]: where K and V of each token go (block * block_size + offset); -1: nowhere
    max_seqlen_q: int  # the longest query of the batch
    max_context_len: int  # the longest context of the batch


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One forward pass: its batch, the backend that attends, the backend's cache of each layer, and what is asked for."""

    metadata: AttentionMetadata
    backend: "AttentionBackend"
    kv_cache: Sequence[Tensor]  # one a layer, in the backend's own layout
    # int64 [num_outputs]: tokens whose hidden states are to come out, ascending, each its sequence's last. None: all tokens.
    outputs: Tensor | None = None


_current: ContextVar[ForwardContext | None] = ContextVar("nanovllm_forward_context", default=None)


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` the current one inside the `with` block."""
    before = _current.get()
    try:  # before it is set: an interrupt can come between any two lines
        _current.set(context)
        yield
    finally:
        _current.set(before)


def get_forward_context() -> ForwardContext:
    """The current forward context.

    Raises:
        RuntimeError: outside of `forward_context`.
    """
    context = _current.get()
    if context is None:
        raise RuntimeError("attention was called outside of a forward context: enter forward_context(...) first")
    return context
