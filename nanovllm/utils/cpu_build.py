"""The build of the C++ kernels: once a machine, on first use, then from the user's cache folder.

The library is called through torch's operator registry, so that no Python headers are needed, only a C++ compiler. Flags
follow the instruction set that torch itself uses on this machine (`torch.backends.cpu.get_cpu_capability`). The name of
the library says what it was made of: sources, flags and torch's version. Several processes may build at once: each builds in
a folder of its own and moves the result in place in one step.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from nanovllm.utils.device import cpu_flags

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
# Compiled as one, since most of the time goes into torch's headers.
SOURCES = (
    PACKAGE / "utils" / "cpu_amx.h",
    PACKAGE / "utils" / "cpu_blocks.h",
    PACKAGE / "utils" / "cpu_dtypes.h",
    PACKAGE / "utils" / "cpu_formats.h",
    PACKAGE / "utils" / "cpu_math.h",
    PACKAGE / "utils" / "cpu_memory.h",
    PACKAGE / "attention" / "cpu_attention_products.h",
    PACKAGE / "attention" / "cpu_attention_softmax.h",
    PACKAGE / "attention" / "cpu_attention_tasks.h",
    PACKAGE / "attention" / "cpu_attention_store.h",
    PACKAGE / "attention" / "cpu_attention_worker.h",
    PACKAGE / "attention" / "cpu_paged_attention.cpp",
    PACKAGE / "layers" / "cpu_activation.h",
    PACKAGE / "layers" / "cpu_layers.cpp",
    PACKAGE / "layers" / "cpu_panels.h",
    PACKAGE / "layers" / "cpu_linear_amx.h",
    PACKAGE / "layers" / "cpu_linear_tiles.h",
    PACKAGE / "layers" / "cpu_linear.cpp",
    PACKAGE / "layers" / "cpu_sampler.cpp",
    PACKAGE / "models" / "cpu_decoder.cpp",
)
TIMEOUT = 600  # seconds for a build that usually takes 30

# torch's name for the instruction set -> what makes its vector classes use it. Elsewhere (Arm) the compiler's default does.
_INSTRUCTION_SETS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


# No -ffast-math and no contraction of products and sums: a row's result must not depend on where it is computed. Inner loops
# are short: where they begin in a line of the cache moves the time of a product by some per cent.
_OPTIONS = [
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-w"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-falign-loops=64"),
]


class BuildError(RuntimeError):
    """The kernels could not be built; the message says why."""


@functools.cache
def load_kernels() -> Any:
    """The operators of the sources, as an attribute of `torch.ops`; built if they are not in the cache folder.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    return load_library(machine_flags())


def load_library(flags: list[str]) -> Any:
    """Build the sources with `flags`, unless that was done before, and load it.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    sources = [source.read_bytes() for source in SOURCES]
    key = hashlib.sha256(repr((sources, _OPTIONS, flags, torch.__version__, platform.machine())).encode()).hexdigest()
    name = f"nanovllm_cpu_{key[:16]}"
    library = cache_folder() / f"{name}.so"
    if not library.exists():
        _build(library, [*flags, f"-DNANOVLLM_OPS={name}"])
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded: {error}") from error
    return getattr(torch.ops, name)


def cache_folder() -> Path:
    """Where built libraries are kept: nanovllm/ in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm"


def machine_flags() -> list[str]:
    """The compiler flags for the instruction set that torch uses here, and for bf16 products where the CPU has them."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags: list[str] = []
    if capability in _INSTRUCTION_SETS:
        defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
        flags = [*defines, *_INSTRUCTION_SETS[capability]]
    if capability == "AVX512" and "avx512_bf16" in cpu_flags():
        flags.append("-mavx512bf16")
        if "amx_bf16" in cpu_flags():
            flags += ["-mamx-tile", "-mamx-bf16"]
    return [*flags, *(["-fopenmp"] if sys.platform == "linux" else [])]


def _build(library: Path, flags: list[str]) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler: {compiler!r} is not on the PATH (install g++ or clang++, or set CXX)")
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    link = [f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}", *loaded_cpp_library()]
    names = " and ".join(source.name for source in SOURCES)
    logger.info("building %s for this machine; this is done once and takes some 30 seconds", names)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            target = Path(folder) / library.name
            command = [compiler, *_OPTIONS, *flags, f"-I{include}", "-x", "c++", "-", "-o", str(target), *link]
            done = subprocess.run(
                command, input=unit(), capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
            )
            if done.returncode != 0:
                raise BuildError(f"{compiler} failed on {names}: {_first_error(done.stderr)}")
            target.replace(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{names} could not be built: {error}") from error


def loaded_cpp_library(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The C++ library that torch has loaded, to be linked before the compiler's: a second one, which some link statically,
    crashes when it formats the message of an error.
    """
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    return sorted({f"-Wl,{line.split(maxsplit=5)[-1]}" for line in lines if "/libstdc++.so" in line})[:1]


def unit() -> str:
    """What the compiler is given: the sources, one after the other."""
    return "".join(f'#include "{source}"\n' for source in SOURCES)


def _first_error(output: str) -> str:
    lines = output.splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[-1])
