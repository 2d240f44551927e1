"""What a run does between its steps: validation, evaluations, checkpoints, and the ends that these find."""

from __future__ import annotations

from typing import Any

from mmdata.images.stream_batches import read_batches
from mmtrain.checkpoint.listing import PHASE_END, VALID_LOSS
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config import PhaseConfig, PretrainConfig
from mmtrain.errors import RunStopped
from mmtrain.evals.needles import NeedleEvaluation
from mmtrain.train import endings
from mmtrain.train.curriculum import RunPlan, RunStep
from mmtrain.train.early_stop import EarlyStop
from mmtrain.train.evaluate import HeldOut, evaluate, evaluate_pairs
from mmtrain.train.inputs import RunInputs
from mmtrain.train.left_out import ENTRY, as_records
from mmtrain.train.pairs import References
from mmtrain.train.report import Report
from mmtrain.train.saving import Saver
from mmtrain.train.session import Session
from mmtrain.train.spike_guard import SpikeGuard
from mmtrain.train.statistics import StepResult

GUARD = "guard"
"""Entry of a checkpoint's record: what the guard against spikes knows."""
REFERENCE, EARLY_STOP = "reference", "early_stop"
"""Entries of a checkpoint's record, of preference training: fingerprint of the reference, and validations so far."""


class BetweenSteps:
    """A run between two of its steps; :class:`~mmtrain.train.trainer.Trainer` runs the steps themselves.

    Attributes:
        config: every option of the run.
        plan: its phases.
        inputs: what it reads.
        folder: what it writes to.
        session: model, optimizer and processes in the layout at work.
        needles: evaluation of long text; None: there is none.
        guard: against spikes.
        early_stop: what validations have come to; only preference training ends by it.
        references: of preference training; None trains on next tokens.
        progress: where the run stands.
        reference: fingerprint of the checkpoint that `references` are of.
        lines: what this rank met of bad images and has not told yet.
        skipped_in_row: steps, up to now, that were not finite.
        validated: step and held-out loss of the last validation whose loss was finite.
    """

    config: PretrainConfig
    plan: RunPlan
    inputs: RunInputs
    folder: RunFolder
    session: Session
    needles: NeedleEvaluation | None
    guard: SpikeGuard
    early_stop: EarlyStop
    references: References | None
    reference: str | None
    progress: Progress
    lines: list[str]
    skipped_in_row: int
    validated: tuple[int, float] | None

    def _next(self) -> RunStep | None:
        """The step to run now; None at the end of the plan or of `run.max_steps`, or for want of a lower loss."""
        if self.early_stop.reached:
            return None
        limit = self.config.run.max_steps
        return None if limit is not None and self.progress.step >= limit else self.plan.next(self.progress)

    def _after_step(self, phase: PhaseConfig, result: StepResult, seconds: float, report: Report, saver: Saver) -> None:
        """Validate, evaluate and save where it is due. Weights that a step could not use are never saved."""
        step, last = self.progress.step, self._next() is None
        broken = result.skipped and not result.spike
        self.skipped_in_row = self.skipped_in_row + 1 if broken else 0
        if broken and (last or self.skipped_in_row >= self.config.optim.max_skipped):
            raise self._not_finite(saver, f"loss or gradient of the last {self.skipped_in_row} steps was not finite")
        if not result.skipped and not last:
            saver.remove_old()  # only now is it known that the weights that were saved last are good
        if last or _is_due(step, self.config.log.valid_interval):
            found = self._validate(phase, report)
            last = last or self.early_stop.reached
            if last and found is not None and not found.is_finite:
                raise self._not_finite(saver, "the held-out loss of the last weights is not finite")
        if self.needles is not None and not result.stop:  # who asks for a stop does not wait for them
            left = self.plan.left_in_phase(self.progress, self.config.run.max_steps)
            self.needles.after_step(self.session.model, phase, self.progress, left, seconds, report)
        options = self.config.checkpoint
        due = (last and options.save_final) or _is_due(step, options.interval)
        due = due or (options.keep_phase_ends and self.plan.left_in_phase(self.progress) == 0)
        due = due or self.early_stop.is_best(step)
        if (due or result.stop) and not broken:
            self._save(phase, saver, last or result.stop)
            if last:
                saver.remove_old()
        elif _is_due(step, self.config.guard.copies_interval):
            self._compare_copies(saver)

    def _compare_copies(self, saver: Saver) -> None:
        """End the run if a rank's copy of a parameter is not the others'.

        Raises:
            RunStopped: naming the ranks, and a parameter.
        """
        if odd := self.session.model.odd_copies():
            saver.settle()  # what is being written was the same on all
            raise endings.faulty_device(self.progress.step, odd)

    def _save(self, phase: PhaseConfig, saver: Saver, last: bool) -> None:
        self._compare_copies(saver)
        if not self.session.model.weights_are_finite():
            raise self._not_finite(saver, "the weights hold numbers that are not finite")
        marks: dict[str, Any] = {PHASE_END: self.plan.left_in_phase(self.progress) == 0}
        if self.guard.is_on:
            marks[GUARD] = self.guard.state()
        if self.reference is not None:
            marks |= {REFERENCE: self.reference, EARLY_STOP: self.early_stop.state()}
        if self.plan.left_out:
            marks[ENTRY] = as_records(self.plan.left_out)
        if self.validated is not None and self.validated[0] == self.progress.step:
            marks[VALID_LOSS] = self.validated[1]
        saver.save(self.session, self.progress, phase.rope_base, marks, last)

    def _not_finite(self, saver: Saver, what: str) -> RunStopped:
        saver.settle()  # what is being written is of an earlier step, whose weights were finite
        return endings.not_finite(self.folder.checkpoints, self.progress.step, what)

    def _validate(self, phase: PhaseConfig, report: Report) -> HeldOut | None:
        stream = self.inputs.valid_stream(phase.seq_len)
        if stream is None:
            return None
        rows, dp = min(self.config.data.valid_rows, stream.rows_per_epoch()), self.session.context.dp_size
        # Every rank runs as many; surplus is not counted.
        mine = range(self.session.context.dp_rank, -(-rows // dp) * dp, dp)
        numbers = [[min(row, rows - 1)] for row in mine]
        batches = zip(read_batches(stream, numbers, log=self.lines.append), (row < rows for row in mine), strict=True)
        model, base = self.session.model, phase.rope_base
        if self.references is not None:
            found: HeldOut = evaluate_pairs(model, batches, base, self.references)
        else:
            found = evaluate(model, batches, self.inputs.token_bytes, base)
        report.validation(self.progress, found)
        self.early_stop.take(self.progress.step, found.loss)
        if self.early_stop.reached:
            report.note(f"step {self.progress.step:,}: {self.early_stop.line()}")
        self.validated = (self.progress.step, found.loss) if found.is_finite else None
        return found


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
