"""The Triton kernels, compiled to machine code for GPUs that need not be here: nothing spills, shared memory suffices."""

import multiprocessing
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from nanovllm.attention.triton import PART, decode_tiles, next_power_of_two, prefill_tiles

# Shared memory that one program can have, in bytes, by NVIDIA's and AMD's manuals.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
BLOCK_SIZE, NUM_KV_HEADS, HIDDEN_SIZE = 16, 8, 8192
# What the pointers of the kernels point to; to integers else.
IN_FLOAT32 = ("partial_ptr", "lse_ptr", "cos_sin_ptr")
IN_MODELS_DTYPE = (
    *("q_ptr", "k_ptr", "v_ptr", "cache_ptr", "out_ptr", "q_out_ptr", "k_out_ptr"),
    *("x_ptr", "residual_ptr", "total_ptr", "weight_ptr", "q_weight_ptr", "k_weight_ptr"),
)


class Case(NamedTuple):
    """One kernel for one model's heads."""

    kernel: str
    group: int = 2
    head_dim: int = 128
    dtype: str = "bf16"


EVERYWHERE = [
    *(Case(kernel) for kernel in ("store_kvcache_kernel", "decode_kernel", "merge_kernel")),
    *(Case(kernel) for kernel in ("rms_norm_kernel", "rotate_kernel", "silu_and_mul_kernel")),
]
LARGE = Case("prefill_kernel", 4, 256)  # what needs most registers and shared memory
CASES = [
    *((target, case) for target in SHARED_MEMORY for case in EVERYWHERE),
    *((target, Case("prefill_kernel")) for target in ("sm_80", "sm_90", "sm_100")),
    *((target, LARGE) for target in ("sm_89", "gfx942")),  # which have least shared memory
    ("sm_80", Case("prefill_kernel", 3, 96, "fp32")),
    ("sm_80", Case("decode_kernel", 7, 80, "fp16")),
    ("sm_80", Case("rotate_kernel", 8, 128)),  # 64 heads, as models of 70 billion parameters have
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
    if case.kernel == "rms_norm_kernel":
        return {"ADD": True, "SIZE": HIDDEN_SIZE, "BLOCK": next_power_of_two(HIDDEN_SIZE)}
    if case.kernel == "silu_and_mul_kernel":
        return {"SIZE": 3 * HIDDEN_SIZE, "BLOCK": 1024}
    if case.kernel == "rotate_kernel":
        num_heads = case.group * NUM_KV_HEADS
        heads = {"NUM_HEADS": num_heads, "NUM_KV_HEADS": NUM_KV_HEADS, "HALF": case.head_dim // 2}
        blocks = {"BLOCK_HEADS": next_power_of_two(num_heads), "BLOCK_KV_HEADS": NUM_KV_HEADS, "BLOCK_HALF": block_d // 2}
        return {"NORM": True, **heads, **blocks}
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
    from nanovllm.layers import triton_layers

    fn = getattr(triton_kernels if hasattr(triton_kernels, case.kernel) else triton_layers, case.kernel)
    given = constants(case)
    options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
    types = dict.fromkeys(IN_FLOAT32, "*fp32") | dict.fromkeys(IN_MODELS_DTYPE, f"*{case.dtype}")
    types |= dict.fromkeys(("slot_mapping_ptr", "positions_ptr"), "*i64") | dict.fromkeys(("scale", "eps"), "fp32")
    types |= {"plane_stride": "i64"}
    default = {True: "*i32", False: "i32"}
    signature = {
        name: "constexpr" if name in given else types.get(name, default[name.endswith("_ptr")]) for name in fn.arg_names
    }
    # What the launcher finds out by itself: pointers are aligned, strides are multiples of 16.
    strides = ("q_stride", "k_stride", "v_stride", "x_stride", "plane_stride")
    aligned = [i for i, name in enumerate(fn.arg_names) if name.endswith(("_ptr", *strides))]
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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Case], Compiled]:
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as environment, ProcessPoolExecutor(2, context) as pool:
        environment.delenv("TRITON_INTERPRET")
        environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        results = pool.map(compile_case, *zip(*CASES, strict=True))
        return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize(("target", "case"), CASES, ids=str)
def test_compiles_without_spills_into_shared_memory(
    compiled: dict[tuple[str, Case], Compiled], target: str, case: Case
) -> None:
    result = compiled[target, case]
    assert result.local_memory == 0
    assert result.shared_memory <= SHARED_MEMORY[target]
