"""A few steps of a run under torch's profiler: why it is as fast as it is.

The run is prepared, laid out and trained by the very code of `launch/pretrain.py`, but nothing is written except the
profile's own files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mmtrain.checkpoint.agreement import on_main
from mmtrain.config import PretrainConfig
from mmtrain.config.checks import require
from mmtrain.errors import ConfigError
from mmtrain.health.watchdog import Watchdog
from mmtrain.log.profile_hints import hints
from mmtrain.log.profile_report import ProfileReport, report_lines
from mmtrain.output import say
from mmtrain.parallel import mesh
from mmtrain.runs.step_profiler import TIMED, ProfileOptions, StepProfiler
from mmtrain.train.prepared_run import PreparedRun, plan_launch, prepare_run
from mmtrain.train.resume import start_position
from mmtrain.train.trainer import Trainer


def profile_step(config: PretrainConfig, options: ProfileOptions, note: Callable[[str], None]) -> None:
    """Train some steps of a run, profile the last of them, and write and print the report. On every rank.

    Args:
        config: every option of the run.
        options: of the profile.
        note: is told, in a line, what takes its time.

    Raises:
        ConfigError: the first option that cannot work.
    """
    options.check(config)
    planned = plan_launch(_quiet(config))
    run = prepare_run(planned, note)
    _check_steps(run, options)
    context = run.join()
    out = options.out or Path("profiles") / config.run.name
    try:
        on_main(lambda: _make(out))
        with Watchdog(config.cluster.timeout_minutes, out / "stacks") as watchdog, planned.memory.told():
            trainer = Trainer(planned.config, context, planned.plan, run.inputs, run.folder, run.verified_start(),
                              None, planned.memory)  # fmt: skip
            planned.memory.enter(run.first_phase)
            trainer.session.prepare(trainer.plans)
            report, files = StepProfiler(trainer, options, out, watchdog).run()
            trainer.session.close()
            if context.is_main:
                _tell(report, files, out)
    finally:
        mesh.stop()


def _quiet(config: PretrainConfig) -> PretrainConfig:
    """Leave out what a run tells others, and what it does between steps."""
    log = replace(config.log, wandb="off", tensorboard=False, plot=False, gradient_fingerprints=False)
    evals = replace(config.evals, needles=replace(config.evals.needles, enabled=False))
    checkpoint = replace(config.checkpoint, interval=0)  # no memory for copies
    return replace(config, log=log, evals=evals, checkpoint=checkpoint)


def _check_steps(run: PreparedRun, options: ProfileOptions) -> None:
    """Refuse more steps than the phase at work has left: other phases may have other rows and layouts (ConfigError)."""
    at, plan = start_position(run.start), run.planned.plan
    first = plan.next(at)
    if first is None:
        raise ConfigError("run.resume", run.planned.config.run.resume, "the run is at its end, with no step left",
                          "give run.resume=never with another run.name, or a longer stage")  # fmt: skip
    phase = plan.phases[first.phase_index]
    left, _ = phase.left(at.phase_tokens if at.phase == first.phase_index else 0)
    also = f"{options.warmup} of warm-up, {TIMED} timed" + (", 1 for --memory" if options.memory else "")
    require(options.all_steps <= left, "--steps", options.steps,
            f"with {also} these are {options.all_steps} steps, and phase {phase.phase.name} has {left} left",
            f"give fewer, or larger stage.phases.{first.phase_index}.tokens")  # fmt: skip


def _make(out: Path) -> None:
    """Make the folder of the report, and see that it can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.txt").touch()
    except OSError as error:
        raise ConfigError("--out", out, f"cannot be written: {error.strerror}", "give another folder") from error


def _tell(report: ProfileReport, files: list[str], out: Path) -> None:
    """Write the report, as text and JSON, and print it."""
    found = hints(report)
    files = [f"{out / 'report.txt'}, {out / 'report.json'}: this page", *files]
    text = "\n".join(report_lines(report, found, files))
    (out / "report.txt").write_text(text + "\n", encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report.as_record(found, files), indent=1) + "\n", encoding="utf-8")
    say(text)
