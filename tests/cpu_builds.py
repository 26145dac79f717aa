"""Builds of the CPU kernels that tests run on; with `load_library`, each is made once a machine.

native: for the machine's instruction set. baseline: for none in particular. bf16_dot and amx: as native, but products and
attention in bfloat16 are those of AVX-512 and of AMX, their few instructions emulated in plain C++.
"""

import zlib
from pathlib import Path

from nanovllm.utils.cpu_build import machine_flags

TESTS = Path(__file__).parent


def emulate(*names: str) -> list[str]:
    """The machine's flags without its own instructions for bfloat16, with the emulation of some."""
    flags = [flag for flag in machine_flags() if flag != "-mavx512bf16" and not flag.startswith("-mamx")]
    for name in names:
        path = TESTS / f"emulated_{name}.h"
        flags += ["-include", str(path), f"-D{name.upper()}_EMULATION={zlib.crc32(path.read_bytes())}"]
    return flags


FLAGS = {"native": machine_flags(), "baseline": [flag for flag in machine_flags() if flag == "-fopenmp"]}
EMULATED = {"bf16_dot": emulate("avx512"), "amx": emulate("avx512", "amx")}
