"""Telling a mistake once: one line on stderr for all processes of a run, and the same line in torchrun's report.

torchrun ends its report with the message that the first failed process left in a file. Left there, the line stands at
the end of everything, where it would otherwise be buried; nothing else of the report can be changed from inside.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable

from mmtrain.config.process_env import Processes, read_processes, speaking_rank
from mmtrain.errors import is_user_error

OTHER_RANKS_WAIT_SECONDS = 5.0
SRUN_RANKS_WAIT_SECONDS = 60.0  # tasks of a full machine came 10 s apart


def tell(line: str, same_everywhere: bool = False, processes: Processes | None = None) -> None:
    """Print the error line once a run.

    Rank 0 tells it. torchrun ends the others as soon as one has failed: they wait for that, so that they do not bring
    rank 0 down before it has spoken. srun ends nobody: there the others ask rank 0 whether it has told the same. A rank
    that is still alive then has met the mistake alone, and tells it.

    Args:
        line: the message, without a line break.
        same_everywhere: all ranks meet this mistake, as it comes from the command line: only rank 0 tells it.
        processes: place of this process; None while it is not known.
    """
    rank = processes.rank if processes is not None else speaking_rank()
    srun = processes is not None and processes.launcher == "srun"
    if rank == 0:
        _print(f"error: {line}")
        if srun and not same_everywhere:
            _quietly(lambda: _answer(processes, line))
        return
    if srun and (same_everywhere or _quietly(lambda: _ask(processes, line))):
        return
    if not srun:
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    if not same_everywhere:
        _print(f"error on rank {rank}: {line}")


def told_once(command: Callable[[], int | None]) -> int | None:
    """Run a command that several processes may run together; a user's mistake is told once, as :func:`tell` does.

    A process that is alone raises it, as :func:`mmtrain.command_line.exit_code` expects.

    Returns:
        The exit code of such a mistake, or else what the command returned.
    """
    processes = None
    try:
        processes = read_processes()
        return command()
    except Exception as error:
        if not is_user_error(error) or (processes is not None and processes.world_size == 1):
            raise
        tell(str(error), processes=processes)
        return getattr(error, "exit_code", 2)


def _print(line: str) -> None:
    """Print a line on stderr, and leave it for torchrun's report."""
    print(line, file=sys.stderr, flush=True)
    leave_for_torchrun(line)


def leave_for_torchrun(line: str) -> None:
    """Leave a line for the end of torchrun's report of this process."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        _quietly(lambda: _leave(report, line))


def _leave(report: str, line: str) -> bool:
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    with open(report, "w") as file:
        json.dump({"message": {"message": line, "extraInfo": extra}}, file)
    return True


def _answer(processes: Processes, line: str) -> bool:
    """Give the other ranks of an srun step what rank 0 told, until each has read it or the time is over."""
    end = time.monotonic() + SRUN_RANKS_WAIT_SECONDS
    with socket.create_server(("", _meeting_place(processes)[1])) as server:
        for _ in range(processes.world_size - 1):
            server.settimeout(max(0.0, end - time.monotonic()))
            connection, _ = server.accept()
            with connection:
                connection.sendall(line.encode())
    return True


def _ask(processes: Processes, line: str) -> bool:
    """Tell whether rank 0 has told the same line: it may come later to its mistake, or have none and serve a store."""
    end = time.monotonic() + SRUN_RANKS_WAIT_SECONDS
    while (left := end - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(_meeting_place(processes), timeout=left)
            with connection, connection.makefile("rb") as told:
                return told.read().decode() == line
        except ConnectionError:
            time.sleep(0.05)  # nobody listens yet
    return False


def _meeting_place(processes: Processes) -> tuple[str, int]:
    return processes.address or ("127.0.0.1", 0)


def _quietly(call: Callable[[], bool]) -> bool:
    """Return what `call` does, or False where it fails: the message is out, or will be, without its help."""
    try:
        return call()
    except Exception:
        return False
