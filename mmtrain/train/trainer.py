"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

import torch.distributed as dist

from mmdata.rows.loader import PackedBatch, micro_batches
from mmtrain.checkpoint.dcp import Progress, find_checkpoint, load_checkpoint, remove_old, save_checkpoint
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.config import PhaseConfig, PretrainConfig
from mmtrain.config.checks import require
from mmtrain.health.watchdog import Watchdog
from mmtrain.log.gradients import GradientRecord
from mmtrain.model.init import meta_model
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.parallel.pipeline.schedule import check_schedule
from mmtrain.train.curriculum import RunPlan, RunStep, rank_batches
from mmtrain.train.device import compute_dtype, peak_rate
from mmtrain.train.evaluate import evaluate
from mmtrain.train.garbage import collect, collected_in_step
from mmtrain.train.inputs import RunInputs
from mmtrain.train.report import Report
from mmtrain.train.step import train_step
from mmtrain.train.warmup import plan_attention


class Trainer:
    """Runs the phases of a stage on the processes of `context`.

    Everything that happens at step i follows from the configuration and i alone, so a resumed run is the same run.
    """

    def __init__(
        self, config: PretrainConfig, context: ParallelContext, plan: RunPlan, inputs: RunInputs, folder: RunFolder
    ) -> None:
        self.config, self.context, self.plan, self.inputs, self.folder = config, context, plan, inputs, folder
        self.dtype = compute_dtype(config.optim.precision, context.device)
        offload = config.optim.name == "cpu_offload"
        seq_len = max(plan.phases, key=lambda phase: phase.tokens).phase.seq_len  # where most of the work is
        self.model = apply_parallel(meta_model(config.model), context, config.parallel, self.dtype, offload, seq_len)
        self.model.initialise(config.run.seed)
        self.optimizer = build_optimizer(self.model.module, config.optim)
        if config.log.gradient_fingerprints:
            precision = str(self.dtype).removeprefix("torch.")
            self.model.take_fingerprints = lambda found: GradientRecord(precision, found).write(folder.path)
        self.progress = self._load()
        self.last_step = min(plan.num_steps, config.run.max_steps or plan.num_steps)

    def _load(self) -> Progress:
        """Go on from this run's checkpoint, or start from another run's, or from initial weights."""
        run = self.config.run
        resume = self.folder.resume_from()
        if resume is not None:
            return load_checkpoint(resume, self.model.module, self.optimizer)
        if run.init_from is not None:
            source = find_checkpoint("run.init_from", run.init_from)
            load_checkpoint(source, self.model.module, self.optimizer if run.init_optimizer else None)
        return Progress()

    def run(self, watchdog: Watchdog) -> list[str]:
        """Train to the end of the stage (or `run.max_steps`); the main process gets the closing summary's lines.

        Args:
            watchdog: is told the step at work.
        """
        dist.barrier()  # every rank has looked at the folder before it is written to
        if self.context.is_main:
            self.folder.claim()
        peak = peak_rate(self.context.device, self.dtype) * dist.get_world_size()
        with Report(self.config, self.folder, self.plan, self.progress, peak, self.context.is_main) as report:
            self._prepare(report)
            batches = self._batches()
            with collected_in_step():
                for step in range(self.progress.step, self.last_step):
                    watchdog.step = step + 1  # as metrics.jsonl counts
                    self._step(self.plan.step(step), batches, report)
                    collect(step + 1)
            self.model.close()
            return report.close()

    def _prepare(self, report: Report) -> None:
        """Choose what is to be measured on this machine, and build what steps would otherwise wait for."""
        parallel, lengths = self.config.parallel, [phase.phase.seq_len for phase in self.plan.phases]
        for choice in self.model.tune(parallel.micro_batch_rows * lengths[0] // (parallel.tp * parallel.cp)):
            report.note(choice)
        recompute = parallel.activation_checkpoint
        if planned := plan_attention(self.model.module, self.context, self.dtype, max(lengths), recompute):
            report.note(planned)

    def _step(self, run_step: RunStep, batches: Iterator[PackedBatch], report: Report) -> None:
        phase = self.plan.phases[run_step.phase_index].phase
        rows_here = run_step.plan.num_rows // self.context.dp_size
        began = time.perf_counter()
        result = train_step(
            self.model,
            self.optimizer,
            list(islice(batches, rows_here // self.config.parallel.micro_batch_rows)),
            run_step.plan.lr,
            phase.rope_base,
            clip_grad=self.config.optim.clip_grad,
        )
        self.progress = Progress(run_step.step + 1, run_step.tokens_after)
        report.step(run_step, phase, result, time.perf_counter() - began)
        self._after_step(phase, report)

    def _after_step(self, phase: PhaseConfig, report: Report) -> None:
        """Validate and save where it is due."""
        step, last = self.progress.step, self.progress.step == self.last_step
        if last or _is_due(step, self.config.log.valid_interval):
            self._validate(phase, report)
        if (last and self.config.checkpoint.save_final) or _is_due(step, self.config.checkpoint.interval):
            path = save_checkpoint(
                self.folder.checkpoints,
                self.model.module,
                self.optimizer,
                self.progress,
                asdict(self.config),
                phase.rope_base,
            )
            if self.context.is_main:
                remove_old(self.folder.checkpoints, self.config.checkpoint.keep)
                report.note(f"saved {path}")

    def _batches(self) -> Iterator[PackedBatch]:
        """This rank's micro-batches from the current step on, phase after phase, read ahead."""
        rows = self.config.parallel.micro_batch_rows
        for index, phase in enumerate(self.plan.phases):
            first = max(self.progress.step - self.plan.first_steps[index], 0)
            lists = (
                numbers
                for step in range(first, phase.num_steps)
                for numbers in rank_batches(phase.step(step), self.context.dp_rank, self.context.dp_size, rows)
            )
            if first < phase.num_steps:
                stream = self.inputs.train_stream(index)
                yield from micro_batches(stream, lists, num_workers=self.config.data.num_workers)

    def _validate(self, phase: PhaseConfig, report: Report) -> None:
        stream = self.inputs.valid_stream(phase.seq_len)
        if stream is None:
            return
        rows, dp = min(self.config.data.valid_rows, stream.rows_per_epoch()), self.context.dp_size
        mine = range(self.context.dp_rank, -(-rows // dp) * dp, dp)  # every rank runs as many; surplus is not counted
        numbers = [[min(row, rows - 1)] for row in mine]
        batches = zip(micro_batches(stream, numbers), (row < rows for row in mine), strict=True)
        found = evaluate(self.model, batches, self.inputs.token_bytes, phase.rope_base)
        report.validation(self.progress, found)


def check_batches(config: PretrainConfig, dp_size: int, plan: RunPlan) -> None:
    """Refuse, before anything is started, batches that the layout cannot run (ConfigError)."""
    parallel = config.parallel
    rows = dp_size * parallel.micro_batch_rows
    for i, phase in enumerate(plan.phases):
        seq_len = phase.phase.seq_len
        require(config.data.valid_rows == 0 or seq_len % parallel.tp == 0, "parallel.tp", parallel.tp,
                f"validation runs one row at a time: {seq_len} tokens / tp {parallel.tp} is not whole",
                "give another parallel.tp, or data.valid_rows=0")  # fmt: skip
        for num_rows in {ramp.num_rows for ramp in phase.ramps}:
            check_schedule(parallel, f"stage.phases[{i}].batch", num_rows * seq_len, num_rows // rows)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
