"""The lines that close a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtrain.log.console import count_text, duration_text


def summary_lines(
    records: Sequence[Mapping[str, Any]], run_dir: Path, seconds: float, first_step: int = 0
) -> list[str]:
    """Return the lines that close a run: what was done, what came of it, where it is, and what to run next.

    Speed, MFU and drops are medians over the steps of this launch.

    Args:
        records: the records of `metrics.jsonl`.
        run_dir: the run's folder.
        seconds: wall time of this launch.
        first_step: the step that this launch began after.
    """
    steps = [record for record in records if record.get("loss") is not None]
    here = [record for record in steps if record["step"] > first_step]
    if not here:
        return [f"no step was run in {duration_text(seconds)}", "no loss", str(run_dir)]
    inside = Path(run_dir).iterdir() if Path(run_dir).is_dir() else ()
    files = ", ".join(sorted(path.name for path in inside if path.name[0] != "."))
    return [
        f"trained to step {here[-1]['step']:,}: {_amount(steps, here)} in {duration_text(seconds)}{_medians(here)}",
        _outcome(records, steps),
        f"{run_dir}: {files}",
        f"next: {_launcher('generate')} {shlex.quote(str(run_dir))} --prompt 'Once upon a time'",
    ]


def _amount(steps: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]) -> str:
    total = here[-1]["tokens"]
    earlier = steps[len(steps) - len(here) - 1]["tokens"] if len(here) < len(steps) else 0
    return f"{count_text(total)} tokens" + (f", {count_text(total - earlier)} of them now," if earlier else "")


def _medians(here: Sequence[Mapping[str, Any]]) -> str:
    shown = (
        ("tokens_per_s", lambda rate: f"{count_text(rate)} tokens/s"),
        ("mfu", lambda mfu: f"MFU {mfu:.1%}"),
        ("drop_rate", lambda rate: f"{rate:.1%} of assignments dropped"),
        ("drop_rate_alone", lambda rate: f"{rate:.1%} without the global router"),
    )
    found = ((text, sorted(r[key] for r in here if r.get(key) is not None)) for key, text in shown)
    return "".join(f", {text(values[len(values) // 2])}" for text, values in found if values) + " (medians)"


def _outcome(records: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> str:
    outcome = f"loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}"
    valid = [record for record in records if record.get("val_loss") is not None]
    if valid:
        outcome += f", validation {valid[-1]['val_loss']:.3f}"
        if valid[-1].get("val_bits_per_byte") is not None:
            outcome += f" ({valid[-1]['val_bits_per_byte']:.3f} bits per byte)"
    if skipped := sum(bool(record.get("skipped")) for record in records):
        outcome += f", {skipped} {'step' if skipped == 1 else 'steps'} skipped as not finite"
    return outcome


def _launcher(name: str) -> str:
    """Return the command that starts another launcher the way this one was started."""
    script = Path(sys.argv[0])
    return f"python {script.with_name(name)}.py" if script.name == "pretrain.py" else f"mmtrain {name}"
