"""From a checkpoint to a model whose layers are in the form in which they run best here."""

from pathlib import Path

import torch

from nanovllm.attention.backend import AttentionBackend
from nanovllm.layers.cpu_linear import is_fastest, use_packed_weights
from nanovllm.layers.fixed_rows import fix_rows
from nanovllm.layers.packed_weight import pack_weights
from nanovllm.utils.cpu_build import load_kernels
from nanovllm.utils.device import cpu_flags
from nanovllm.utils.loader import CheckpointModule, load_weights, materialize, stored_matrix_dtype
from nanovllm.utils.ranks import Ranks


def load_model(model: CheckpointModule, folder: Path, backend: AttentionBackend, ranks: Ranks) -> None:
    """Fill a model that is on the meta device.

    Args:
        model: changed in place.
        folder: the checkpoint.
        backend: beside which the model will run; its spec says where, and in which dtype.
        ranks: who shares the model.

    Raises:
        As `load_weights`.
    """
    spec = backend.spec
    if backend.HAS_PRODUCTS and (spec.batch_invariant or is_fastest(spec.dtype, cpu_flags())):
        matrix_dtype = stored_matrix_dtype(folder) if spec.dtype == torch.float32 else spec.dtype
        materialize(model, spec.dtype, spec.device, matrix_dtype)
        load_weights(model, folder, ranks, use_packed_weights(model, load_kernels(), spec.dtype))
    else:
        materialize(model, spec.dtype, spec.device)
        load_weights(model, folder, ranks)
        pack_weights(model)
    if spec.batch_invariant:
        fix_rows(model)
    backend.fuse_layers(model)
    model.to(spec.device).eval()  # the tables of the rotary embedding are still to be moved
