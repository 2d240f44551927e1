"""Every option of a run, typed, with the checks that need no data and no device.

The groups mirror `configs/`: model, stage, parallel, data, optim, guard, log, evals, checkpoint, cluster, and
`run`. Checks raise :class:`~mmtrain.errors.ConfigError` before anything is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmtrain.config.cluster import ClusterConfig
from mmtrain.config.evals import EvalsConfig, NeedlesConfig
from mmtrain.config.guard import GuardConfig
from mmtrain.config.model import ModelConfig
from mmtrain.config.option_marks import FREE_ON_RESUME
from mmtrain.config.parallel import ParallelConfig
from mmtrain.config.run import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
)
from mmtrain.config.schema import build
from mmtrain.config.stage import (
    BatchStep,
    BucketConfig,
    LrSegment,
    PhaseConfig,
    PreferenceConfig,
    SourceConfig,
    StageConfig,
)
from mmtrain.config.vision import ContrastiveConfig, VisionConfig

__all__ = [
    "BatchStep",
    "BucketConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ContrastiveConfig",
    "DataConfig",
    "EvalsConfig",
    "GuardConfig",
    "LogConfig",
    "LrSegment",
    "ModelConfig",
    "NeedlesConfig",
    "OptimConfig",
    "ParallelConfig",
    "PhaseConfig",
    "PreferenceConfig",
    "PretrainConfig",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "VisionConfig",
    "load_config",
]


@dataclass
class PretrainConfig:
    """Everything that `launch/pretrain.py` reads."""

    model: ModelConfig
    stage: StageConfig
    data: DataConfig
    run: RunConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig, metadata=FREE_ON_RESUME)
    log: LogConfig = field(default_factory=LogConfig, metadata=FREE_ON_RESUME)
    evals: EvalsConfig = field(default_factory=EvalsConfig, metadata=FREE_ON_RESUME)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=FREE_ON_RESUME)
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata=FREE_ON_RESUME)

    def validate(self) -> None:
        """Run every group's checks.

        Raises:
            ConfigError: the first option that cannot work.
        """
        for group in (self.model, self.stage, self.data, self.run, self.parallel, self.optim, self.guard,
                      self.log, self.evals, self.checkpoint, self.cluster):  # fmt: skip
            group.validate()


def load_config(values: Mapping[str, Any]) -> PretrainConfig:
    """Build and check a whole configuration from a nested dict.

    Raises:
        ConfigError: the first option that is unknown, of the wrong type, or cannot work.
    """
    config = build(PretrainConfig, values)
    config.validate()
    return config
