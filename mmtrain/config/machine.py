"""What is at hand for a run, found without torch: GPUs, cores, prepared corpora in a folder, the program itself."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

NVIDIA_SMI_SECONDS = 10.0


def gpu_count() -> int:
    """Return the number of GPUs that processes would see, by CUDA_VISIBLE_DEVICES, else by nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return len(names[: names.index("-1")] if "-1" in names else [name for name in names if name])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def processes_at_hand(gpus: int) -> int:
    """Return how many processes to start here: one a GPU, else two on a CPU of more than one core."""
    return gpus or min(2, os.cpu_count() or 1)


def prepared_corpora(folder: Path) -> list[Path]:
    """Return the corpora below `folder` that launch/prepare.py made, newest first."""
    found = [path for pattern in ("corpora/*/manifest.json", "*/manifest.json") for path in folder.glob(pattern)]
    newest = sorted(set(found), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.relative_to(folder) for path in newest]


def under_torchrun(program: str) -> str:
    """Return what torchrun is given to start the same program: a script, or the package and its command.

    Args:
        program: as sys.argv[0] has it.
    """
    return f"-m {program}" if program.startswith("mmtrain ") else shlex.quote(program)
