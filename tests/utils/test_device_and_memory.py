"""The choice of device and dtype, the memory that is really available, and how many KV blocks that makes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.attention.backend import AttentionSpec
from nanovllm.config import EngineConfig
from nanovllm.engine import kv_cache
from nanovllm.engine.kv_cache import GIB, SHARE_OF_HOST_MEMORY, decide_num_blocks
from nanovllm.utils import device as device_module
from nanovllm.utils import memory
from nanovllm.utils.device import choose_device, choose_dtype, cpu_flags
from nanovllm.utils.memory import available_host_memory

CPU = torch.device("cpu")
CUDA = torch.device("cuda")

# ---- the device ----


@pytest.fixture(params=[False, True], ids=["without-gpu", "with-gpu"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    there: bool = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    return there


def test_auto_takes_a_gpu_when_there_is_one(gpu: bool) -> None:
    assert choose_device("auto").type == ("cuda" if gpu else "cpu")


def test_cpu_can_always_be_asked_for(gpu: bool) -> None:
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(name: str, gpu: bool) -> None:
    if gpu:
        assert choose_device(name) == torch.device(name)
    else:
        with pytest.raises(ValueError, match=f"device='{name}', but torch finds no GPU; use device='cpu' or 'auto'"):
            choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "mps", "CPU", "", "cuda0", "cpu:x", "cuda:", "cuda:x"])
def test_names_that_are_no_device_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device must be 'auto', 'cpu' or 'cuda', got '{name}'"):
        choose_device(name)


# ---- the dtype ----


@pytest.mark.parametrize("checkpoint", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_requested_dtype_is_taken(name: str, checkpoint: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "cpu_flags", lambda: set())
    for device in (CPU, CUDA):
        assert choose_dtype(name, checkpoint, device) == getattr(torch, name)
        assert choose_dtype(getattr(torch, name), checkpoint, device) == getattr(torch, name)


@pytest.mark.parametrize(
    ("checkpoint", "flags", "expected"),
    [
        (torch.float32, set(), torch.float32),
        (torch.float32, {"avx512_bf16", "avx512_fp16"}, torch.float32),
        (torch.bfloat16, set(), torch.float32),
        (torch.bfloat16, {"avx2", "avx512f", "avx512_fp16", "asimdhp"}, torch.float32),  # the other kind of 16 bits
        (torch.bfloat16, {"avx2", "avx512_bf16"}, torch.bfloat16),
        (torch.bfloat16, {"amx_bf16"}, torch.bfloat16),
        (torch.bfloat16, {"bf16"}, torch.bfloat16),
        (torch.float16, set(), torch.float32),
        (torch.float16, {"f16c", "avx512_bf16", "bf16"}, torch.float32),  # f16c converts, but does not compute
        (torch.float16, {"avx512_fp16"}, torch.float16),
        (torch.float16, {"asimdhp"}, torch.float16),
    ],
)
def test_auto_takes_16_bits_on_a_cpu_that_can_compute_with_them(
    checkpoint: torch.dtype, flags: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "cpu_flags", lambda: flags)
    assert choose_dtype("auto", checkpoint, CPU) == expected
    assert choose_dtype("auto", checkpoint, CUDA) == checkpoint


def test_the_fallback_to_float32_is_said_aloud(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(device_module, "cpu_flags", lambda: set())
    choose_dtype("auto", torch.bfloat16, CPU)
    assert "no instructions for torch.bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "processor\t: 0\nmodel name\t: Fast\nflags\t\t: fpu sse avx512_bf16\n\nprocessor\t: 1\n",
            {"fpu", "sse", "avx512_bf16"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd asimdhp bf16\nCPU part\t: 0xd40\n", {"fp", "asimd", "asimdhp", "bf16"}),
        ("processor : 0\nvmx flags : ept\nbugs : none\n", set()),  # other keys hold flags of other things
        ("flags :\n", set()),
        ("", set()),
    ],
)
def test_cpu_flags(content: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(content)
    assert cpu_flags(tmp_path / "cpuinfo") == expected


def test_cpu_flags_where_there_is_no_such_file(tmp_path: Path) -> None:
    assert cpu_flags(tmp_path / "cpuinfo") == set()


# ---- memory of the host ----

FREE = 10_000  # bytes that the system has, in these tests
V1_UNLIMITED = 2**63 - 4096  # version 1 writes a number for "no limit"


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))


def write_files(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{content}\n")
    return folder


def version_2(limit: object, usage: int, inactive_file: int) -> dict[str, object]:
    stat = f"anon 1\nfile 99\ninactive_file {inactive_file}\nactive_file 7"
    return {"memory.max": limit, "memory.current": usage, "memory.stat": stat}


def version_1(limit: object, usage: int, inactive_file: int) -> dict[str, object]:
    stat = f"cache 99\nrss 1\ninactive_file {inactive_file}\ntotal_inactive_file 0"
    return {"memory/memory.limit_in_bytes": limit, "memory/memory.usage_in_bytes": usage, "memory/memory.stat": stat}


@pytest.mark.parametrize("version", [version_1, version_2])
@pytest.mark.parametrize(
    ("limit", "usage", "inactive_file", "expected"),
    [
        (8000, 3000, 0, 5000),
        (8000, 3000, 1000, 6000),  # pages of files are given back when memory is wanted
        (20_000, 3000, 0, FREE),  # the container may use more than the system has
        (3000, 3000, 0, 0),
        (3000, 3100, 0, 0),  # over the limit for a moment: never less than nothing
        (3000, 3100, 600, 500),
    ],
)
def test_a_containers_limit_counts(
    version: Any, limit: int, usage: int, inactive_file: int, expected: int, system: None, tmp_path: Path
) -> None:
    assert available_host_memory(write_files(tmp_path, version(limit, usage, inactive_file))) == expected


def test_containers_without_a_limit(system: None, tmp_path: Path) -> None:
    assert available_host_memory(write_files(tmp_path / "v2", version_2("max", 3000, 0))) == FREE
    assert available_host_memory(write_files(tmp_path / "v1", version_1(V1_UNLIMITED, 3000, 0))) == FREE


def test_no_container(system: None, tmp_path: Path) -> None:
    # The root of version 2's tree has statistics but no limit.
    assert available_host_memory(tmp_path / "missing") == FREE
    assert available_host_memory(write_files(tmp_path, {"memory.stat": "inactive_file 5"})) == FREE


@pytest.mark.parametrize("file", ["memory.max", "memory.current", "memory.stat"])
def test_a_limit_without_the_files_beside_it_is_no_limit(file: str, system: None, tmp_path: Path) -> None:
    files = version_2(8000, 3000, 0)
    del files[file]
    assert available_host_memory(write_files(tmp_path, files)) == FREE


def test_statistics_without_the_files_pages(system: None, tmp_path: Path) -> None:
    files = {**version_2(8000, 3000, 0), "memory.stat": "anon 1"}
    assert available_host_memory(write_files(tmp_path, files)) == 5000


def test_version_2_goes_before_version_1(system: None, tmp_path: Path) -> None:
    write_files(tmp_path, {**version_1(9000, 0, 0), **version_2(8000, 3000, 0)})
    assert available_host_memory(tmp_path) == 5000


def test_the_memory_of_this_machine_is_found() -> None:
    assert available_host_memory() > 0


# ---- KV blocks ----

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, block_size=16, dtype=torch.float32, device=CPU)
BLOCK_BYTES = 2 * 16 * 2 * 8 * 4  # K and V, tokens, heads, their size, float32
NUM_LAYERS = 3


@pytest.fixture
def host_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_available(num_bytes: int) -> None:
        monkeypatch.setattr(kv_cache, "available_host_memory", lambda: num_bytes)

    set_available(0)
    return set_available


def decide(max_model_len: int = 100, spec: AttentionSpec = SPEC, **config: Any) -> int:
    return decide_num_blocks(EngineConfig(**config), spec, NUM_LAYERS, max_model_len, largest_step=lambda: None)


def test_bytes_of_a_block() -> None:
    assert SPEC.bytes_per_block == BLOCK_BYTES


def test_a_configured_number_of_blocks_is_taken_whatever_the_memory(host_memory: Any) -> None:
    assert decide(num_kvcache_blocks=12345) == 12345


@pytest.mark.parametrize(("max_model_len", "blocks_each"), [(1, 1), (16, 1), (17, 2), (100, 7), (112, 7), (113, 8)])
def test_never_more_blocks_than_the_work_can_use(max_model_len: int, blocks_each: int, host_memory: Any) -> None:
    host_memory(2**60)
    assert decide(max_model_len, max_num_seqs=5) == 5 * blocks_each


@pytest.mark.parametrize(("spare", "expected"), [(-1, 9), (0, 10), (1, 10)])
def test_as_many_blocks_as_fit_in_a_share_of_the_free_memory(spare: int, expected: int, host_memory: Any) -> None:
    host_memory(int((10 * NUM_LAYERS * BLOCK_BYTES + spare) / SHARE_OF_HOST_MEMORY))
    assert decide() == expected


def test_as_many_blocks_as_fit_in_the_memory_that_was_configured(host_memory: Any) -> None:
    gib = 10.5 * NUM_LAYERS * BLOCK_BYTES / GIB
    assert decide(kvcache_memory_gb=gib) == 10
    assert decide(kvcache_memory_gb=1, max_num_seqs=1) == 7, "no more than can be used, even if more was allowed"


def test_one_block_is_enough_and_none_is_an_error(host_memory: Any) -> None:
    one = NUM_LAYERS * BLOCK_BYTES
    host_memory(int(one / SHARE_OF_HOST_MEMORY))
    assert decide() == 1
    host_memory(int(one / SHARE_OF_HOST_MEMORY) - 2)
    with pytest.raises(ValueError, match=f"{one - 1} bytes are available.* needs {one}; raise kvcache_memory_gb"):
        decide()
    with pytest.raises(ValueError, match="no memory for the KV cache: 1073 bytes"):
        decide(kvcache_memory_gb=1e-6)
