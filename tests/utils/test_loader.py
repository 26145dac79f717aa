"""Loading weights: every parameter exactly once, or an error that names the tensor and the file; and shares of ranks."""

import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CheckpointFactory
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.models import get_model_class, load_model_config
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils import loader
from nanovllm.utils.loader import checkpoint_files, load_weights, materialize, stored_matrix_dtype
from nanovllm.utils.ranks import Ranks

EMBEDDING = "model.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
HEAD = "lm_head.weight"
BIASES = {"architecture": "LlamaForCausalLM", "attention_bias": True, "mlp_bias": True}
INDEX = "model.safetensors.index.json"

# Our merged parameters, and the checkpoint's tensors that make them up, in order.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def build(folder: Path, ranks: Ranks | None = None, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """The folder's model, its memory allocated but not loaded: NaN, so that a forgotten value shows."""
    config = load_model_config(folder)
    with torch.device("meta"):
        model = get_model_class(config.architecture)(config, 32, ranks or Ranks())
    materialize(model, dtype, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    return model


def load(folder: Path, ranks: Ranks | None = None, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    model = build(folder, ranks, dtype)
    load_weights(model, folder)
    return model


def source_tensors(parameter_name: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The checkpoint's tensors that a parameter of ours consists of."""
    for merged, parts in MERGED.items():
        if f".{merged}." in parameter_name:
            return [tensors[parameter_name.replace(merged, part)] for part in parts]
    return [tensors[parameter_name]]


def assert_holds(model: Qwen3ForCausalLM, tensors: dict[str, Tensor]) -> None:
    """Each parameter equals its tensors of the checkpoint; NaN, of memory not written, equals nothing."""
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.cat(source_tensors(name, tensors)).to(parameter.dtype)), name


@pytest.fixture
def folder(checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A copy of a tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "checkpoint"))


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def write_sharded(folder: Path, tensors: dict[str, Tensor], num_files: int = 3) -> list[Path]:
    """Replace the single file by several and their index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_files):
        file = f"model-{shard + 1:05}-of-{num_files:05}.safetensors"
        write(folder, {name: tensors[name] for name in names[shard::num_files]}, file)
        weight_map.update(dict.fromkeys(names[shard::num_files], file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sorted(folder.glob("*-of-*.safetensors"))


def test_each_parameter_is_used_when_it_is_filled_and_then_let_go(folder: Path) -> None:
    model = build(folder)
    names = {weakref.ref(parameter): name for name, parameter in model.named_parameters()}
    used: list[str] = []

    def use(parameter: nn.Parameter) -> None:
        assert not parameter.isnan().any(), "it is whole"
        assert all(original() is None for original, name in names.items() if name in used), "those before are gone"
        used.append(names[weakref.ref(parameter)])
        for module in model.modules():
            for name, own in module.named_parameters(recurse=False):
                if own is parameter:
                    setattr(module, name, nn.Parameter(torch.zeros(1), requires_grad=False))

    load_weights(model, folder, use=use)
    assert sorted(used) == sorted(names.values())


# ---- what is loaded ----


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "Qwen3ForCausalLM"},
        {"architecture": "Qwen2ForCausalLM"},
        {"architecture": "MistralForCausalLM"},
        {"architecture": "Qwen3ForCausalLM", "attention_bias": True},
        {"architecture": "LlamaForCausalLM", "tie_word_embeddings": True},
        BIASES,
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_parameter_is_the_checkpoints(
    options: dict[str, Any], dtype: torch.dtype, checkpoint: CheckpointFactory
) -> None:
    model = load(checkpoint(**options), dtype=dtype)
    tensors = read(checkpoint(**options))
    assert_holds(model, tensors)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    num_loaded = sum(len(source_tensors(name, tensors)) for name, _ in model.named_parameters())
    assert num_loaded == len(tensors), "a tensor of the checkpoint was left out"


def test_every_part_of_a_parameter_is_written_exactly_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(folder)
    copied: list[str] = []
    copy = Tensor.copy_

    def counting_copy(target: Tensor, source: Tensor) -> Tensor:
        assert target.isnan().all(), "written before"
        copied.append(str(target.shape))
        return copy(target, source)

    monkeypatch.setattr(Tensor, "copy_", counting_copy)
    load_weights(model, folder)
    assert len(copied) == len(read(folder))


def test_sharded_equals_single(folder: Path) -> None:
    tensors = read(folder)
    write_sharded(folder, tensors)
    assert_holds(load(folder), tensors)


def test_files_without_an_index_are_all_read(folder: Path) -> None:
    tensors = read(folder)
    write_sharded(folder, tensors)
    (folder / INDEX).unlink()
    assert_holds(load(folder), tensors)


def test_the_index_decides_which_files_are_read(folder: Path) -> None:
    tensors = read(folder)
    files = write_sharded(folder, tensors)
    write(folder, {"other": torch.zeros(1)}, "consolidated.safetensors")
    assert checkpoint_files(folder) == files
    assert_holds(load(folder), tensors)


def test_the_single_file_goes_before_other_names(folder: Path) -> None:
    write(folder, {"other": torch.zeros(1)}, "consolidated.safetensors")
    assert checkpoint_files(folder) == [folder / "model.safetensors"]


@pytest.mark.parametrize("in_file", [False, True])
def test_tied_embeddings_may_or_may_not_be_repeated_in_the_file(
    in_file: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint(tie_word_embeddings=True), tmp_path / "tied"))
    tensors = read(folder)
    assert HEAD not in tensors
    if in_file:
        write(folder, {**tensors, HEAD: tensors[EMBEDDING].clone()})
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert_holds(model, tensors)


def test_rotary_tables_in_old_checkpoints_are_passed_over(folder: Path) -> None:
    tensors = read(folder)
    write(folder, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert_holds(load(folder), tensors)


def test_tensors_of_another_dtype_are_converted(folder: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in read(folder).items()}
    write(folder, tensors)
    assert_holds(load(folder), tensors)


# ---- memory ----


def test_models_are_made_without_memory_and_get_it_once() -> None:
    with torch.device("meta"):
        layer = ColumnParallelLinear(8, {"a": 4, "b": 4}, True, Ranks())
        other = nn.Linear(8, 8, bias=False)
        other.weight = layer.weight
    model = nn.ModuleList([layer, other])
    assert all(parameter.is_meta for parameter in model.parameters())
    materialize(model, torch.bfloat16, torch.device("cpu"))
    assert layer.weight is other.weight, "shared parameters stay shared"
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}
    assert layer.bias is not None


class CountingSlice:
    """A tensor in a file that knows how many bytes of what was read from it are still in use."""

    def __init__(self, tensor: Any, counter: "Counter") -> None:
        self.tensor = tensor
        self.counter = counter

    def get_shape(self) -> list[int]:
        shape: list[int] = self.tensor.get_shape()
        return shape

    def get_dtype(self) -> str:
        return str(self.tensor.get_dtype())

    def __getitem__(self, key: Any) -> Tensor:
        value: Tensor = self.tensor[key]
        self.counter.add(value)
        return value


class Counter:
    """Bytes of the tensors given to `add` that are alive: now, at most, and all together."""

    def __init__(self) -> None:
        self.alive = self.peak = self.total = 0

    def add(self, tensor: Tensor) -> None:
        self.alive += tensor.nbytes
        self.total += tensor.nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self._remove, tensor.nbytes)

    def _remove(self, num_bytes: int) -> None:
        self.alive -= num_bytes


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts what the loader reads."""
    counter, tensors_of = Counter(), loader._tensors_of

    def counting_tensors_of(file: Path) -> Iterator[tuple[str, CountingSlice]]:
        for name, tensor in tensors_of(file):
            yield name, CountingSlice(tensor, counter)

    monkeypatch.setattr(loader, "_tensors_of", counting_tensors_of)
    return counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharded", [False, True])
def test_beside_the_weights_one_tensor_is_in_memory(
    sharded: bool, dtype: torch.dtype, folder: Path, counter: Counter
) -> None:
    tensors = read(folder)
    if sharded:
        write_sharded(folder, tensors)
    model = load(folder, dtype=dtype)
    assert counter.peak == max(tensor.nbytes for tensor in tensors.values())
    assert counter.total == sum(tensor.nbytes for tensor in tensors.values()), "something was read twice, or not at all"
    assert counter.alive == 0
    # What was read, and views of it, are not what the parameters keep.
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize


def test_a_rank_reads_its_share_alone(checkpoint: CheckpointFactory, counter: Counter) -> None:
    folder = checkpoint()
    model = load(folder, PartialRanks(0, 2))
    assert counter.total == sum(parameter.nbytes for parameter in model.parameters())
    assert counter.total < 0.51 * sum(tensor.nbytes for tensor in read(folder).values())


# ---- errors ----


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", [EMBEDDING, GATE, HEAD, "model.norm.weight", "model.layers.1.self_attn.q_norm.weight"])
def test_missing_tensor(name: str, sharded: bool, folder: Path) -> None:
    tensors = read(folder)
    del tensors[name]
    if sharded:
        write_sharded(folder, tensors)
    else:
        write(folder, tensors)
    with pytest.raises(ValueError, match="lacks 1 tensors") as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    layer = name.split(".")[-2]
    part = {"gate_proj": "gate_up_proj.weight (gate)"}.get(layer, f"{layer}.weight")
    assert part in str(caught.value)


def test_missing_bias(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint(**BIASES), tmp_path / "checkpoint"))
    tensors = read(folder)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    write(folder, tensors)
    with pytest.raises(ValueError, match=r"lacks 1 .*model\.layers\.1\.self_attn\.qkv_proj\.bias \(k\)"):
        load(folder)


