"""DeepSpeed's kernel of Adam for the host, which is compiled when it is first used on a machine, for a minute or so.

torch lets one process compile and the others wait for a file that it removes. A process that is killed meanwhile leaves
the file behind, and every later one would wait for ever.
"""

from __future__ import annotations

import fcntl
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def load_host_adam() -> type[torch.optim.Optimizer]:
    """DeepSpeedCPUAdam with its kernel, compiled if it has to be; other processes of the host wait for that."""
    # The kernel is built by `ninja`, which pip puts beside the interpreter.
    beside = sysconfig.get_path("scripts")
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), beside])
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    builder = CPUAdamBuilder()
    with build_turn(Path(_get_build_directory(builder.name, verbose=False))):
        builder.load(verbose=False)
    return DeepSpeedCPUAdam


@contextmanager
def build_turn(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder, and remove the lock of one that was killed as it did.

    Args:
        folder: in which torch's `cpp_extension` builds; locks that others than mmtrain leave there stay.
    """
    with (folder / "mmtrain-turn").open("a+") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # the system takes it from a process that dies
        turn.seek(0)
        if turn.read():
            (folder / "lock").unlink(missing_ok=True)
        turn.truncate(0)
        print("building", file=turn, flush=True)
        try:
            yield
        finally:
            turn.truncate(0)
