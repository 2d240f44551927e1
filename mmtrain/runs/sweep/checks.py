"""What must hold of a whole sweep before any of its runs starts: laws that can be fitted, memory, and enough text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.config.sweep import SweepConfig
from mmtrain.errors import ConfigError
from mmtrain.parallel.memory.predict import GIB
from mmtrain.runs.sweep.grid import NO_CORPUS, SweepRun, without_corpus
from mmtrain.runs.sweep.slots import Slot
from mmtrain.train.epochs import tokens_by_phase
from mmtrain.train.inputs import RunInputs
from mmtrain.train.plan_run import PlannedRun, plan_run

FEWEST = 3  # sizes of an isoFLOP group (a parabola has three numbers), and compute points of a power law


def check_fit(sweep: SweepConfig, runs: Sequence[SweepRun]) -> None:
    """Refuse a grid that no law can be fitted to.

    Raises:
        ConfigError: an isoFLOP group of fewer than three sizes, or fewer than three compute points of an architecture.
    """
    if not sweep.fit:
        return
    series: dict[tuple[str, ...], list[SweepRun]] = defaultdict(list)
    for run in runs:
        series[run.series].append(run)
    fix = "give more of them, or sweep.fit=false to train without a fit"
    for mine in series.values():
        sizes = sorted({run.size for run in mine})
        if sweep.compute and len(sizes) < FEWEST:
            raise ConfigError("sweep.sizes", ", ".join(sizes),
                              f"an isoFLOP group of {mine[0].architecture} has {len(sizes)} of the {FEWEST} sizes that "
                              "a minimum needs", fix)  # fmt: skip
        if sweep.compute and len(sweep.compute) < FEWEST:
            problem = f"a power law needs {FEWEST} compute points, and there are {len(sweep.compute)}"
            raise ConfigError("sweep.compute", sweep.compute, problem, fix)
        found = {f"{run.flops_per_token * step * run.batch_tokens:.3g}" for run in mine for step in run.usable_steps}
        if len(found) < FEWEST:
            problem = f"{mine[0].architecture} has fewer than {FEWEST} compute points to fit a law to"
            raise ConfigError("sweep.tokens", len(found), problem, fix)


def check_runs(
    sweep: SweepConfig, runs: Sequence[SweepRun], slot: Slot, config_dir: Path, note: Callable[[str], None]
) -> list[PretrainConfig]:
    """Refuse runs that cannot finish: options that contradict each other, too little memory, too little text.

    Args:
        sweep: number of processes of a run.
        runs: of the sweep.
        slot: what a run has of this machine.
        config_dir: the folder of YAML groups.
        note: is told, in a line, what takes its time or was not checked.

    Returns:
        the options of a run for each choice of corpora.

    Raises:
        ConfigError: the first of them, with the run's name.
    """
    most: dict[str, tuple[SweepRun, PlannedRun]] = {}
    for run in _distinct(runs):
        planned = _named(run, lambda run=run: _planned(sweep, run, slot, config_dir))  # type: ignore[misc]
        config = planned.config
        reads = repr((config.data, config.model.vocab_size))
        if reads not in most or run.tokens > most[reads][0].tokens:
            most[reads] = run, planned
    for run, planned in most.values():
        if planned.config.data.path == NO_CORPUS:
            note("no data.path was given: whether there is enough text was not checked")
            continue
        _named(run, lambda planned=planned: _check_text(planned, note))  # type: ignore[misc]
    return [planned.config for _, planned in most.values()]


def _distinct(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Return the longest of the runs that differ in length and learning rate alone: what holds of it holds of all."""
    found: dict[tuple[object, ...], SweepRun] = {}
    for run in sorted(runs, key=lambda run: -run.steps):
        same = tuple(text for text in run.overrides if not text.startswith(("stage.", "log.valid_interval=")))
        found.setdefault((same, run.batch_tokens), run)
    return list(found.values())


def _planned(sweep: SweepConfig, run: SweepRun, slot: Slot, config_dir: Path) -> PlannedRun:
    config = _on_share(
        compose([*run.overrides, *without_corpus(run.overrides), f"run.name={run.name}"], config_dir), slot
    )
    device = torch.device("cuda" if slot.gpus else "cpu")
    planned = plan_run(config, sweep.processes, device)
    planned.memory.check()
    return planned


def _on_share(config: PretrainConfig, slot: Slot) -> PretrainConfig:
    """Return the options with the memory that a run has of its GPU, where nothing else was said."""
    if slot.device_bytes is None or config.cluster.device_memory_gib is not None:
        return config
    return replace(config, cluster=replace(config.cluster, device_memory_gib=slot.device_bytes / GIB))


def _check_text(planned: PlannedRun, note: Callable[[str], None]) -> None:
    """Refuse a corpus that the longest run would read too often, or without held-out text."""
    config, phases = planned.config, planned.phases
    inputs = RunInputs(config.data, phases, config.model.vocab_size, log=note)
    inputs.check_images(config.model)
    inputs.check_epochs(tokens_by_phase(planned.plan))
    if inputs.valid_stream(int(phases[0].seq_len)) is None:
        raise ConfigError("data.valid_rows", config.data.valid_rows, "there is no held-out text to measure a loss on",
                          "give data.valid_rows above 0 and a corpus with a held-out part")  # fmt: skip


def _named(run: SweepRun, check: Callable[[], PlannedRun | None]) -> PlannedRun:
    """Let an error of a check name the run."""
    try:
        return check()  # type: ignore[return-value]
    except ConfigError as error:
        raise ConfigError(error.option, error.value, f"{error.problem} (run {run.name})", error.fix) from error