def test_many_missing_tensors_are_counted_and_some_named(folder: Path) -> None:
    tensors = read(folder)
    write(folder, {EMBEDDING: tensors[EMBEDDING]})
    with pytest.raises(ValueError, match=rf"lacks {len(tensors) - 1} tensors .*lm_head\.weight"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",  # of a model that has none
        "model.layers.2.mlp.up_proj.weight",  # of a layer too many
        "model.layers.0.self_attn.qkv_proj.weight",  # our own name for it, in no checkpoint
        "model.layers.0.mlp.gate_proj.qweight",
        "score.weight",
        "weight",
        "q_proj.weight",
    ],
)
def test_unknown_tensor(name: str, folder: Path) -> None:
    file = write(folder, {**read(folder), name: torch.ones(64)})
    with pytest.raises(ValueError, match="is unknown to this architecture") as caught:
        load(folder)
    assert f"{name} in {file}" in str(caught.value)


@pytest.mark.parametrize("name", [EMBEDDING, GATE])
def test_tensor_in_two_files(name: str, folder: Path) -> None:
    tensors = read(folder)
    files = write_sharded(folder, tensors)
    (owner,) = (file for file in files if name in load_file(file))
    other = next(file for file in files if file != owner)
    write(folder, {**load_file(other), name: tensors[name]}, other.name)
    with pytest.raises(ValueError, match=f"tensor {name} is in ") as caught:
        load(folder)
    assert str(owner) in str(caught.value)
    assert str(other) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (EMBEDDING, (319, 64)),
        (EMBEDDING, (320, 65)),
        (GATE, (95, 64)),
        (GATE, (96, 63)),
        (GATE, (1, 96, 64)),
        (GATE, (96 * 64,)),
        ("model.layers.0.self_attn.o_proj.weight", (64, 32)),
        ("model.layers.0.self_attn.k_proj.weight", (64, 64)),  # as if every head had its own keys
        ("model.norm.weight", (1,)),  # which would broadcast
        ("model.norm.weight", ()),
    ],
)
def test_wrong_shape(name: str, shape: tuple[int, ...], folder: Path) -> None:
    file = write(folder, {**read(folder), name: torch.ones(shape)})
    with pytest.raises(ValueError, match=r"has shape .* the config asks for") as caught:
        load(folder)
    assert f"tensor {name} in {file}" in str(caught.value)
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_tensors_are_not_taken_for_weights(dtype: torch.dtype, folder: Path) -> None:
    # Without quantization_config in config.json, the dtype alone tells: the numbers have scales somewhere.
    tensors = read(folder)
    file = write(folder, {**tensors, GATE: tensors[GATE].to(dtype)})
    with pytest.raises(ValueError, match="dtype") as caught:
        load(folder)
    assert f"tensor {GATE} in {file}" in str(caught.value)


