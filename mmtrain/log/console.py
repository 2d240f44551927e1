"""Terminal output of a run: a live line, or plain lines where there is no terminal, and a closing summary."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

SMOOTHING = 0.9  # of the throughput from which the time left is computed


class RunConsole:
    """Shows the progress of a run from the records that go into `metrics.jsonl`.

    Args:
        total_steps: steps of the whole run.
        total_tokens: tokens of the whole run.
        stream: where to write; stderr when None.
        every_seconds: without a terminal, seconds between lines.
        every_steps: without a terminal, a line at every such step besides; None for none.
        enabled: False on every rank but the first.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        total_tokens: int,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
        every_steps: int | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.total_tokens, self.enabled = total_steps, total_tokens, enabled
        self._every_seconds, self._every_steps, self._clock = every_seconds, every_steps, clock
        self._stream = stream or sys.stderr
        self._rate: float | None = None
        self._last_line: float | None = None
        self._live: Live | None = None
        if enabled and self._stream.isatty():
            self._live = Live(console=Console(file=self._stream), refresh_per_second=4, transient=False)
            self._live.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the record of a step, a line of `metrics.jsonl` as a mapping."""
        if not self.enabled:
            return
        speed = record.get("tokens_per_s")
        if speed:
            self._rate = speed if self._rate is None else SMOOTHING * self._rate + (1 - SMOOTHING) * speed
        left = (self.total_tokens - record["tokens"]) / self._rate if self._rate else None
        if self._live is not None:
            self._live.update(_row(_cells(record, self.total_steps, left)))
        elif self._is_due(record["step"]):
            self._print("  ".join(f"{name} {text}" for name, text in _cells(record, self.total_steps, left)))

    def note(self, text: str) -> None:
        """Print a line that stays: a checkpoint, a validation, a warning."""
        if not self.enabled:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _is_due(self, step: int) -> bool:
        now = self._clock()
        by_steps = self._every_steps is not None and step % self._every_steps == 0
        by_time = self._last_line is None or now - self._last_line >= self._every_seconds
        if not (by_steps or by_time or step >= self.total_steps):
            return False
        self._last_line = now
        return True

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def summary_lines(records: Sequence[Mapping[str, Any]], run_dir: Path, seconds: float) -> list[str]:
    """Return the three lines that close a run: what was done, what came of it, where it is.

    Args:
        records: the records of `metrics.jsonl`.
        run_dir: the run's folder.
        seconds: wall time of this launch.
    """
    steps = [record for record in records if record.get("loss") is not None]
    valid = [record for record in records if record.get("val_loss") is not None]
    if not steps:
        return [f"no step was run in {_duration(seconds)}", "no loss", str(run_dir)]
    first, last = steps[0], steps[-1]
    speeds = sorted(record["tokens_per_s"] for record in steps if record.get("tokens_per_s"))
    speed = f", {_count(speeds[len(speeds) // 2])} tokens/s" if speeds else ""
    mfu = f", MFU {last['mfu']:.1%}" if last.get("mfu") is not None else ""
    outcome = f"loss {first['loss']:.3f} -> {last['loss']:.3f}"
    if valid:
        outcome += f", validation {valid[-1]['val_loss']:.3f}"
        if valid[-1].get("val_bits_per_byte") is not None:
            outcome += f" ({valid[-1]['val_bits_per_byte']:.3f} bits per byte)"
    if last.get("drop_rate") is not None:
        outcome += f", {last['drop_rate']:.1%} of assignments dropped"
        if last.get("drop_rate_alone") is not None:
            outcome += f" ({last['drop_rate_alone']:.1%} without the global router)"
    inside = Path(run_dir).iterdir() if Path(run_dir).is_dir() else ()
    files = ", ".join(sorted(path.name for path in inside if path.name[0] != "."))
    return [
        f"trained to step {last['step']:,}: {_count(last['tokens'])} tokens in {_duration(seconds)}{speed}{mfu}",
        outcome,
        f"{run_dir}: {files}",
    ]


def _cells(record: Mapping[str, Any], total_steps: int, seconds_left: float | None) -> list[tuple[str, str]]:
    """Name and text of everything worth a column; what a run does not measure is left out."""
    shown = [
        ("step", "step", lambda step: f"{step:,}/{total_steps:,}"),
        ("tokens", "tokens", _count),
        ("loss", "loss", lambda loss: f"{loss:.4f}"),
        ("lr", "lr", lambda lr: f"{lr:.2e}"),
        ("grad", "grad_norm", lambda norm: f"{norm:.2f}"),
        ("tok/s", "tokens_per_s", _count),
        ("MFU", "mfu", lambda mfu: f"{mfu:.1%}"),
        ("drop", "drop_rate", lambda rate: f"{rate:.1%}"),
        ("alone", "drop_rate_alone", lambda rate: f"{rate:.1%}"),
        ("hidden", "exchange_hidden", lambda part: f"{part:.0%}"),
    ]
    cells = [(name, text(record[key])) for name, key, text in shown if record.get(key) is not None]
    if "loss" in record and record["loss"] is None:
        cells.insert(2, ("loss", "nan"))
    left = [] if seconds_left is None else [("left", _duration(seconds_left))]
    return [*cells[:1], *left, *cells[1:]]  # near the front, so that a narrow terminal shows it


def _row(cells: Sequence[tuple[str, str]]) -> Text:
    """One line, cut at the terminal's width (a Text, so that printing above it cannot change how it is drawn)."""
    row = Text(no_wrap=True, overflow="ellipsis")
    for i, (name, text) in enumerate(cells):
        row.append("  " if i else "").append(f"{name} ", style="dim").append(text, style="bold")
    return row


def _count(number: float) -> str:
    """Write 1234567 as 1.23M; up to 9,999 in full."""
    if abs(number) < 10_000:
        return f"{number:,.0f}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}" if abs(number) < 999.5 * size else f"{number / size:,.0f}{suffix}"
    return str(number)


def _duration(seconds: float) -> str:
    """Write seconds as 42s, 5m07s, 3h12m or 6d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
