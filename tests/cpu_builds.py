"""Builds of the CPU kernels that tests run on; with `load_library`, each is made once a machine.

native: for the machine's instruction set. baseline: for none in particular. bf16_dot: as native, but products and attention
in bfloat16 are those of AVX-512, its few instructions emulated in plain C++.
"""

import zlib
from pathlib import Path

from nanovllm.utils.cpu_build import machine_flags

EMULATION = Path(__file__).with_name("emulated_avx512.h")
FLAGS = {"native": machine_flags(), "baseline": [flag for flag in machine_flags() if flag == "-fopenmp"]}
EMULATED = {"bf16_dot": [*machine_flags(), "-include", str(EMULATION), f"-DEMULATION={zlib.crc32(EMULATION.read_bytes())}"]}
