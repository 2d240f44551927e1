"""Where a process stands: the stacks of its threads in a file, and the main thread's place in one line."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import sysconfig
import threading
from pathlib import Path
from types import FrameType

import torch

LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def dump(path: Path) -> None:
    """Write the stacks of all threads, and what NCCL recorded of its last collectives where there is a GPU.

    Nothing is raised: who asks for it is about to end, or hangs.

    Args:
        path: text file; NCCL's record goes to the same name with `.nccl.json`.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if torch.cuda.is_available():
            _dump_flight_recorder(path.with_suffix(".nccl.json"))


def main_place() -> str:
    """Return where the main thread stands: the innermost line that is no library's, and what it calls there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None and not _is_own(frame):
        frame = frame.f_back
    if frame is None:
        frame = innermost
    if frame is None:
        return "nowhere"
    file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    called = "" if innermost is frame or innermost is None else f", in {innermost.f_code.co_name}"
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}{called}"


def _is_own(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith((*LIBRARIES, "<"))


def _dump_flight_recorder(path: Path) -> None:
    """Write what NCCL's flight recorder holds; it keeps entries where TORCH_NCCL_TRACE_BUFFER_SIZE is above 0."""
    record = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if record is not None:
        with contextlib.suppress(RuntimeError, TypeError):
            path.write_bytes(record(includeCollectives=True, onlyActive=False))
