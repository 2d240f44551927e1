"""`metrics.jsonl`: what a resume keeps and drops, torn lines, and numbers that JSON lacks; the console's lines."""

import errno
import io
import json
import math
import os
import re
from datetime import datetime

import numpy as np
import pytest

from mmtrain.log.console import RunConsole
from mmtrain.log.metrics import MetricsWriter, read_metrics
from mmtrain.log.summary import summary_lines


def write_steps(path, steps, **options):
    with MetricsWriter(path, **options) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 1.0 / step})


def steps_in(path):
    return [record["step"] for record in read_metrics(path)]


def test_every_record_is_on_disk_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path / "run" / "metrics.jsonl")
    writer.write({"step": 1})
    assert steps_in(tmp_path / "run") == [1]


def test_resume_drops_what_runs_again_and_keeps_all_else(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 11))
    with MetricsWriter(path) as writer:
        writer.write({"step": 6, "val_loss": 2.0})
        writer.write({"step": 7, "val_loss": 3.0})
    kept = path.read_text().splitlines()[:6]
    write_steps(path, [7, 8], keep_through_step=6)
    assert path.read_text().splitlines()[:6] == kept
    assert steps_in(path) == [1, 2, 3, 4, 5, 6, 6, 7, 8]
    assert [record.get("val_loss") for record in read_metrics(path)].count(3.0) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("keep", [None, 5])
@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4}'])
def test_a_torn_last_line_is_dropped_before_more_is_written(tmp_path, keep, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    path.write_text(path.read_text() + torn)
    assert steps_in(path) == [1, 2, 3]
    write_steps(path, [4, 5], keep_through_step=keep)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_full_disk_costs_no_record(tmp_path):
    class Full(io.RawIOBase):
        """A file that takes ten bytes, then has no room, until it is told so."""

        def __init__(self, file):
            self.file, self.room = file, 10

        def write(self, data):
            if self.room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = self.file.write(data[: self.room])
            self.room -= taken
            return taken

    lines = []
    writer = MetricsWriter(tmp_path / "metrics.jsonl", warn=lines.append)
    writer._file = full = Full(writer._file)
    writer.write({"step": 1})
    writer.write({"step": 2})
    assert len(lines) == 1 and "No space left on device" in lines[0] and steps_in(tmp_path) == []
    full.room = 1000
    writer.write({"step": 3})
    assert steps_in(tmp_path) == [1, 2, 3]


def test_failed_truncation_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    monkeypatch.setattr("mmtrain.log.metrics.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        MetricsWriter(path, keep_through_step=1)
    assert steps_in(path) == [1, 2, 3]


def test_nan_is_null_and_arrays_are_lists(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(
            {"a": math.nan, "b": [1.0, math.inf], "c": np.float32(0.5), "d": np.array([[1.0, math.nan]]), "e": None}
        )
    record = json.loads(path.read_text())
    assert datetime.fromisoformat(record.pop("time")).tzinfo is not None
    assert record == {"a": None, "b": [1.0, None], "c": 0.5, "d": [[1.0, None]], "e": None}


def make_record(step, loss=2.0):
    return {"step": step, "tokens": 1000 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 500.0,
            "mfu": None, "drop_rate": 0.05}  # fmt: skip


def test_plain_console_prints_now_and_then_and_at_the_end():
    out, now = io.StringIO(), [0.0]
    console = RunConsole(stream=out, every_seconds=10.0, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 1.0
        console.update(make_record(step), 100, 100_000)
    console.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("step 1/100") and "left 3m18s" in lines[0] and "drop 5.0%" in lines[0]
    assert "MFU" not in lines[0] and "alone" not in lines[0]
    assert lines[-1].startswith("step 100/100") and "left 0s" in lines[-1]


def test_plain_console_keeps_a_line_every_so_many_steps_and_smooths_the_speed():
    out = io.StringIO()
    console = RunConsole(stream=out, every_seconds=1e9, line_interval=3)
    for step in range(1, 8):
        console.update({**make_record(step), "tokens_per_s": 1500.0 if step == 6 else 500.0}, 1000, 1_000_000)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/1,000", "3/1,000", "6/1,000"]
    assert "left 27m37s" in lines[2]  # of 994,000 tokens at 600 a second, not at 1,500


def test_console_says_nan():
    out = io.StringIO()
    RunConsole(stream=out).update(make_record(1, loss=None), 1, 1000)
    assert "loss nan" in out.getvalue()


def test_a_reader_that_goes_away_ends_the_showing_alone(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        console = RunConsole(stream=stream, log_file=tmp_path / "log.txt")
        for step in (1, 2, 3):
            console.note(f"step {step}")
        console.close()
    assert [line[20:] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["step 1", "step 2", "step 3"]


def test_a_log_file_that_cannot_be_written_does_not_end_a_run(tmp_path):
    full = tmp_path / "log.txt"
    full.symlink_to("/dev/full")
    out = io.StringIO()
    console = RunConsole(stream=out, log_file=full)
    console.note("still here")
    console.close()
    assert out.getvalue() == "still here\n"


def test_live_console_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    console = RunConsole(stream=out)
    console.update(make_record(3), 10, 10_000)
    console.note("checkpoint [step 3] written")
    console.close()
    console.close()
    assert "checkpoint [step 3] written" in out.getvalue() and "3/10" in out.getvalue()


def test_summary_is_of_this_launch_and_says_what_to_run_next(tmp_path):
    records = [{**make_record(step, 8.0 / step), "tokens_per_s": speed, "mfu": speed / 1000, "drop_rate": speed / 5000}
               for step, speed in ((1, 900.0), (2, 100.0), (3, 300.0), (4, 200.0))]  # fmt: skip
    records.append({"step": 4, "val_loss": 4.5, "val_bits_per_byte": 2.25})
    lines = summary_lines(records, tmp_path, 75.0, first_step=1)
    assert lines[0] == ("trained to step 4: 4,000 tokens, 3,000 of them now, in 1m15s, 200 tokens/s, MFU 20.0%, "
                        "4.0% of assignments dropped (medians)")  # fmt: skip
    assert "4,000 tokens, 1,000 of them now, in" in summary_lines(records, tmp_path, 75.0, first_step=3)[0]
    assert lines[1] == "loss 8.000 -> 2.000, validation 4.500 (2.250 bits per byte)"
    assert lines[2].startswith(str(tmp_path)) and "generate" in lines[3]
    records.insert(3, {**make_record(3, None), "skipped": True})
    assert summary_lines(records, tmp_path, 1.0)[1].endswith("1 step skipped as not finite")
    pooled = summary_lines([{**make_record(1), "drop_rate_alone": 0.125}], tmp_path, 1.0)[0]
    assert pooled.endswith("5.0% of assignments dropped, 12.5% without the global router (medians)")
    assert len(summary_lines([], tmp_path, 1.0)) == 3


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_live_console_is_one_line_without_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    console = RunConsole(stream=stream, line_interval=2)
    for step in (1, 2):
        console.update({"step": step, "tokens": 100 * step, "loss": 5.5, "lr": 1e-3, "grad_norm": 1.0,
                        "tokens_per_s": 4000.0, "mfu": 0.2, "drop_rate": 0.01}, 10, 1000)  # fmt: skip
        console.note("[bold]saved[/bold] somewhere")
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")
    shown = [line for line in text.split("\n") if line.strip()]
    assert "[dim]" not in text and shown.count("[bold]saved[/bold] somewhere") == 2
    live = [line for line in shown if line.startswith("step 2/10")]
    assert live and all(len(line) <= 80 and "left 0s" in line for line in live)
