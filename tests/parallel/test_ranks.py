"""Who has what: shards cover the whole, padding is zero, loading reads a rank's own slices and nothing else."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm.models import get_model_class, load_model_config
from nanovllm.utils import loader
from nanovllm.utils.loader import CheckpointModule, CheckpointTensor, load_weights, materialize
from nanovllm.utils.ranks import Ranks

CheckpointFactory = Callable[..., Path]


class CountingTensor:
    """A checkpoint's tensor that knows how much of it was read."""

    def __init__(self, tensor: CheckpointTensor, reads: list[int]) -> None:
        self._tensor = tensor
        self._reads = reads

    def get_shape(self) -> list[int]:
        return self._tensor.get_shape()

    def get_dtype(self) -> str:
        return self._tensor.get_dtype()

    def __getitem__(self, key: object) -> Tensor:
        part = self._tensor[key]
        self._reads.append(part.numel())
        return part


def load_rank(folder: Path, ranks: Ranks) -> CheckpointModule:
    config = load_model_config(folder)
    with torch.device("meta"):
        model = get_model_class(config.architecture)(config, 64, ranks)
    materialize(model, torch.float32, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.fill_(float("nan"))  # what the loader leaves out shows
    load_weights(model, folder)
    return model


def test_ranks_read_the_checkpoint_once_together(checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("Qwen2ForCausalLM", vocab_size=323, intermediate_size=98)
    whole = dict(load_rank(folder, Ranks()).named_parameters())
    tensors_of, reads = loader._tensors_of, [[], []]

    def counting(rank: int) -> Callable[[Path], Iterator[tuple[str, CheckpointTensor]]]:
        return lambda file: ((name, CountingTensor(tensor, reads[rank])) for name, tensor in tensors_of(file))

    parts = []
    for rank in range(2):
        monkeypatch.setattr(loader, "_tensors_of", counting(rank))
        parts.append(dict(load_rank(folder, Ranks(rank, 2)).named_parameters()))
    norms = sum(parameter.numel() for name, parameter in whole.items() if "norm" in name)
    total = sum(parameter.numel() for parameter in whole.values())
    assert sum(reads[0]) + sum(reads[1]) == total + norms
    assert max(sum(reads[0]), sum(reads[1])) < 0.52 * total
    head = torch.cat([part["lm_head.weight"] for part in parts])
    assert head.shape[0] == 324
    assert torch.equal(head[:323], whole["lm_head.weight"])
    assert not head[323].any()
    down = torch.cat([part["model.layers.0.mlp.down_proj.weight"] for part in parts], dim=1)
    assert torch.equal(down, whole["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize(("vocab_size", "size"), [(5, 4), (3, 8), (320, 7), (1, 1)])
def test_shards_cover_the_whole(vocab_size: int, size: int) -> None:
    shards = [Ranks(rank, size).shard(vocab_size) for rank in range(size)]
    assert len({shard.size for shard in shards}) == 1
    assert shards[0].size * size - vocab_size < size
    covered = [index for shard in shards for begin, end in shard.spans for index in range(begin, end)]
    assert covered == list(range(vocab_size))


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size", "expected"),
    [
        (8, 4, 2, [[0, 1], [2, 3]]),
        (8, 2, 4, [[0], [0], [1], [1]]),  # fewer than ranks: copies
        (9, 3, 3, [[0], [1], [2]]),
        (6, 3, 2, [[0, 0, 1], [1, 2, 2]]),  # unevenly spread: one for each query head
        (6, 2, 1, [[0, 1]]),
    ],
)
def test_query_heads_keep_their_kv_head(num_heads: int, num_kv_heads: int, size: int, expected: list[list[int]]) -> None:
    found = [Ranks(rank, size).kv_heads(num_heads, num_kv_heads) for rank in range(size)]
    assert found == expected
    # As the attention backends see it: query heads in equal groups, a K and V head each.
    mine = num_heads // size
    of_query = [heads[index * len(heads) // mine] for heads in found for index in range(mine)]
    assert of_query == [head * num_kv_heads // num_heads for head in range(num_heads)]


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(1, 2).place(torch.device("cuda")) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 3, but this machine has 2 GPUs.*Ray"):
        Ranks(0, 3).place(torch.device("cuda"))
    with pytest.raises(ValueError, match="has 1 GPUs from cuda:1 on"):
        Ranks(0, 2).place(torch.device("cuda", 1))
