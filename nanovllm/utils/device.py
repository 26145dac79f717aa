"""The choice of device and dtype."""

import logging
import re
from pathlib import Path

import torch

from nanovllm.config import DTYPES

logger = logging.getLogger(__name__)

# What /proc/cpuinfo calls the instructions that make a 16-bit dtype worth its while, on x86 and on Arm.
PRODUCT_FLAGS = {torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"}, torch.float16: {"avx512_fp16", "asimdhp"}}


def choose_device(name: str) -> torch.device:
    """The torch device for the config's `device`.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch finds no GPU; use device='cpu' or 'auto'")
    return device


def choose_dtype(requested: str | torch.dtype, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of weights and KV cache: the requested, for "auto" the checkpoint's.

    A CPU without instructions for the checkpoint's 16-bit dtype takes float32 for "auto".
    """
    if isinstance(requested, torch.dtype):
        return requested
    if requested != "auto":
        return DTYPES[requested]
    if device.type == "cpu" and checkpoint in PRODUCT_FLAGS and not PRODUCT_FLAGS[checkpoint] & cpu_flags():
        logger.warning("this CPU has no instructions for %s: dtype='auto' becomes float32", checkpoint)
        return torch.float32
    return checkpoint


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The CPU's feature flags as Linux names them; empty elsewhere."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
