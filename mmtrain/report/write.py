"""The report of some runs and sweeps: read, checked, and written whole or not at all."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmtrain import __version__
from mmtrain.checkpoint.durable import write_text
from mmtrain.errors import ConfigError
from mmtrain.report.page import page
from mmtrain.report.payload import run_payload
from mmtrain.report.read_run import read_run
from mmtrain.report.sweep import is_sweep, read_sweep

FILE_NAME = "report.html"
MOST_RUNS = 16
"""Runs of one page: colours and dashes tell so many apart."""


def write_report(paths: Sequence[Path], out: Path | None, note: Callable[[str], None]) -> Path:
    """Write the page of some runs and sweeps, and return its path.

    Args:
        paths: folders of runs or sweeps, each once.
        out: the file; None: `report.html` in the first folder.
        note: is told, in a line, of what was left out.

    Raises:
        ConfigError: a folder is no run's, is given twice or has recorded nothing, or the file cannot be written.
    """
    _check_once(paths)
    runs: list[dict[str, Any]] = []
    sweeps: list[dict[str, Any]] = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError("run", path, "no such folder", "give the folder of a run, runs/NAME, or of a sweep")
    target = out if out is not None else paths[0] / FILE_NAME
    _check_target(target)
    for path in paths:
        if is_sweep(path):
            sweeps.append(read_sweep(path))
            continue
        run = read_run(path)
        for name, lines in run.damaged.items():
            note(f"{path / name}: {lines} damaged {'line' if lines == 1 else 'lines'} left out")
        runs.append(run_payload(run))
    _name_apart(runs)
    _write(target, page(finite({"runs": runs, "sweeps": sweeps, "made": _made()}), _title(runs, sweeps)))
    return target


def closing_line(path: Path) -> str:
    """Return the line that says where the page is and how to open it."""
    shown = shlex.quote(str(path))
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser, needs no network: xdg-open {shown}"


def finite(value: Any) -> Any:
    """Return nested data with null in place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_once(paths: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            raise ConfigError("run", path, f"is given twice, also as {seen[path.resolve()]}", "give each run once")
        seen[path.resolve()] = path
    if len(paths) > MOST_RUNS:
        raise ConfigError("run", len(paths), f"are more runs than one page tells apart, {MOST_RUNS}", "give fewer")


def _check_target(target: Path) -> None:
    """Refuse a file that cannot be written before anything is read."""
    if target.is_dir():
        raise ConfigError("--out", target, "is a folder", f"give a file, {target / FILE_NAME}")
    if not target.parent.is_dir():
        raise ConfigError("--out", target, f"there is no folder {target.parent}", "make it, or give another file")
    if not os.access(target.parent, os.W_OK):
        raise ConfigError("--out", target, "its folder cannot be written", "give a file elsewhere: --out FILE.html")


def _write(target: Path, text: str) -> None:
    try:
        write_text(target, text)
    except OSError as error:
        raise ConfigError("--out", target, f"cannot be written: {error.strerror}",
                          "make room or give a file elsewhere: --out FILE.html") from error  # fmt: skip


def _name_apart(runs: Sequence[dict[str, Any]]) -> None:
    """Let runs of one name be called by their folders."""
    names = [run["name"] for run in runs]
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            run["name"] = run["path"]


def _title(runs: Sequence[dict[str, Any]], sweeps: Sequence[dict[str, Any]]) -> str:
    names = [one["name"] for one in (*runs, *sweeps)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") + " · mmtrain report"


def _made() -> dict[str, str]:
    return {"time": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "version": __version__}
