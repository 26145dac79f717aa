"""The machine that a number was measured on, and the memory that was taken."""

import os
import platform
import resource
import sys
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import torch


def peak_memory_bytes() -> int:
    """Of the GPU when there is one, else of this process and all that it started, directly or not, and that still run.

    Each counts with its own peak, with pages that it shares. Where there is no /proc, this process alone.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peaks: dict[int, int] = {}  # bytes
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it has ended
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            pid = int(fields["Pid"])
            parents[pid] = int(fields["PPid"])
            peaks[pid] = 1024 * int(fields.get("VmHWM", "0 kB").split()[0])  # an ended one has no memory
    ours = {os.getpid()}
    if not ours & peaks.keys():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(peaks[pid] for pid in ours)


def describe_machine() -> dict[str, str | int]:
    """What a number is worth nothing without."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    machine: dict[str, str | int] = {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    return machine | installed_versions(
        "nano-vllm", "torch", "transformers", "triton", "flash-attn", "vllm", "openvino-genai"
    )


def installed_versions(*names: str) -> dict[str, str]:
    """Of those packages that are here."""
    found = {dist.name: dist.version for dist in distributions()}
    return {name: found[name] for name in names if name in found}
