"""`launches.jsonl`: a line for each launch of a run as it begins, and one as it ends; what a launch ran on.

A launch without an end was killed, or is still at work. The file is only ever appended to: a launch stays on record
whatever the run goes back to.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmtrain import __version__
from mmtrain.config import PretrainConfig
from mmtrain.config.installation import head_of
from mmtrain.errors import RunStopped, brief
from mmtrain.log.metrics import MetricsWriter
from mmtrain.model.flops import count_parameters
from mmtrain.parallel.mesh import ParallelContext

FILE_NAME = "launches.jsonl"
BEGAN, ENDED = "began", "ended"


class Launches:
    """Writer of one launch's two lines, on the main process.

    Args:
        folder: of the run.
        warn: is told, once, that a line waits for room on the disk.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._writer = MetricsWriter(folder / FILE_NAME, warn=warn)

    def begin(self, step: int, last_step: int, about: dict[str, Any]) -> None:
        """Write that a launch goes on after `step`, towards `last_step`, with what it runs on."""
        self._writer.write({"event": BEGAN, "step": step, "last_step": last_step, **about})

    def end(self, step: int, error: BaseException | None) -> None:
        """Write at which step a launch ended, and why where it was before its plan was done."""
        why = None if error is None else str(error) if isinstance(error, RunStopped) else brief(error)
        self._writer.write({"event": ENDED, "step": step, "why": why})
        self._writer.close()


def environment(config: PretrainConfig, context: ParallelContext, dtype: torch.dtype, origin: str) -> dict[str, Any]:
    """Return what a launch runs on and what it trains, as plain data.

    Args:
        config: every option.
        context: processes and device.
        dtype: of the products.
        origin: what the weights come from.
    """
    counted, device = count_parameters(config.model), context.device
    package = Path(__file__).resolve().parents[1]
    found: dict[str, Any] = {
        "origin": origin,
        "mmtrain": __version__,
        "commit": head_of(package),  # None where the package is installed
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "processes": context.layout.world,
        "layout": str(context.layout),
        "precision": str(dtype).removeprefix("torch."),
        "parameters": counted.total,
        "activated": counted.activated_without_embeddings,
    }
    if device.type != "cuda":
        return {**found, "device": f"CPU, {platform.machine()}", "cores": os.cpu_count()}
    here = torch.cuda.get_device_properties(device)
    return {**found, "device": here.name, "device_gib": round(here.total_memory / 2**30, 1), "cuda": torch.version.cuda}
