"""Safetensors -> parameters: every parameter exactly once, or an error that names the tensor and the file.

A model is built on the meta device, given uninitialised memory by `materialize`, and filled by `load_weights` tensor by
tensor, so that loading needs the memory of the weights and of one tensor, and no time for values that are overwritten. The
system gives memory when it is written to: where each weight is packed as soon as it is filled, loading needs the memory of
the packed weights and of a few others.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanovllm.utils.ranks import Ranks, Shard

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names


class CheckpointTensor(Protocol):
    """A tensor in a safetensors file, read when it is sliced."""

    def get_shape(self) -> list[int]:
        """Its size in each dimension."""

    def get_dtype(self) -> str:
        """Its dtype as safetensors names it."""

    def __getitem__(self, key: Any) -> Tensor: ...


@runtime_checkable
class LoadsParts(Protocol):
    """A layer whose parameters are not plain copies of checkpoint tensors: merged, or divided among ranks."""

    parts: tuple[str, ...]  # the tensors that make up each parameter; ("",) for one tensor

    def load_part(self, name: str, tensor: CheckpointTensor, part: str) -> None:
        """Take `part` of the parameter called `name` from a checkpoint."""


class CheckpointModule(nn.Module):
    """A model that can be loaded: its parameters are named as in the checkpoint, apart from those merged."""

    merged: ClassVar[dict[str, tuple[str, str]]] = {}  # name of a checkpoint's module -> (our module, part)
    tied: tuple[str, ...] = ()  # tensors that are shared with another; a checkpoint may repeat them


def materialize(model: nn.Module, dtype: torch.dtype, device: torch.device, matrix_dtype: torch.dtype | None = None) -> None:
    """Replace the model's meta parameters by uninitialised ones; shared parameters stay shared.

    Args:
        model: changed in place.
        dtype, device: of the parameters.
        matrix_dtype: of those with two dimensions, if it is another.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in replaced:
                own_dtype = matrix_dtype if matrix_dtype is not None and parameter.dim() == 2 else dtype
                memory = torch.empty(parameter.shape, dtype=own_dtype, device=device)
                replaced[parameter] = nn.Parameter(memory, requires_grad=False)
            module._parameters[name] = replaced[parameter]


def load_weights(
    model: CheckpointModule,
    folder: Path,
    ranks: Ranks | None = None,
    use: Callable[[nn.Parameter], None] = lambda parameter: None,
) -> None:
    """Fill all parameters of a materialized model from a checkpoint folder.

    Args:
        model: says which slices of the tensors it needs; nothing else is read.
        folder: the checkpoint.
        ranks: others that are loading theirs meanwhile.
        use: called with each parameter as soon as it is filled. It may replace it: its memory serves for the next ones then.

    Raises:
        FileNotFoundError: no safetensors files, or one that the index names is missing.
        ValueError: a tensor that is missing, unknown, given twice or of the wrong shape, or a file that cannot be read.
    """
    missing = _expected_parts(model)
    parameters = dict(model.named_parameters())
    loaded: dict[tuple[str, str], str] = {}
    for file in checkpoint_files(folder):
        for tensor_name, tensor in _tensors_of(file):
            if ranks is not None:
                ranks.check_peers()
            if tensor_name in model.tied or tensor_name.endswith("rotary_emb.inv_freq"):
                continue
            target = _target_of(model, tensor_name)
            if target in loaded:
                raise ValueError(f"tensor {tensor_name} is in {file} and in {loaded[target]}")
            name, part = target
            if part not in missing.get(name, ()):
                raise ValueError(f"tensor {tensor_name} in {file} is unknown to this architecture")
            try:
                _load_one(model, parameters[name], target, tensor)
            except ValueError as error:
                raise ValueError(f"tensor {tensor_name} in {file}: {error}") from None
            loaded[target] = str(file)
            missing[name].remove(part)
            if not missing[name]:
                del missing[name]
                use(parameters.pop(name))
    if missing:
        names = sorted(f"{name} ({part})" if part else name for name, parts in missing.items() for part in parts)
        raise ValueError(f"{folder} lacks {len(names)} tensors that the config asks for: {', '.join(names[:8])}")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of the index, else the single file, else all."""
    if (folder / INDEX).exists():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is not an index of safetensors files: {error!r}") from error
        for file in files:
            if not file.exists():
                raise FileNotFoundError(f"{file} is named in {INDEX} but is not there: download it")
        return files
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors file; other formats, such as *.bin, are not loaded")
    return files


def stored_matrix_dtype(folder: Path) -> torch.dtype:
    """The 16-bit dtype that all matrices of a checkpoint have; else float32, which holds what they have."""
    dtypes = {
        tensor.get_dtype()
        for file in checkpoint_files(folder)
        for _, tensor in _tensors_of(file)
        if len(tensor.get_shape()) == 2
    }
    return DTYPES[dtypes.pop()] if dtypes in ({"BF16"}, {"F16"}) else torch.float32


def copy_slice(target: Tensor, tensor: CheckpointTensor, dim: int = 0, shard: Shard | None = None) -> None:
    """Copy `shard` of `tensor`, divided along `dim`, to `target`; None: all of it. Nothing else of it is read.

    Raises:
        ValueError: the shape is not what the shard is a part of.
    """
    expected = list(target.shape)
    if shard is not None:
        expected[dim] = shard.total
    if tensor.get_shape() != expected:
        raise ValueError(f"has shape {tensor.get_shape()}, the config asks for {expected}")
    filled = 0
    for begin, end in ((0, expected[dim]),) if shard is None else shard.spans:
        part = tensor[begin:end] if dim == 0 else tensor[:, begin:end]
        target.narrow(dim, filled, end - begin).copy_(part)
        filled += end - begin
    if filled < target.shape[dim]:
        target.narrow(dim, filled, target.shape[dim] - filled).zero_()  # padding: adds nothing wherever it is read


def _expected_parts(model: CheckpointModule) -> dict[str, set[str]]:
    """Of each parameter."""
    expected = {}
    for name, _ in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        expected[name] = set(layer.parts if isinstance(layer, LoadsParts) else ("",))
    return expected


def _target_of(model: CheckpointModule, tensor_name: str) -> tuple[str, str]:
    """The parameter, and the part of it, that a checkpoint's tensor belongs to."""
    path, _, name = tensor_name.rpartition(".")
    parent, _, module = path.rpartition(".")
    if module not in model.merged:
        return tensor_name, ""
    merged_module, part = model.merged[module]
    return f"{parent}.{merged_module}.{name}", part


def _load_one(model: CheckpointModule, parameter: nn.Parameter, target: tuple[str, str], tensor: CheckpointTensor) -> None:
    if tensor.get_dtype() not in DTYPES:
        raise ValueError(f"has dtype {tensor.get_dtype()}; {', '.join(DTYPES)} are weights, others are quantised")
    path, _, name = target[0].rpartition(".")
    layer = model.get_submodule(path)
    if isinstance(layer, LoadsParts):
        layer.load_part(name, tensor, target[1])
    else:
        copy_slice(parameter, tensor)


def _tensors_of(file: Path) -> Iterator[tuple[str, CheckpointTensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_slice(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
