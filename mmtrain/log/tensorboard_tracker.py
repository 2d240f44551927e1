"""TensorBoard's files as a copy of the metrics, by torch's own writer."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.config import LogConfig
from mmtrain.errors import ConfigError
from mmtrain.log.series import series

FOLDER = "tensorboard"


def check_tensorboard(log: LogConfig) -> None:
    """Refuse, before anything is started, TensorBoard's files without its package (ConfigError)."""
    if log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("log.tensorboard", "true", "the package tensorboard is not installed",
                          "pip install tensorboard, or log.tensorboard=false")  # fmt: skip


class TensorBoardTracker:
    """Writer of records to `RUN/tensorboard`; every number becomes a scalar of its name.

    Args:
        log: whether it is on.
        run_dir: the run's folder.
        first_step: step that the launch begins after; what an earlier launch wrote past it is hidden.
    """

    def __init__(self, log: LogConfig, run_dir: Path, first_step: int) -> None:
        self._writer = None
        if log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(Path(run_dir) / FOLDER), purge_step=first_step + 1)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Write one record."""
        if self._writer is not None:
            for name, value in series(record):
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write what is left and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
