"""Slots of a sweep on this machine: what each run gets of its GPUs or cores, without touching a device."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmtrain.config.sweep import SweepConfig
from mmtrain.errors import ConfigError

MIB = 2**20
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine.

    Attributes:
        name: as CUDA_VISIBLE_DEVICES has it.
        bytes: of its memory; None where it is not known.
    """

    name: str
    bytes: float | None


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time.

    Attributes:
        gpus: that the run sees; empty on a CPU.
        threads: of each of its processes.
        device_bytes: of a GPU's memory that the run may take; None on a CPU.
    """

    gpus: tuple[str, ...]
    threads: int
    device_bytes: float | None = None

    def environment(self) -> dict[str, str]:
        """Return the environment of the run's processes."""
        found = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        return found


def local_slots(sweep: SweepConfig, overrides: Sequence[str]) -> list[Slot]:
    """Return the slots of this machine: `runs_at_once` on each group of `processes` GPUs, or on the CPU.

    Args:
        sweep: how runs are started.
        overrides: of the runs; `cluster.device=cpu` leaves GPUs alone.

    Raises:
        ConfigError: a run wants more GPUs than there are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [] if "cluster.device=cpu" in overrides else visible_gpus()
    if not gpus:
        threads = sweep.threads or max(1, cores // (sweep.runs_at_once * sweep.processes))
        return [Slot((), threads)] * sweep.runs_at_once
    groups = len(gpus) // sweep.processes
    if not groups:
        raise ConfigError("sweep.processes", sweep.processes, f"a run wants more GPUs than the {len(gpus)} here",
                          f"give sweep.processes={len(gpus)} or fewer")  # fmt: skip
    if sweep.processes > 1 and sweep.runs_at_once > 1:
        raise ConfigError("sweep.runs_at_once", sweep.runs_at_once, "runs of several GPUs have them to themselves, as "
                          "NCCL cannot wait for two runs in one order", "give sweep.runs_at_once=1")  # fmt: skip
    threads = sweep.threads or max(1, cores // (groups * sweep.runs_at_once * sweep.processes))
    slots = []
    for _ in range(sweep.runs_at_once):
        for first in range(0, groups * sweep.processes, sweep.processes):
            mine = gpus[first : first + sweep.processes]
            known = [gpu.bytes for gpu in mine if gpu.bytes is not None]
            share = min(known) / sweep.runs_at_once if known else None
            slots.append(Slot(tuple(gpu.name for gpu in mine), threads, share))
    return slots


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Return the GPUs that a process here would see, asked of nvidia-smi: torch would take memory of the first."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return []
    done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, check=False)
    if done.returncode:
        return []
    found = {}
    for line in done.stdout.splitlines():
        index, uuid, memory = (part.strip() for part in line.split(","))
        found[index] = found[uuid] = Gpu(index, float(memory) * MIB if memory.replace(".", "").isdigit() else None)
    allowed = environment.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return list(dict.fromkeys(found.values()))
    names = [name.strip() for name in allowed.split(",") if name.strip() and not name.strip().startswith("-")]
    return [Gpu(name, found[name].bytes if name in found else None) for name in names]
