"""Checkpoints of a run folder: which there are, which one is taken, which ones go."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from mmtrain.checkpoint.damage import damage_of, damage_of_record
from mmtrain.checkpoint.progress import RECORD, read_meta
from mmtrain.config import CheckpointConfig
from mmtrain.errors import ConfigError

WRITING, REPLACED = ".writing", ".replaced"  # ends of names: of a checkpoint at work, and of the one it replaces
_NAME = re.compile(r"step-\d{8,}")
PHASE_END, VALID_LOSS = "phase_end", "valid_loss"  # entries of a record by which checkpoints are kept


def all_checkpoints(folder: Path) -> list[Path]:
    """Return every checkpoint below a folder of checkpoints, oldest first, damaged ones too."""
    named = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(named, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(checkpoint.name[5:])


def checkpoints_below(folder: Path) -> list[Path]:
    """Return the checkpoints that a folder is or holds: a checkpoint, a run with its branches set aside, or runs."""
    if (folder / RECORD).exists() or _NAME.fullmatch(folder.name):
        return [folder]
    runs = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    places = [folder]
    for run in runs:
        places += [run / "checkpoints", *sorted(run.glob("abandoned/*/checkpoints"))]
    return list(dict.fromkeys(found for place in places for found in all_checkpoints(place)))


def newest_checkpoint(
    option: str, path: Path, note: Callable[[str], None], check: Callable[[Path], str | None] = damage_of
) -> Path | None:
    """Return the newest whole checkpoint at or below `path`; None where there is no checkpoint at all.

    Args:
        option: the option that the path came from, for messages.
        path: a run folder, or one of its checkpoints.
        note: is told, in a line, of every damaged one that was passed over.
        check: returns what is damaged of a checkpoint, None for a whole one.

    Raises:
        ConfigError: the checkpoint that was asked for, or every one of the run, is damaged; it names the file.
    """
    if (path / RECORD).exists() or _NAME.fullmatch(path.name):
        if path.is_dir() and (damage := check(path)):
            raise ConfigError(option, path, f"damaged: {damage}", _beside(path, check))
        return path if path.is_dir() else None
    damaged = []
    for checkpoint in reversed(all_checkpoints(path / "checkpoints")):
        damage = check(checkpoint)
        if damage is None:
            for line in damaged:
                note(f"passed over a damaged checkpoint: {line}; taking {checkpoint.name}")
            return checkpoint
        damaged.append(damage)
    if damaged:
        raise ConfigError(option, path, f"holds no whole checkpoint: {damaged[0]}",
                          "take a copy of it, or start anew under another run.name")  # fmt: skip
    return None


def find_checkpoint(
    option: str, path: str | Path, note: Callable[[str], None], check: Callable[[Path], str | None] = damage_of
) -> Path:
    """Return the newest whole checkpoint at or below `path`, which must be there; see :func:`newest_checkpoint`.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    found = newest_checkpoint(option, Path(path), note, check)
    if found is None:
        raise ConfigError(option, path, "holds no complete checkpoint", "give a run folder or one of its checkpoints")
    return found


def remove_old(folder: Path, options: CheckpointConfig, written: Path | None = None) -> None:
    """Delete the checkpoints that no option keeps; on the main process only.

    Args:
        folder: the run's folder of checkpoints.
        options: which ones stay. One whose record is damaged counts for none, and goes once it is older than the newest
            `options.keep`.
        written: a checkpoint written just now, which stays whatever its number.
    """
    if not options.keep:
        return
    kept, older = 0, []
    for path in reversed(all_checkpoints(folder)):
        if path == written or kept < options.keep:
            kept += damage_of_record(path) is None
        else:
            older.append(path)
    stay = {path for path in older if options.keep_every and step_of(path) % options.keep_every == 0}
    if options.keep_phase_ends:
        stay |= {path for path in older if _recorded(path, PHASE_END) is True}
    if options.keep_best:
        losses = ((path, _recorded(path, VALID_LOSS)) for path in all_checkpoints(folder))
        best = sorted((loss, -step_of(path), path) for path, loss in losses if type(loss) in (int, float))
        stay |= {path for _, _, path in best[: options.keep_best]}
    for path in older:
        if path not in stay:
            shutil.rmtree(path)


def _recorded(path: Path, name: str) -> object:
    """Return an entry of a checkpoint's record; None where it has none, or the record is damaged."""
    return None if damage_of_record(path) else read_meta(path).get(name)


def remove_leftovers(folder: Path) -> None:
    """Clear what a kill within a save left behind; only while this launch holds the run folder's lock.

    A checkpoint that was being replaced comes back if its successor never took its name.
    """
    for path in folder.glob(f"step-*{REPLACED}"):
        name = path.with_name(path.name.removesuffix(REPLACED))
        if name.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, name)
    for path in folder.glob(f"step-*{WRITING}"):
        shutil.rmtree(path, ignore_errors=True)


def _beside(path: Path, check: Callable[[Path], str | None]) -> str:
    """Name the newest whole checkpoint beside a damaged one, for a message."""
    others = (other for other in reversed(all_checkpoints(path.parent)) if other.name != path.name)
    whole = next((other for other in others if check(other) is None), None)
    return f"give the whole one beside it, {whole}" if whole else "give another checkpoint"
