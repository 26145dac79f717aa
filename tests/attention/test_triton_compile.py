"""The Triton kernels, compiled to machine code for GPUs that need not be here: nothing spills, shared memory suffices."""

import multiprocessing
import os
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from nanovllm.attention.triton import PART, decode_tiles, next_power_of_two, prefill_tiles

# Shared memory that one program can have, in bytes, by NVIDIA's and AMD's manuals.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
BLOCK_SIZE, NUM_KV_HEADS = 16, 8


class Case(NamedTuple):
    """One kernel for one model's heads."""

    kernel: str
    group: int = 2
    head_dim: int = 128
    dtype: str = "bf16"


EVERYWHERE = [Case("store_kvcache_kernel"), Case("decode_kernel"), Case("merge_kernel")]
LARGE = Case("prefill_kernel", 4, 256)  # what needs most registers and shared memory
CASES = [
    *((target, case) for target in SHARED_MEMORY for case in EVERYWHERE),
    *((target, Case("prefill_kernel")) for target in ("sm_80", "sm_90", "sm_100")),
    *((target, LARGE) for target in ("sm_89", "gfx942")),  # which have least shared memory
    ("sm_80", Case("prefill_kernel", 3, 96, "fp32")),
    ("sm_80", Case("decode_kernel", 7, 80, "fp16")),
]


class Compiled(NamedTuple):
    """What the compiler says of a kernel."""

    shared_memory: int  # bytes
    local_memory: int  # bytes a thread: where registers spill to


def constants(case: Case) -> dict[str, int]:
    """The kernel's compile-time arguments and its options, as the backend gives them."""
    itemsize = 4 if case.dtype == "fp32" else 2
    token_stride = NUM_KV_HEADS * case.head_dim
    block_d = next_power_of_two(case.head_dim)
    if case.kernel == "store_kvcache_kernel":
        return {"TOKEN_STRIDE": token_stride, "BLOCK": next_power_of_two(token_stride)}
    if case.kernel == "merge_kernel":
        return {"PART": PART, "HEAD_DIM": case.head_dim, "BLOCK_D": block_d}
    tiles = (decode_tiles if case.kernel == "decode_kernel" else prefill_tiles)(case.group, case.head_dim, itemsize)
    return {
        **({"PART": PART} if case.kernel == "decode_kernel" else {}),
        "GROUP": case.group,
        "BLOCK_SIZE": BLOCK_SIZE,
        "TOKEN_STRIDE": token_stride,
        "HEAD_DIM": case.head_dim,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": block_d,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def compile_case(target: str, case: Case) -> Compiled:
    """Compile; runs in a process of its own, in which Triton does not interpret."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from nanovllm.attention import triton_kernels

    fn = getattr(triton_kernels, case.kernel)
    given = constants(case)
    options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
    types = dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32") | dict.fromkeys(
        ("q_ptr", "out_ptr", "cache_ptr", "k_ptr", "v_ptr"), f"*{case.dtype}"
    )
    types |= {"slot_mapping_ptr": "*i64", "scale": "fp32", "plane_stride": "i64"}
    default = {True: "*i32", False: "i32"}
    signature = {
        name: "constexpr" if name in given else types.get(name, default[name.endswith("_ptr")]) for name in fn.arg_names
    }
    # What the launcher finds out by itself: pointers are aligned, strides are multiples of 16.
    aligned = [i for i, name in enumerate(fn.arg_names) if name.endswith(("_ptr", "k_stride", "v_stride", "plane_stride"))]
    source = ASTSource(
        fn=fn, signature=signature, constexprs=given, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    is_amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if is_amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    compiled = compile(source, target=gpu, options=options)
    local = amd_local_memory(compiled.asm["amdgcn"]) if is_amd else nvidia_local_memory(compiled.asm["cubin"])
    return Compiled(compiled.metadata.shared, local)


def amd_local_memory(assembly: str) -> int:
    """From the code object's own notes."""
    (line,) = (line for line in assembly.splitlines() if ".private_segment_fixed_size:" in line)
    return int(line.split(":")[1])


def nvidia_local_memory(cubin: bytes) -> int:
    """From the tool that comes with Triton: the kernel's stack and its local memory."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = dict(field.split(":") for field in usage.split() if field.startswith(("STACK:", "LOCAL:")))
    return int(fields["STACK"]) + int(fields["LOCAL"])


def leave_interpreter(cache: str) -> None:
    """Before Triton is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Case], Compiled]:
    cache = str(tmp_path_factory.mktemp("triton"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=leave_interpreter, initargs=(cache,)) as pool:
        results = pool.map(compile_case, *zip(*CASES, strict=True))
        return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize(("target", "case"), CASES, ids=str)
def test_compiles_without_spills_into_shared_memory(
    compiled: dict[tuple[str, Case], Compiled], target: str, case: Case
) -> None:
    result = compiled[target, case]
    assert result.local_memory == 0
    assert result.shared_memory <= SHARED_MEMORY[target]
