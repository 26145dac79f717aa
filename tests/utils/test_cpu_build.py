"""The build of the CPU kernels: found again, safe for several processes, and what happens without a compiler."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from nanovllm.attention.backend import AttentionBackend, AttentionSpec, choose_backend
from nanovllm.attention.cpu import CPUBackend
from nanovllm.attention.torch_reference import TorchReferenceBackend
from nanovllm.utils import cpu_build
from nanovllm.utils.cpu_build import BuildError, cache_folder, load_kernels, load_library, machine_flags


def make_spec(head_dim: int = 16, block_size: int = 16, num_heads: int = 4, device: str = "cpu") -> AttentionSpec:
    return AttentionSpec(num_heads, 2, head_dim, block_size, torch.float32, torch.device(device))


def spec_for(backend: type[AttentionBackend]) -> AttentionSpec:
    return make_spec()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a compiler, on which nothing was built before."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("nanovllm.attention.cpu.load_kernels", load_kernels.__wrapped__)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_auto_takes_the_plain_backend_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert isinstance(choose_backend("auto", spec_for), TorchReferenceBackend)
    (record,) = caplog.records
    assert "no C++ compiler" in record.getMessage()
    assert "no-such-compiler" in record.getMessage()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_backend_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"attention_backend='cpu' cannot be used here: no C\+\+ compiler.*set CXX"):
        choose_backend("cpu", spec_for)


@pytest.mark.usefixtures("no_compiler")
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: out of registers' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match="error: out of registers"):
        load_library([])
    assert list(cache_folder().iterdir()) == [], "nothing half-built is left"


def test_auto_takes_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert isinstance(choose_backend("auto", spec_for), CPUBackend)
    assert not caplog.records


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (make_spec(head_dim=24), "head_dim must be a multiple of 16 up to 256, not 24"),
        (make_spec(head_dim=272), "head_dim must be a multiple of 16 up to 256, not 272"),
        (make_spec(block_size=24), "block size must be a multiple of 16, not 24"),
        (make_spec(num_heads=5), "5 heads cannot share 2 KV heads"),
        (make_spec(device="cuda"), "for device cpu, not cuda"),
    ],
)
def test_refuses_what_it_cannot_serve(spec: AttentionSpec, reason: str) -> None:
    assert reason in (CPUBackend.why_not(spec) or "")
    assert CPUBackend.why_not(make_spec()) is None


BUILD_AND_ATTEND = """
import torch
from nanovllm.utils.cpu_build import load_kernels, machine_flags
cache = torch.full((1, 1, 2, 1, 256), torch.nan)
q = k = torch.ones(1, 1, 16)
v = torch.arange(16.0).view(1, 1, 16)
load_kernels().store(k, v, cache, torch.tensor([0]))
out = torch.empty_like(q)
lengths = torch.tensor([0, 1]).int(), torch.tensor([1]).int(), torch.tensor([[0]]).int()
load_kernels().attend(q, cache, out, *lengths, 1.0)
assert torch.equal(out, v), out
print(machine_flags())
"""


def start_python(code: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


def test_several_processes_may_build_at_once(tmp_path: Path) -> None:
    load_kernels()  # so that there is something for the stand-in of a compiler to copy
    (built,) = [p for p in cache_folder().glob("*.so") if p.stem == load_kernels().name]
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nsleep 1\ncp {built} "$2"\n')
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    processes = [start_python(BUILD_AND_ATTEND, CXX=str(compiler), XDG_CACHE_HOME=str(cache)) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert [path.name for path in (cache / "nanovllm").iterdir()] == [built.name]
    again = start_python(BUILD_AND_ATTEND, CXX="no-such-compiler", XDG_CACHE_HOME=str(cache))  # needs none any more
    assert again.wait(timeout=300) == 0


def test_a_compiler_that_links_its_own_cpp_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Two C++ libraries in a process crashed, or lost the number, when one formatted the message of an error.
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -static-libstdc++\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = """
        #include <torch/library.h>
        int64_t positive(int64_t x) { TORCH_CHECK(x > 0, "got ", x, ", which is ", -x, " too few"); return x; }
        TORCH_LIBRARY(NANOVLLM_OPS, m) { m.def("positive", positive); }
    """
    monkeypatch.setattr(cpu_build, "unit", lambda: source)
    with pytest.raises(RuntimeError, match="got -7, which is 7 too few"):
        load_library(["-O0"]).positive(-7)


def test_a_lower_capability_of_torch_is_obeyed() -> None:
    process = start_python(BUILD_AND_ATTEND, ATEN_CPU_CAPABILITY="default")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "-mavx" not in output


@pytest.mark.parametrize("features", [{"avx512_bf16"}, {"avx512_bf16", "amx_bf16"}], ids=["dot", "amx"])
def test_avx512_and_amx_compile_with_the_real_intrinsics(monkeypatch: pytest.MonkeyPatch, features: set[str]) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        return  # no such compiler flags
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu_build, "cpu_flags", lambda: features)
    assert "-mavx512bf16" in machine_flags()
    assert ("-mamx-bf16" in machine_flags()) == ("amx_bf16" in features)
    includes = [f"-I{path}" for path in include_paths()]
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++20",
        "-fsyntax-only",
        "-w",
        *machine_flags(),
        "-DNANOVLLM_OPS=ops",
        *includes,
        "-x",
        "c++",
        "-",
    ]
    subprocess.run(command, input=cpu_build.unit(), text=True, check=True)
