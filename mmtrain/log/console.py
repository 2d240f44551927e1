"""Terminal output of a run: a live line, or plain lines where there is no terminal; and the log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mmtrain.output import say

SMOOTHING = 0.9  # of the throughput from which the time left is computed
LOG_NAME = "log.txt"


class RunConsole:
    """Shows the progress of a run from the records that go into `metrics.jsonl`.

    A reader that goes away (``| head``) ends the showing, not the run.

    Args:
        stream: where to write; stderr when None.
        every_seconds: without a terminal, seconds between lines.
        line_interval: steps between lines that stay, terminal or not; 0 for none.
        log_file: a file that gets every line that stays, with its time; None for none.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
        line_interval: int = 0,
        log_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every_seconds, self._line_interval, self._clock = every_seconds, line_interval, clock
        self._stream = stream or sys.stderr
        self._log = None
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log = log_file.open("ab", buffering=0)
        self._rate: float | None = None
        self._last_line: float | None = None
        self._live: Live | None = None
        if self._stream.isatty():
            self._live = Live(console=Console(file=self._stream), refresh_per_second=4, transient=False)
            self._live.start()

    def update(self, record: Mapping[str, Any], total_steps: int, total_tokens: int) -> None:
        """Show the record of a step, a line of `metrics.jsonl` as a mapping, on the way to so many steps and tokens."""
        speed = record.get("tokens_per_s")
        if speed:
            self._rate = speed if self._rate is None else SMOOTHING * self._rate + (1 - SMOOTHING) * speed
        left = (total_tokens - record["tokens"]) / self._rate if self._rate else None
        cells = _cells(record, total_steps, left)
        if self._live is not None:
            self._live.update(_row(cells))
        if self._is_due(record["step"], total_steps):
            self.note("  ".join(f"{name} {text}" for name, text in cells))

    def note(self, text: str) -> None:
        """Print a line that stays: a checkpoint, a validation, a warning."""
        self.record(text)
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            say(text, self._stream)

    def record(self, text: str) -> None:
        """Put a line into the log file alone: what is printed by others, or at the end."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk costs lines of this copy, not the run
                self._log.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n".encode())

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _is_due(self, step: int, total_steps: int) -> bool:
        now = self._clock()
        by_steps = self._line_interval > 0 and step % self._line_interval == 0
        by_time = self._last_line is None or now - self._last_line >= self._every_seconds
        if not (by_steps or (by_time and self._live is None) or step >= total_steps):
            return False
        self._last_line = now
        return True


def _cells(record: Mapping[str, Any], total_steps: int, seconds_left: float | None) -> list[tuple[str, str]]:
    """Name and text of everything worth a column; what a run does not measure is left out."""
    shown = [
        ("step", "step", lambda step: f"{step:,}/{total_steps:,}"),
        ("tokens", "tokens", count_text),
        ("loss", "loss", lambda loss: f"{loss:.4f}"),
        ("right", "pair_accuracy", lambda share: f"{share:.0%}"),
        ("lr", "lr", lambda lr: f"{lr:.2e}"),
        ("grad", "grad_norm", lambda norm: f"{norm:.2f}"),
        ("tok/s", "tokens_per_s", count_text),
        ("MFU", "mfu", lambda mfu: f"{mfu:.1%}"),
        ("mem", "memory_gib", lambda gib: f"{gib:.1f}G"),
        ("drop", "drop_rate", lambda rate: f"{rate:.1%}"),
        ("alone", "drop_rate_alone", lambda rate: f"{rate:.1%}"),
        ("hidden", "exchange_hidden", lambda part: f"{part:.0%}"),
    ]
    cells = [(name, text(record[key])) for name, key, text in shown if record.get(key) is not None]
    if "loss" in record and record["loss"] is None:
        cells.insert(2, ("loss", "nan"))
    left = [] if seconds_left is None else [("left", duration_text(seconds_left))]
    return [*cells[:1], *left, *cells[1:]]  # near the front, so that a narrow terminal shows it


def _row(cells: Sequence[tuple[str, str]]) -> Text:
    """One line, cut at the terminal's width (a Text, so that printing above it cannot change how it is drawn)."""
    row = Text(no_wrap=True, overflow="ellipsis")
    for i, (name, text) in enumerate(cells):
        row.append("  " if i else "").append(f"{name} ", style="dim").append(text, style="bold")
    return row


def count_text(number: float) -> str:
    """Write 1234567 as 1.23M; up to 9,999 in full."""
    if abs(number) < 10_000:
        return f"{number:,.0f}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}" if abs(number) < 999.5 * size else f"{number / size:,.0f}{suffix}"
    return str(number)


def duration_text(seconds: float) -> str:
    """Write seconds as 42s, 5m07s, 3h12m or 6d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
