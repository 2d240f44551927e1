"""Options that no run can do without, all asked for at once, with a command line to copy that works on this machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from mmtrain.config.machine import gpu_count, prepared_corpora, processes_at_hand, under_torchrun
from mmtrain.config.overrides import Given
from mmtrain.config.schema import build
from mmtrain.config.stage import PhaseConfig, StageConfig
from mmtrain.errors import ConfigError

_SIZES = ("stage.scale", "stage.token_scale", "stage.batch_scale")
_LONGEST_ROW = {True: 8192, False: 512}  # with and without a GPU
_STEPS = 120
_SMALL_TOKENS = 5_000_000  # a stage of so few tokens is for trials as it is


def check_essentials(values: Mapping[str, Any], given: Sequence[Given], program: str) -> None:
    """Refuse a run without a corpus or a name, naming all that is missing and a whole line that works.

    Args:
        values: the nested configuration.
        given: the overrides of the command line.
        program: what starts the program, as sys.argv[0] has it.

    Raises:
        ConfigError: something is missing.
    """
    data, run = values.get("data") or {}, values.get("run") or {}
    missing = []
    if data.get("path") in (None, "", "???") and not data.get("sources"):
        missing.append("data.path")
    if run.get("name") in (None, "", "???"):
        missing.append("run.name")
    if not missing:
        return
    corpora = prepared_corpora(Path.cwd())
    gpus = gpu_count() if not any(one.option == "cluster.device" and one.value == "cpu" for one in given) else 0
    stage = values.get("stage") or {}
    added = {"data.path": str(corpora[0]) if corpora else "corpora/mine", "run.name": str(stage.get("name", "first"))}
    options = [_typed(one) for one in given if one.option not in missing and one.option != "stage"]
    options = [f"+stage={one.value}" for one in given if one.option == "stage"] + options
    processes = 1 << (processes_at_hand(gpus).bit_length() - 1)  # batches of the stages are powers of two
    submits = Path(program.split()[-1]).stem == "submit"  # a job: this machine's processes say nothing of it
    if not submits and not any(one.option in _SIZES for one in given):
        options += sizes(build(StageConfig, stage, "stage"), processes, gpus > 0)
    options += [f"{name}={added[name]}" for name in missing]
    starter = "python" if submits else f"torchrun --nproc-per-node {processes}"
    line = " ".join([starter, under_torchrun(program), *map(shlex.quote, options)])
    prepare = "" if corpora or "data.path" not in missing else (
        f" (python launch/prepare.py --input TEXTS/ --output {added['data.path']} makes the corpus)"
    )  # fmt: skip
    problem = "required" if len(missing) == 1 else "both are required"
    raise ConfigError(" and ".join(missing), "(missing)", problem, f"for example {line}{prepare}")


def sizes(stage: StageConfig, processes: int, gpu: bool) -> list[str]:
    """Return overrides that shrink a stage to a trial of minutes: rows, batches and about 120 steps in all.

    Args:
        stage: the stage, unscaled.
        processes: how many share a batch; a power of two.
        gpu: whether they have GPUs.
    """
    if sum(phase.tokens for phase in stage.phases) <= _SMALL_TOKENS:
        return []
    longest = max(phase.seq_len for phase in stage.phases)
    scale = Fraction(1, max(1, 1 << (max(0, longest // _LONGEST_ROW[gpu] - 1)).bit_length()))
    rows = min(step.tokens // phase.seq_len for phase in stage.phases for step in phase.batch)
    wanted = max(processes, min(16, rows // 16))
    batch = Fraction(1, max(1, 1 << ((rows // wanted).bit_length() - 1)))
    steps = sum(_steps(phase) for phase in stage.phases) / batch
    times = max(1, round(steps / _STEPS))
    digits = len(str(times)) - 1
    token = Fraction(1, times // 10**digits * 10**digits)
    named = zip(_SIZES, (scale, token, batch), strict=True)
    return [f"{name}={value}" for name, value in named if value != 1]


def _steps(phase: PhaseConfig) -> float:
    """Return about how many steps a phase has, unscaled."""
    ends = [*(min(point.at, phase.tokens) for point in phase.batch[1:]), phase.tokens]
    return sum(max(0, end - point.at) / point.tokens for point, end in zip(phase.batch, ends, strict=True))


def _typed(one: Given) -> str:
    prefix = one.hydra[: len(one.hydra) - len(one.hydra.lstrip("+~"))]
    return f"{prefix}{one.option}={one.value}"
