"""Figures of the next steps of a run: warmed up, timed, then watched by torch's profiler."""

from __future__ import annotations

import gzip
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from mmdata.rows.loader import PackedBatch
from mmtrain.config import PretrainConfig
from mmtrain.config.checks import require
from mmtrain.health.watchdog import Watchdog
from mmtrain.log.kernel_times import KernelTimes, kernel_times, profiled
from mmtrain.log.operator_times import operator_times
from mmtrain.log.profile_report import ProfileReport, RankRow, gap_rows, kind_rows
from mmtrain.log.timeline import draw_timeline
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import records_graphs
from mmtrain.runs.profile_figures import HeldMemory, KeepingReader, document_lengths, operations, versions
from mmtrain.train.device import peak_rate, product_rate
from mmtrain.train.garbage import collect, collected_in_step
from mmtrain.train.header import run_lines
from mmtrain.train.statistics import StepResult
from mmtrain.train.trainer import Trainer

TIMED = 5
"""Steps between warm-up and profile, whose median is the step that nothing watches."""
LARGE_TRACE = 32 * 2**20  # bytes: a browser takes long for more, and they shrink to a tenth
HISTORY = 1_000_000  # allocations and frees of memory that a snapshot tells


@dataclass(frozen=True)
class ProfileOptions:
    """Options of a profile, beside the run's own.

    Attributes:
        steps: that are profiled.
        warmup: steps before any is timed; CUDA graphs are recorded in the first.
        out: folder of the report; None: `profiles/` and the run's name.
        memory: take a snapshot of the device's memory in one more step.
    """

    steps: int = 2
    warmup: int = 5
    out: Path | None = None
    memory: bool = False

    @property
    def all_steps(self) -> int:
        """Steps in all."""
        return self.warmup + TIMED + self.steps + self.memory

    def check(self, config: PretrainConfig) -> None:
        """Refuse what no profile can be taken with (ConfigError)."""
        require(self.steps >= 1, "--steps", self.steps, "must be at least 1", "2 are enough")
        require(self.warmup >= 1, "--warmup", self.warmup, "must be at least 1", "5 let a GPU's clocks settle")
        require(not config.run.plan, "run.plan", True, "trains no step", "leave it out: launch/pretrain.py plans")
        on_gpu = mesh.pick_device(config.cluster).type == "cuda"
        require(on_gpu or not self.memory, "--memory", True, "torch keeps no history of a CPU's memory", "leave it out")


