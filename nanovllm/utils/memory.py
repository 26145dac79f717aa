"""How much memory is really available to this process on the host."""

from pathlib import Path

import psutil

_CGROUP_FILES = (  # limit, usage, statistics: version 2, then version 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_host_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be allocated without swapping: what the system has, or what a container's limit leaves if less."""
    available: int = psutil.virtual_memory().available
    headroom = _cgroup_headroom(cgroup)
    return available if headroom is None else min(available, headroom)


def _cgroup_headroom(cgroup: Path) -> int | None:
    for limit_file, usage_file, stat_file in _CGROUP_FILES:
        try:
            limit = (cgroup / limit_file).read_text().strip()
            usage = int((cgroup / usage_file).read_text())
            stat = dict(line.split() for line in (cgroup / stat_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            reclaimable = int(stat.get("inactive_file", 0))  # file pages count as used until somebody needs them
            return max(0, int(limit) - usage + reclaimable)
    return None
