"""Owner of a run folder's lock: the process that took it, told apart from all others, and whether it lives."""

from __future__ import annotations

import os
import secrets
import signal
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

PROC = Path("/proc")
_EXITING = 0x4  # of a process's flags: PF_EXITING of Linux's sched.h


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        launch: text that no other launch has.
        host: name of its host.
        machine: what process ids count in: the boot of a kernel and its namespace of processes; containers of one host
            have the host's name in common, but not this. Empty where it is not known.
        pid: its process id.
        started: when the process started, in the kernel's own count: a process id is given again. Empty if unknown.
        since: when it took the lock, for people.
    """

    launch: str
    host: str
    machine: str
    pid: int
    started: str
    since: str

    @classmethod
    def this_process(cls) -> Owner:
        """Describe the process that calls, as a new launch."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        pid = os.getpid()
        return cls(secrets.token_hex(8), socket.gethostname(), _machine(), pid, _process(pid)[1], now)

    def is_gone(self) -> bool | None:
        """Tell whether the process has ended; None where this cannot be seen from here, as on another host."""
        if not self.machine or self.machine != _machine():
            return None
        state, started = _process(self.pid)
        return state in ("", "Z", "X") or started != self.started

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, since {self.since}"


def _machine() -> str:
    """Name what process ids count in, the boot and the namespace of processes; empty where the kernel is mute."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, str]:
    """Return state and start time of a process, from /proc/PID/stat; two empty texts where there is none.

    One that was killed and has not gone yet, as its memory or a file that it was writing takes time, is dead ("X").
    """
    try:
        fields = (PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
        pending = (PROC / f"{pid}/status").read_text()
    except OSError:
        return "", ""
    masks = (line.split()[1] for line in pending.splitlines() if line.startswith(("SigPnd:", "ShdPnd:")))
    killed = any(int(mask, 16) >> (signal.SIGKILL - 1) & 1 for mask in masks)
    return "X" if killed or int(fields[6]) & _EXITING else fields[0], fields[19]
