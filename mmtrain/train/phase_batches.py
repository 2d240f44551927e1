"""Batches of phases against their layouts: what is refused before anything is started."""

from __future__ import annotations

from mmtrain.config import PretrainConfig
from mmtrain.config.checks import require
from mmtrain.parallel.pipeline.schedule import check_schedule
from mmtrain.train.curriculum import PhasePlan, RunPlan
from mmtrain.train.phase_layouts import of_each_phase


def check_batches(config: PretrainConfig, plan: RunPlan) -> None:
    """Refuse batches that the layouts of their phases cannot run.

    Raises:
        ConfigError: the first of them, and in its problem those of the other phases.
    """
    of_each_phase([one.phase for one in plan.phases], lambda i, _: check_phase_batches(config, plan.phases[i], i))


def check_phase_batches(config: PretrainConfig, phase: PhasePlan, index: int) -> None:
    """Refuse batches of one phase: :func:`check_batches`."""
    assert phase.laid is not None
    parallel, dp, seq_len = phase.laid.parallel, phase.laid.layout.dp, phase.phase.seq_len
    unit = phase.laid.row_unit
    name = "tp" if parallel.cp == 1 else "cp"
    alone = config.data.valid_rows > 0 or config.stage.preference is not None  # the reference's rows are run so too
    require(not alone or seq_len % unit == 0, f"parallel.{name}", getattr(parallel, name),
            f"validation runs one row at a time: {seq_len} tokens / {unit} that share it is not whole",
            f"give another parallel.{name}, or data.valid_rows=0")  # fmt: skip
    for num_rows in phase.used_rows():
        micro_batches = num_rows // (dp * parallel.micro_batch_rows)
        check_schedule(parallel, f"stage.phases[{index}].batch", num_rows * seq_len, micro_batches)