def test_missing_shard(folder: Path) -> None:
    files = write_sharded(folder, read(folder))
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{INDEX} but is not there") as caught:
        load(folder)
    assert str(files[1]) in str(caught.value)


def test_no_safetensors(folder: Path) -> None:
    # A pickle can run code when it is read: it is not even opened.
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors file.*\*\.bin, are not loaded") as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no safetensors", b"\xff" * 64, b"<html>404</html>"])
def test_files_that_are_no_safetensors(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_truncated_file(kept: float, folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_unreadable_index(content: str, folder: Path) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        load(folder)


# ---- shares of ranks ----


class PartialRanks(Ranks):
    """One of several ranks alone: its collectives return its own part."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather_last_dim(self, x: Tensor) -> Tensor:
        return x


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class InMemory:
    """A tensor that looks like one in a file."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, key: Any) -> Tensor:
        return self.tensor[key]


def fill(layer: Any, tensors: dict[tuple[str, str], Tensor]) -> Any:
    """Load (parameter, part) -> tensor into a layer."""
    materialize(layer, torch.float32, torch.device("cpu"))
    for (name, part), tensor in tensors.items():
        layer.load_part(name, InMemory(tensor), part)
    return layer


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_column_parallel_ranks_side_by_side_are_the_whole_projections(bias: bool, size: int) -> None:
    outputs, x = {"q": 16, "k": 8, "v": 8}, randn(5, 12)
    tensors = {("weight", part): randn(rows, 12) + index for index, (part, rows) in enumerate(outputs.items())}
    if bias:
        tensors |= {("bias", part): randn(rows) - index for index, (part, rows) in enumerate(outputs.items())}
    layers = [fill(ColumnParallelLinear(12, outputs, bias, PartialRanks(r, size)), tensors) for r in range(size)]
    for index, part in enumerate(outputs):
        together = torch.cat([layer.forward_split(x)[index] for layer in layers], dim=-1)
        torch.testing.assert_close(together, F.linear(x, tensors["weight", part], tensors.get(("bias", part))))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_row_parallel_ranks_summed_are_the_whole_projection(bias: bool, size: int) -> None:
    x, tensors = randn(5, 12), {("weight", ""): randn(8, 12)}
    if bias:
        tensors["bias", ""] = randn(8) + 3  # added once, not once a rank
    layers = [fill(RowParallelLinear(12, 8, bias, PartialRanks(r, size)), tensors) for r in range(size)]
    together = sum(layer(part) for layer, part in zip(layers, x.chunk(size, dim=-1), strict=True))
    torch.testing.assert_close(together, F.linear(x, tensors["weight", ""], tensors.get(("bias", ""))))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocabulary_parallel_ranks_are_the_whole_embedding_and_head(size: int) -> None:
    table, token_ids, hidden_states = randn(32, 6), torch.tensor([0, 31, 15, 16, 7, 8, 0]), randn(3, 6)
    tensors = {("weight", ""): table}
    embeddings = [fill(VocabParallelEmbedding(32, 6, PartialRanks(r, size)), tensors) for r in range(size)]
    assert torch.equal(torch.stack([layer(token_ids) for layer in embeddings]).sum(0), table[token_ids])
    heads = [fill(ParallelLMHead(32, 6, PartialRanks(r, size)), tensors) for r in range(size)]
    logits = torch.cat([layer(hidden_states) for layer in heads], dim=-1)
    torch.testing.assert_close(logits, hidden_states @ table.T)


def test_ranks_shares_of_a_checkpoint_are_the_whole_of_it(checkpoint: CheckpointFactory) -> None:
    folder = checkpoint(**BIASES)
    whole = load(folder)
    for name, parameter in whole.named_parameters():
        shares = [load(folder, PartialRanks(rank, 2)).get_parameter(name) for rank in range(2)]
        if any(column in name for column in (*MERGED, "embed_tokens", "lm_head")):
            sizes = [len(tensor) // 2 for tensor in source_tensors(name, read(folder))]
            parts = zip(*(share.split(sizes) for share in shares), strict=True)
            assert torch.equal(torch.cat([torch.cat(pair) for pair in parts]), parameter), name
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(torch.cat(shares, dim=1), parameter), name
        else:
            assert all(torch.equal(share, parameter) for share in shares), name


def test_collectives_of_several_ranks_are_not_passed_over_silently() -> None:
    for collective in (Ranks(1, 2).all_reduce, Ranks(1, 2).gather_last_dim):
        with pytest.raises(AssertionError, match="not connected"):
            collective(torch.ones(2))


def test_one_rank_needs_no_collectives() -> None:
    x = randn(2, 3)
    assert Ranks().all_reduce(x) is x
    assert Ranks().gather_last_dim(x) is x


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.float16), torch.float16),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float64, torch.float64), torch.float32),
    ],
    ids=str,
)
def test_the_dtype_that_holds_all_matrices(dtypes: tuple[torch.dtype, ...], expected: torch.dtype, tmp_path: Path) -> None:
    for index, dtype in enumerate(dtypes):
        vector, matrix = torch.zeros(2, dtype=torch.float32), torch.zeros(2, 2, dtype=dtype)
        save_file({f"norm.{index}": vector, f"matrix.{index}": matrix}, tmp_path / f"{index}.safetensors")
    assert stored_matrix_dtype(tmp_path) == expected


def test_matrices_may_have_a_dtype_of_their_own(checkpoint: CheckpointFactory) -> None:
    config = load_model_config(checkpoint(tie_word_embeddings=True))
    with torch.device("meta"):
        model = get_model_class(config.architecture)(config, 32, Ranks())
    materialize(model, torch.float32, torch.device("cpu"), matrix_dtype=torch.float16)
    assert all(p.dtype == (torch.float16 if p.dim() == 2 else torch.float32) for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
