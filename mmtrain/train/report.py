"""Everything a run says: metrics.jsonl, wandb, the console line, and at the end the plot and the summary."""

from __future__ import annotations

import time
from dataclasses import asdict
from types import TracebackType
from typing import Any

from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config import PhaseConfig, PretrainConfig
from mmtrain.log.console import RunConsole, summary_lines
from mmtrain.log.metrics import FILE_NAME, MetricsWriter, read_metrics
from mmtrain.log.wandb_tracker import Tracker
from mmtrain.train.curriculum import RunPlan, RunStep
from mmtrain.train.evaluate import Validation
from mmtrain.train.statistics import StepResult

LOAD_RECORDS = 100  # router loads are tables: about this many of them are kept over a run


class Report:
    """The main process's reporter; on other ranks every call does nothing."""

    def __init__(
        self, config: PretrainConfig, folder: RunFolder, plan: RunPlan, start: Progress, peak: float, enabled: bool
    ) -> None:
        self.config, self.folder, self.peak, self.enabled = config, folder, peak, enabled
        self.began = time.monotonic()
        if not enabled:
            return
        steps = min(plan.num_steps, config.run.max_steps or plan.num_steps)
        self.load_every = max(1, steps // LOAD_RECORDS)
        self.last_step = steps
        tokens = plan.step(steps - 1).tokens_after
        self.console = RunConsole(steps, tokens)
        self.writer = MetricsWriter(folder.path / FILE_NAME, start.step, warn=self.console.note)
        self.tracker = Tracker(config.log, folder.path, config.run.name, asdict(config), warn=self.console.note)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.console.close()
            self.tracker.finish()
            self.writer.close()

    def step(self, run_step: RunStep, phase: PhaseConfig, result: StepResult, seconds: float) -> None:
        """Record one optimizer step that took `seconds`."""
        if not self.enabled:
            return
        record: dict[str, Any] = {
            "step": run_step.step + 1, "tokens": run_step.tokens_after, "loss": result.loss,
            "aux_loss": result.aux_loss, "lr": run_step.plan.lr, "grad_norm": result.grad_norm,
            "seq_len": int(phase.seq_len), "rope_base": phase.rope_base, "phase": phase.name,
            "tokens_per_s": run_step.plan.num_rows * phase.seq_len / seconds,
            "mfu": result.flops / seconds / self.peak, "step_s": seconds,
            "drop_rate": _mean(result.drop_rate), "rows": run_step.plan.num_rows,
        }  # fmt: skip
        pooled = self.config.parallel.global_router  # without it, the next two figures say nothing new
        if pooled:
            record["drop_rate_alone"] = _mean(result.drop_rate_alone)
        if result.exchange_s:
            record["exchange_s"] = result.exchange_s
            record["exchange_hidden"] = 1.0 - result.exchange_waited_s / result.exchange_s
        if result.router_load and (record["step"] % self.load_every == 0 or record["step"] == self.last_step):
            record["router_load"] = [[round(load, 4) for load in layer] for layer in result.router_load]
            record["router_entropy"], record["drop_rate_per_layer"] = result.router_entropy, result.drop_rate
            if pooled:
                record["drop_rate_alone_per_layer"] = result.drop_rate_alone
        self.folder.check_lock()
        self.writer.write(record)
        self.tracker.log(record, record["step"])
        self.console.update(record)

    def validation(self, progress: Progress, found: Validation) -> None:
        """Record held-out figures after a step."""
        if not self.enabled:
            return
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "val_loss": found.loss,
            "val_bits_per_byte": found.bits_per_byte,
        }
        self.writer.write(record)
        self.tracker.log(record, progress.step)
        self.console.note(
            f"step {progress.step}: held-out loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte"
        )

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self.enabled:
            self.console.note(text)

    def close(self) -> list[str]:
        """Draw the plot and return the three lines that end a run; nothing on other ranks."""
        if not self.enabled:
            return []
        if self.config.log.plot:
            from mmtrain.log.plot import plot_run  # matplotlib is slow to import

            plot_run(self.folder.path)
        return summary_lines(read_metrics(self.folder.path), self.folder.path, time.monotonic() - self.began)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
