"""Everything a run says: metrics.jsonl, its copies in trackers, the console, and at the end plot and summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config import PhaseConfig, PretrainConfig
from mmtrain.errors import RunStopped
from mmtrain.evals.heat_map import PLOT_NAME, draw_heat_maps
from mmtrain.evals.result import NeedleResult
from mmtrain.health.stragglers import Pace, pace_record
from mmtrain.log.console import LOG_NAME, RunConsole
from mmtrain.log.ledger import Ledger, read_ledger
from mmtrain.log.metrics import FILE_NAME, MetricsWriter, read_metrics
from mmtrain.log.summary import summary_lines
from mmtrain.log.tensorboard_tracker import FOLDER, TensorBoardTracker
from mmtrain.log.wandb_tracker import Tracker
from mmtrain.train.curriculum import RunPlan, RunStep
from mmtrain.train.evaluate import HeldOut
from mmtrain.train.image_counts import image_record
from mmtrain.train.launches import Launches
from mmtrain.train.left_out import ENTRY, LeftOut, as_records
from mmtrain.train.phase_frozen import frozen_change
from mmtrain.train.phase_layouts import PhaseLayout, changes
from mmtrain.train.spike_guard import NO_LIMITS, Limits
from mmtrain.train.statistics import StepResult

LOAD_RECORDS = 100  # router loads are tables: about this many of them are kept over a run


class Report:
    """The main process's reporter; on other ranks every call does nothing."""

    def __init__(
        self, config: PretrainConfig, folder: RunFolder, plan: RunPlan, start: Progress, peak: float, enabled: bool
    ) -> None:
        self.config, self.folder, self.plan, self.peak, self.enabled = config, folder, plan, peak, enabled
        self.began, self.start, self.reached = time.monotonic(), start, start.step
        self.launches: Launches | None = None
        if not enabled:
            return
        self.last_step, _ = self._ends(start)
        self.measured = start.phase, 0.0  # phase, and its peak in GiB
        self.load_every = max(1, self.last_step // LOAD_RECORDS)
        self.console = RunConsole(log_file=folder.path / LOG_NAME, line_interval=config.log.line_interval)
        self._open(start.step)

    def _open(self, step: int) -> None:
        """Open the files and trackers that records go to; what they hold of the steps past `step` is dropped."""
        config, path = self.config, self.folder.path
        self.writer = MetricsWriter(path / FILE_NAME, step, warn=self.console.note)
        self.ledger = Ledger(path, step, self.console.note)
        self.trackers = (
            Tracker(config.log, path, config.run.name, asdict(config), warn=self.console.note),
            TensorBoardTracker(config.log, path, step),
        )

    def launch(self, about: dict[str, Any]) -> None:
        """Put on record that a launch begins, with what it runs on; leaving the context records its end."""
        if self.enabled:
            self.launches = Launches(self.folder.path, self.console.note)
            self.launches.begin(self.start.step, self.last_step, about)

    def _close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()
        self.writer.close()
        self.ledger.close()

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            if isinstance(error, RunStopped):
                self.console.record(str(error))
            if self.launches is not None:
                self.launches.end(self.reached, error)
            self.console.close()
            self._close()

    def places(self) -> list[str]:
        """Where this run's records lie, for the header."""
        if not self.enabled:
            return []
        names = [FILE_NAME, LOG_NAME, *([FOLDER] if self.config.log.tensorboard else [])]
        wandb = self.trackers[0].place
        return [f"records {self.folder.path} ({', '.join(names)})", *([f"wandb   {wandb}"] if wandb else [])]

    def step(
        self,
        step: RunStep,
        after: Progress,
        phase: PhaseConfig,
        result: StepResult,
        seconds: float,
        limits: Limits = NO_LIMITS,
    ) -> None:
        """Record one optimizer step that took `seconds` and left the run at `after`, and was held against `limits`."""
        if not self.enabled:
            return
        record: dict[str, Any] = {
            "step": after.step, "tokens": after.tokens, "loss": result.loss,
            "aux_loss": result.aux_loss, "lr": step.lr, "grad_norm": result.grad_norm,
            "seq_len": int(phase.seq_len), "rope_base": phase.rope_base, "phase": phase.name,
            "tokens_per_s": result.tokens / seconds,
            "mfu": result.flops / seconds / self.peak, "step_s": seconds,
            "drop_rate": _mean(result.drop_rate), "rows": step.num_rows, "first_row": step.first_row,
        }  # fmt: skip
        record |= result.figures
        if result.preference is not None:
            record |= result.preference.record()
        if result.skipped:
            record["skipped"] = True
        record |= image_record(result.images)
        self._add_memory(record, result, step.phase_index)
        self._add_routing(record, result, step.phase_index)
        self.folder.check_lock()
        self.writer.write(record)
        self.reached = after.step
        for tracker in self.trackers:
            tracker.log(record, after.step)
        self.console.update(record, *self._ends(after))
        if result.skipped:
            self._skipped(step, record, result, limits)

    def _skipped(self, step: RunStep, record: dict[str, Any], result: StepResult, limits: Limits) -> None:
        """Tell a step that left the weights alone, and put its rows on record."""
        why = "its loss or gradient is not finite"
        if result.spike:
            why = (f"its loss {result.loss:.4g} or gradient norm {result.grad_norm:.4g} is over {limits.loss:.4g} or "
                   f"{limits.grad_norm:.4g}")  # fmt: skip
        last = step.first_row + step.num_rows - 1
        self.note(f"step {step.number:,} skipped: {why}; the weights were left alone (rows {step.first_row} to {last} "
                  f"of phase {record['phase']})")  # fmt: skip
        kept = {key: record[key] for key in ("step", "phase", "first_row", "rows", "loss", "grad_norm")}
        kept |= {"loss_limit": limits.loss, "grad_norm_limit": limits.grad_norm, "finite": result.spike}
        self.ledger.write(kept)

    def rollback(self, at: Progress, left_out: tuple[LeftOut, ...], checkpoint: Path) -> None:
        """Put on record that the run goes back to a checkpoint, before it does.

        Args:
            at: where the run stands.
            left_out: all that it leaves out from then on, the newest last.
            checkpoint: that it goes back to.
        """
        if not self.enabled:
            return
        new = left_out[-1]
        skipped = [one for one in read_ledger(self.folder.path) if one["step"] > new.to_step]  # dropped once it is back
        record = {"step": new.to_step, "after_step": at.step, ENTRY: as_records(left_out), "skipped": skipped}
        self.ledger.write(record)
        self.note(f"going back from step {at.step:,} to {checkpoint}: its last steps were skipped; "
                  f"rows {new.first} to {new.end - 1} of phase {self.plan.phases[new.phase].phase.name} "
                  "are left out")  # fmt: skip

    def rolled_back(self, now: Progress, aside: str | None, seconds: float) -> None:
        """Go on with the records of a run that has gone back: those of later steps were set aside."""
        if not self.enabled:
            return
        self._close()
        self._open(now.step)
        self.reached = now.step
        self.note(f"went back to step {now.step:,} in {seconds:.1f} s" + (f"; {aside}" if aside else ""))

    def _add_memory(self, record: dict[str, Any], result: StepResult, phase_index: int) -> None:
        """Measured peak of the phase so far, and the predicted one."""
        if phase_index != self.measured[0]:
            self._tell_memory()
        self.measured = phase_index, result.memory / 2**30
        if result.memory:
            record["memory_gib"] = round(result.memory / 2**30, 3)
        if (predicted := self.plan.phases[phase_index].memory) is not None:
            record["memory_predicted_gib"] = round(predicted.gib, 3)

    def _tell_memory(self) -> None:
        """Put the measured peak of the phase that has ended beside the predicted one."""
        index, measured = self.measured
        phase = self.plan.phases[index]
        if measured and phase.memory is not None:
            off = phase.memory.gib / measured - 1
            self.note(f"memory  {phase.phase.name}: {measured:.2f} GiB measured, {phase.memory.gib:.2f} predicted "
                      f"({off:+.1%})")  # fmt: skip

    def new_layout(self, step: RunStep, before: PhaseLayout, now: PhaseLayout, seconds: float, held_gib: float) -> None:
        """Record that the run has gone over to another layout, before a step.

        Args:
            step: the first one under the new layout.
            before: the layout that was left.
            now: the new one.
            seconds: from the end of the step before, with the checkpoint in between.
            held_gib: device memory that torch held in between, in GiB.
        """
        if not self.enabled:
            return
        changed = [changes(before.parallel, now.parallel), frozen_change(before.frozen, now.frozen)]
        changed = ", ".join(one for one in changed if one)
        record = {"step": step.number, "tokens": step.before.tokens, "layout": str(now.layout),
                  "layout_before": str(before.layout), "layout_changed": changed, "layout_s": seconds,
                  "layout_held_gib": round(held_gib, 3)}  # fmt: skip
        self.writer.write(record)
        for tracker in self.trackers:
            tracker.log(record, step.number)
        self.note(f"layout from step {step.number:,} on: {changed}: {now.layout} ({seconds:.1f} s with its checkpoint)")

    def _ends(self, at: Progress) -> tuple[int, int]:
        """Step and tokens that the run will end at, seen from a position: an estimate where rows have padding."""
        most = self.config.run.max_steps
        steps, tokens = self.plan.left(at, sys.maxsize if most is None else max(0, most - at.step))
        return at.step + steps, at.tokens + tokens

    def _add_routing(self, record: dict[str, Any], result: StepResult, phase_index: int) -> None:
        laid = self.plan.phases[phase_index].laid
        pooled = (
            self.config.parallel if laid is None else laid.parallel
        ).global_router  # without it, the next two figures say nothing new
        if pooled:
            record["drop_rate_alone"] = _mean(result.drop_rate_alone)
        if result.cp_balance is not None:
            record["cp_balance"] = result.cp_balance
        if result.image_balance is not None:
            record["image_balance"] = result.image_balance
        if result.exchange_s:
            record["exchange_s"] = result.exchange_s
            record["exchange_hidden"] = 1.0 - result.exchange_waited_s / result.exchange_s
        if result.router_load and (record["step"] % self.load_every == 0 or record["step"] == self.last_step):
            record["router_load"] = [[round(load, 4) for load in layer] for layer in result.router_load]
            record["router_entropy"], record["drop_rate_per_layer"] = result.router_entropy, result.drop_rate
            if pooled:
                record["drop_rate_alone_per_layer"] = result.drop_rate_alone

    def validation(self, progress: Progress, found: HeldOut) -> None:
        """Record held-out figures after a step."""
        if not self.enabled:
            return
        record = {"step": progress.step, "tokens": progress.tokens, **found.record()}
        self.writer.write(record)
        for tracker in self.trackers:
            tracker.log(record, progress.step)
        self.console.note(f"step {progress.step}: {found.line()}")

    def pace(self, step: int, paces: Sequence[Pace]) -> None:
        """Record how fast the ranks are beside each other after a step; nothing where they were not compared."""
        if self.enabled and paces:
            self.writer.write({"step": step, **pace_record(paces)})

    def needles(self, progress: Progress, result: NeedleResult) -> None:
        """Record an evaluation of needles after a step, and draw its heat maps."""
        if not self.enabled:
            return
        record = {"step": progress.step, "tokens": progress.tokens, **result.record()}
        self.writer.write(record)
        for tracker in self.trackers:
            tracker.log(record, progress.step)
        self.note(f"step {progress.step:,}: {result.line()}")
        if self.config.log.plot:
            try:
                draw_heat_maps(record, self.folder.path / PLOT_NAME)
            except OSError as error:  # a full disk costs a picture, not the run
                self.note(f"{self.folder.path / PLOT_NAME} cannot be written ({error.strerror})")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self.enabled:
            self.console.note(text)

    def close(self) -> list[str]:
        """Draw the plot and return the lines that end a run; nothing on other ranks."""
        if not self.enabled:
            return []
        self._tell_memory()
        if self.config.log.plot:
            from mmtrain.log.plot import plot_run  # matplotlib is slow to import

            plot_run(self.folder.path)
        lines = summary_lines(
            read_metrics(self.folder.path), self.folder.path, time.monotonic() - self.began, self.start.step
        )
        for line in lines:
            self.console.record(line)
        return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
