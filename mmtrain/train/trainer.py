"""The training loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from mmtrain.checkpoint.agreement import on_main
from mmtrain.checkpoint.corpora import write_corpora
from mmtrain.checkpoint.listing import step_of
from mmtrain.checkpoint.progress import Progress, read_meta
from mmtrain.checkpoint.run_folder import TOKENIZER, RunFolder, Start
from mmtrain.config import PretrainConfig
from mmtrain.errors import RunStopped
from mmtrain.evals.needles import NeedleEvaluation
from mmtrain.health.stragglers import Stragglers
from mmtrain.health.watchdog import Watchdog
from mmtrain.hf.folder import is_hf_folder
from mmtrain.log.gradients import GradientRecord
from mmtrain.output import say
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.train import endings
from mmtrain.train.between_steps import EARLY_STOP, GUARD, BetweenSteps
from mmtrain.train.curriculum import RunPlan, RunStep
from mmtrain.train.device import peak_rate
from mmtrain.train.early_stop import EarlyStop
from mmtrain.train.garbage import collect, collected_in_step
from mmtrain.train.header import header_lines
from mmtrain.train.inputs import RunInputs
from mmtrain.train.launches import environment
from mmtrain.train.left_out import recorded_left_out
from mmtrain.train.pairs import References
from mmtrain.train.phase_memory import PhaseMemory
from mmtrain.train.position import checkpoint_position
from mmtrain.train.reference_pass import ReferencePass
from mmtrain.train.reference_weights import Reference
from mmtrain.train.report import Report
from mmtrain.train.resume import start_position
from mmtrain.train.rollback import choose_checkpoint, rows_since
from mmtrain.train.saving import Saver, begin_copy
from mmtrain.train.session import Session
from mmtrain.train.spike_guard import NO_LIMITS, Limits, SpikeGuard
from mmtrain.train.statistics import StepResult
from mmtrain.train.step import WeightsInUse, train_step
from mmtrain.train.stop_signals import StopSignals
from mmtrain.train.warmup import AttentionPlans


class Trainer(BetweenSteps):
    """Runs the phases of a stage on the processes of `context`.

    Everything that happens in a step follows from the configuration and the position before it alone, so a resumed run
    is the same run. So is one at a boundary between layouts: it goes on from the checkpoint that is saved there.
    """

    def __init__(
        self,
        config: PretrainConfig,
        context: ParallelContext,
        plan: RunPlan,
        inputs: RunInputs,
        folder: RunFolder,
        start: Start,
        needles: NeedleEvaluation | None = None,
        memory: PhaseMemory | None = None,
        reference: Reference | None = None,
    ) -> None:
        self.config, self.plan, self.inputs, self.folder = config, plan, inputs, folder
        self.start, self.needles, self.memory = start, needles, memory
        step = plan.next(start_position(start))
        phase_index = len(plan.phases) - 1 if step is None else step.phase_index
        self.lines: list[str] = []  # of this rank, to be told after the step at work
        self.session = Session(config, context, plan, phase_index, inputs, self.lines.append)
        self.plans = AttentionPlans()
        if config.log.gradient_fingerprints:
            precision = str(self.session.dtype).removeprefix("torch.")
            self.session.model.take_fingerprints = lambda found: GradientRecord(precision, found).write(folder.path)
        self.guard = SpikeGuard(config.guard)
        preference = config.stage.preference
        self.early_stop = EarlyStop(None if preference is None else preference.patience)
        self.references = None if preference is None else References(preference.beta)  # until they are known
        self.reference_weights = reference
        self.reference = None if reference is None else reference.fingerprint
        self.stragglers = Stragglers(config.guard.pace_interval, context.device, self.session.dtype)
        self.origin = "initial weights"
        self.copy = begin_copy(config, self.session)  # until a saver takes it
        try:
            self.progress = self._load()
        except BaseException:
            self._give_up_copy()
            raise
        self.skipped_in_row = 0
        self.waited_for_rows = 0.0
        self.validated: tuple[int, float] | None = None  # step and held-out loss of the last validation

    def _load(self) -> Progress:
        """Go on from this run's checkpoint, or start from another run's, or from initial weights."""
        if self.start.resume is not None:
            self.session.load(self.start.resume, with_optimizer=True)
            progress = self._go_on_from(self.start.resume)
            self.origin = f"resumed from {self.start.resume} after step {progress.step:,}"
            return progress
        if self.start.weights is not None:
            parts, alone = self.start.parts, self.start.eyes is None
            moments = self.config.run.init_optimizer and alone and not parts and not is_hf_folder(self.start.weights)
            self.session.load(self.start.weights, moments, parts)
            self.origin = f"{', '.join(parts) or 'weights'}{' and moments' if moments else ''} of {self.start.weights}"
        if self.start.eyes is not None:
            self.session.load_eyes(self.start.eyes)
            self.origin += f", eyes of {self.start.eyes}"
        return Progress()

    def _go_on_from(self, checkpoint: Path) -> Progress:
        """Take over what a checkpoint says of the run, but for its tensors, and return where the run stood."""
        own = checkpoint.resolve().parent == self.folder.checkpoints.resolve()
        meta = read_meta(checkpoint)
        self.plan.left_out = on_main(lambda: recorded_left_out(meta, self.folder.path if own else None))
        self.guard.restore(meta.get(GUARD))
        self.early_stop.restore(meta.get(EARLY_STOP))
        return checkpoint_position(checkpoint)

    def run(self, watchdog: Watchdog) -> list[str]:
        """Train to the end of the stage (or `run.max_steps`); the main process gets the closing summary's lines.

        Args:
            watchdog: is told the step at work.

        Raises:
            RunStopped: a signal asked for it, or loss or gradient stayed not finite.
        """
        try:
            return self._run(watchdog)
        except RunStopped as stopped:
            stopped.tell()
            if dist.is_initialized():
                dist.barrier()  # before the main process has told, none leaves: a launcher ends the others then
            raise
        finally:
            self._give_up_copy()

    def _give_up_copy(self) -> None:
        """Give back the memory for copies that no saver has taken: a thread may be at work on it."""
        copy, self.copy = self.copy, None
        if copy is not None:
            copy.release()

    def _run(self, watchdog: Watchdog) -> list[str]:
        notes = [*self.start.notes, *self.folder.claim(self.start, self._record_inputs)]
        peak = peak_rate(self.session.context.device, self.session.dtype) * dist.get_world_size()
        with (
            StopSignals(speaks=self.session.context.is_main) as signals,
            Report(self.config, self.folder, self.plan, self.progress, peak, self.session.context.is_main) as report,
        ):
            header = header_lines(
                self.config, self.session.context, self.session.dtype, self.plan, self.progress, self.origin
            )
            report.launch(environment(self.config, self.session.context, self.session.dtype, self.origin))
            predicted = self.memory.lines() if self.memory else []
            for line in [*header, *predicted, *report.places(), *notes]:
                report.note(line)
            saver = Saver(self.folder, self.config, self.inputs, report, self.copy)
            if self.start.resume is not None:
                saver.newest = self.progress.step, self.start.resume
            self._prepare(report, saver)
            self.copy = None
            self._know_reference(report, saver)
            stopped = self._train(watchdog, report, saver, signals)
            saver.settle()
            self.session.close()
            if stopped is not None:
                raise stopped
            return report.close()

    def _prepare(self, report: Report, saver: Saver) -> None:
        """Choose and build what steps would wait for, and wait for the memory of saves."""
        if self.session.model.is_tuned:  # pinning memory beside would count into the times
            saver.reserve(self.session)
        for line in self.session.prepare(self.plans):
            report.note(line)
        saver.reserve(self.session)

    def _know_reference(self, report: Report, saver: Saver) -> None:
        """Have the reference's log-probabilities of every pair: what is not on disk is computed now."""
        reference = self.reference_weights
        if reference is None:
            return
        work = ReferencePass(self.config, self.inputs, self.folder.path, reference.fingerprint)
        if work.missing():
            if self.start.resume is not None:
                assert reference.weights is not None  # `find_reference` has seen that they are needed
                self.session.load(reference.weights, with_optimizer=False)
            work.run(self.session, report.note)
            if self.start.resume is not None:
                self._change_session(self.progress.phase, self.start.resume, report, saver)
        self.references = work.references()

    def _record_inputs(self, folder: Path) -> None:
        write_corpora(folder, self.inputs.fingerprints())
        self.inputs.save_tokenizer(folder / TOKENIZER)

    def _train(self, watchdog: Watchdog, report: Report, saver: Saver, signals: StopSignals) -> RunStopped | None:
        """Run all steps; what ends them early on all ranks alike is returned."""
        try:
            with collected_in_step():
                while (step := self._next()) is not None:
                    watchdog.step = step.number
                    if self.guard.wants_rollback:
                        self._roll_back(report, saver)
                        continue
                    if self.memory is not None:
                        self.memory.enter(step.phase_index)
                    if self.plan.phases[step.phase_index].laid != self.session.laid:
                        self._cross(step, report, saver)
                    self._step(step, report, saver, signals)
                    collect(step.number)
        except RunStopped as stopped:
            return stopped
        finally:
            self.session.batches.close()
        return None

    def _cross(self, step: RunStep, report: Report, saver: Saver) -> None:
        """Go over to the layout of the next step's phase, through a checkpoint, in the same processes.

        Whoever is killed in here goes on from that checkpoint, or from the one before, to the same end.
        """
        began, before = time.perf_counter(), self.session.laid
        saver.settle()
        if saver.newest is None or saver.newest[0] != self.progress.step:
            self._save(self.plan.phases[self.progress.phase].phase, saver, last=True)
        _, checkpoint = saver.newest
        held = self._change_session(step.phase_index, checkpoint, report, saver)
        report.new_layout(step, before, self.session.laid, time.perf_counter() - began, held)

    def _change_session(self, phase_index: int, checkpoint: Path, report: Report, saver: Saver) -> float:
        """Begin anew from a checkpoint, laid out as a phase wants it; returns the GiB that torch held in between."""
        saver.release()
        held = self.session.close()
        context = self.session.context
        self.session = Session(self.config, context, self.plan, phase_index, self.inputs, self.lines.append)
        saver.begin_reserve(self.session)
        try:
            self.session.load(checkpoint, with_optimizer=True)
            self._prepare(report, saver)
        except BaseException:
            saver.release()
            raise
        return held

    def _roll_back(self, report: Report, saver: Saver) -> None:
        """Go back to an earlier checkpoint, in the same processes, and leave out the data since then.

        Whoever is killed in here meets the same again, or goes on from that checkpoint as the ledger says.

        Raises:
            RunStopped: there is no checkpoint to go back to.
        """
        began, at = time.perf_counter(), self.progress
        saver.settle()
        checkpoint = choose_checkpoint(self.folder, self.guard, self.plan, at)
        left_out = *self.plan.left_out, rows_since(checkpoint, at)
        report.rollback(at, left_out, checkpoint)
        aside = self.folder.set_aside_after(step_of(checkpoint))
        self.progress, self.plan.left_out = self._go_on_from(checkpoint), left_out
        step = self._next()
        assert step is not None
        self._change_session(step.phase_index, checkpoint, report, saver)
        saver.newest = self.progress.step, checkpoint
        self.skipped_in_row, self.validated = 0, None
        report.rolled_back(self.progress, aside, time.perf_counter() - began)

    def _step(self, step: RunStep, report: Report, saver: Saver, signals: StopSignals) -> None:
        phase = self.plan.phases[step.phase_index].phase
        began, limits = time.perf_counter(), self.guard.limits(step.phase_index)
        result = self.take(step, limits, lambda: signals.received is not None, saver)
        if not result.writing:
            saver.settle()
        self.progress = step.after(result.tokens)
        seconds = time.perf_counter() - began
        self.stragglers.add(self.waited_for_rows, seconds)
        for line in [*self.session.model.take_notes(), *self.stragglers.check(step.number)]:
            report.note(line)
        self._tell_lines(report)
        report.pace(step.number, self.stragglers.paces)
        report.step(step, self.progress, phase, result, seconds, limits)
        self.guard.take(step.number, result)
        self._after_step(phase, result, seconds, report, saver)
        if result.stop and self._next() is not None:
            saver.settle()
            raise endings.asked_for(self.folder.checkpoints, self.progress.step, signals.received)

    def _tell_lines(self, report: Report) -> None:
        """Tell what this rank met in a step: on the main process in the log too, else on stderr.

        Of ranks that share rows, which all meet the same, only the first tells.
        """
        context = self.session.context
        first = all(context.dense[axis].get_local_rank() == 0 for axis in ("pp", "cp", "tp"))
        for line in self.lines if first else ():
            report.note(line)
            if not report.enabled:
                say(f"rank {context.rank}: {line}", sys.stderr)
        self.lines.clear()

    def take(
        self,
        step: RunStep,
        limits: Limits = NO_LIMITS,
        stop: Callable[[], bool] = lambda: False,
        saving: WeightsInUse | None = None,
    ) -> StepResult:
        """Train one step and nothing else; `progress` is left to the caller. Collective.

        Args:
            step: that follows `progress`.
            limits: largest loss and norm of a step that is taken.
            stop: whether this rank wants the run to stop.
            saving: what reads the weights meanwhile.
        """
        began = time.perf_counter()
        batches = self.session.batches.read(step)
        self.waited_for_rows = time.perf_counter() - began
        return train_step(
            self.session.model,
            self.session.optimizer,
            batches,
            step.lr,
            self.plan.phases[step.phase_index].phase.rope_base,
            clip_grad=self.config.optim.clip_grad,
            limits=limits,
            stop=stop,
            saving=saving,
            references=self.references,
        )
