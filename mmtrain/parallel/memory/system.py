"""What the system says of a host's memory."""

from __future__ import annotations

from pathlib import Path

LIMIT = Path("/sys/fs/cgroup/memory.max")
"""What a container may use, in bytes, or ``max``."""


def meminfo_bytes(field: str) -> int | None:
    """Return a field of Linux's /proc/meminfo, such as ``MemAvailable``, in bytes; None where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def host_bytes() -> int | None:
    """Return the bytes that all processes of this host may use together; None where the system does not say."""
    try:
        limit = LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        limit = ""
    found = [meminfo_bytes("MemTotal"), int(limit) if limit.isdigit() else None]
    return min((one for one in found if one is not None), default=None)