class StepProfiler:
    """Profile of the next steps of a trainer; its methods are collective.

    Args:
        trainer: at the position that is profiled; its session is prepared.
        options: of the profile.
        out: folder of the main process's files.
        watchdog: is told the step at work.
    """

    def __init__(self, trainer: Trainer, options: ProfileOptions, out: Path, watchdog: Watchdog) -> None:
        self._trainer, self._options, self._out, self._watchdog = trainer, options, out, watchdog
        self._context, self._device = trainer.session.context, trainer.session.context.device
        self._reader = trainer.session.batches = KeepingReader(trainer.session.batches)
        self._seconds: list[float] = []
        self._waits: list[float] = []
        self._watched: list[tuple[list[PackedBatch], StepResult]] = []
        self._losses: list[float] = []
        self.files: list[str] = []

    def run(self) -> tuple[ProfileReport, list[str]]:
        """Run all steps; returns the report and, on the main process, the files that were written."""
        with collected_in_step():
            for _ in range(self._options.warmup):
                self._step()
            held, results = HeldMemory(self._trainer.session), [self._timed_step() for _ in range(TIMED)]
            held.close()
            watched = range(self._options.steps)
            profiler = profiled(lambda: [self._watched_step() for _ in watched], self._device.type)
            if self._options.memory:
                self._snapshot()
        times = kernel_times(profiler)
        if self._context.is_main:
            self._save_trace(profiler, times)
        return self._report(times, profiler, results, held), self.files

    def _step(self) -> StepResult:
        """Train the next step as a run does."""
        step = self._trainer.plan.next(self._trainer.progress)
        assert step is not None  # _check_steps has counted them
        self._watchdog.step = step.number
        result = self._trainer.take(step)
        self._trainer.progress = step.after(result.tokens)
        self._losses.append(result.loss)
        collect(step.number)
        return result

    def _timed_step(self) -> StepResult:
        began = time.perf_counter()
        result = self._step()  # reading its figures waits for the device
        self._seconds.append(time.perf_counter() - began)
        self._waits.append(self._trainer.waited_for_rows)
        return result

    def _watched_step(self) -> None:
        """Train a step that is profiled, and keep what its operations are counted by."""
        result = self._step()
        self._watched.append((self._reader.batches, result))

    def _operations(self) -> dict[str, float]:
        """Count the operations of a profiled step on this rank, by kind, in their mean."""
        model, layout = self._trainer.config.model, self._context.layout
        sums: dict[str, float] = {}
        for batches, result in self._watched:
            for kind, count in operations(model, document_lengths(batches), result.drop_rate, layout).items():
                sums[kind] = sums.get(kind, 0.0) + count
        return {kind: count / len(self._watched) for kind, count in sums.items()}

    def _snapshot(self) -> None:
        """Train a step whose allocations are on record, and write them."""
        torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        self._step()
        if self._context.is_main:
            path = self._out / "memory.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            self.files.append(f"{path}: for https://docs.pytorch.org/memory_viz")
        torch.cuda.memory._record_memory_history(enabled=None)

    def _save_trace(self, profiler: torch.profiler.profile, times: KernelTimes) -> None:
        path = self._out / "trace.json"
        profiler.export_chrome_trace(str(path))
        if path.stat().st_size > LARGE_TRACE:
            with path.open("rb") as plain, gzip.open(packed := path.with_suffix(".json.gz"), "wb", 6) as file:
                shutil.copyfileobj(plain, file)
            path.unlink()
            path = packed
        self.files.append(f"{path}: for https://ui.perfetto.dev")
        if times.runs:
            count = len(times.runs)
            title = f"{self._trainer.config.run.name}: the last profiled step of rank 0"
            last = times.runs[count - count // self._options.steps :]
            self.files.append(f"{draw_timeline(last, self._out / 'timeline.png', title)}: the last step by stream")

    def _report(
        self, times: KernelTimes, profiler: torch.profiler.profile, results: list[StepResult], held: HeldMemory
    ) -> ProfileReport:
        trainer, steps, world = self._trainer, self._options.steps, dist.get_world_size()
        session, on_gpu = trainer.session, self._device.type == "cuda"
        step_s = statistics.median(self._seconds)
        parallel, memory = session.laid.parallel, held.gib()  # before the product, which takes memory too
        peak, rate = peak_rate(self._device, session.dtype), product_rate(self._device, session.dtype)
        ranks = self._all_ranks(times, step_s, memory)
        kinds = times.by_kind() if on_gpu else operator_times(profiler)
        recordable = on_gpu and records_graphs(self._context.layout, replace(parallel, cuda_graphs="auto"))
        return ProfileReport(
            header=run_lines(trainer.config, self._context, session.dtype, trainer.origin),
            versions=versions(self._device),
            steps=steps,
            timed=TIMED,
            tokens=statistics.median(result.tokens for result in results),
            step_s=step_s,
            mfu=statistics.median(result.flops for result in results) / step_s / peak / world,
            busy=ranks[self._context.rank].busy,
            rate_tflops=rate / 1e12,
            kinds=kind_rows(kinds, steps, step_s, self._operations(), rate),
            exposed_ms=ranks[self._context.rank].exposed_ms,
            idle_ms=times.idle_seconds / steps * 1e3 if on_gpu else None,
            gaps=gap_rows(times.gaps()),
            memory_gib=memory,
            losses=self._losses,
            ranks=ranks,
            phase=trainer.progress.phase,
            graphs_possible=recordable and parallel.cuda_graphs is False,
            recomputes=parallel.activation_checkpoint == "block",
            device_gib=torch.cuda.get_device_properties(self._device).total_memory / 2**30 if on_gpu else None,
        )

    def _all_ranks(self, times: KernelTimes, step_s: float, memory: dict[str, float]) -> list[RankRow]:
        """Gather every rank's figures."""
        steps, on_gpu = self._options.steps, self._device.type == "cuda"
        mine = RankRow(
            rank=self._context.rank,
            step_ms=step_s * 1e3,
            busy=times.busy_seconds / steps / step_s if on_gpu else None,
            reading_ms=statistics.median(self._waits) * 1e3,
            exposed_ms=times.exposed_communication_seconds / steps * 1e3 if on_gpu else None,
            peak_gib=memory.get("peak allocated"),
        )
        rows: list[RankRow | None] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, mine)
        return [row for row in rows if row is not None]
