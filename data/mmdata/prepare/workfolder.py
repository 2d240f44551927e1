"""The output folder of a run: whether it is free, who works there, and how files get their final names."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmdata.corpus.manifest import NAME, Manifest, read_manifest
from mmdata.corpus.writer import fsync
from mmdata.errors import DataError
from mmdata.images.table import SHARED, side_names
from mmdata.prepare.pool import WorkerDied

PARTIAL = ".partial"
_IMAGES = [*SHARED, *side_names("train"), *side_names("valid")]  # of a corpus with images only
FINAL_NAMES = ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json", *_IMAGES, NAME)


@dataclass(frozen=True)
class Prepared:
    """The outcome: the manifest, and whether all the work had been done before."""

    manifest: Manifest
    reused: bool


def make_corpus(output: Path, request: str, force: bool, build: Callable[[Path], Manifest]) -> Prepared:
    """Make a corpus folder, going on from an interrupted run of the same request.

    Args:
        output: the corpus folder.
        request: fingerprint of all that decides the result.
        force: replace what `output` holds.
        build: makes all files in the folder that it is given, and returns their manifest. A worker that dies, and
            Ctrl-C, leave what is done for the next run; another DataError does not.

    Raises:
        DataError: the folder holds something else, or `build` raised it.
    """
    if not force and (done := finished(output, request)):
        return Prepared(done, reused=True)
    fresh = not output.exists()
    with work_folder(output, request, force) as partial:
        try:
            manifest = build(partial)
        except WorkerDied:
            raise
        except DataError:  # nothing that a second run could go on from
            shutil.rmtree(partial)
            if fresh:
                output.rmdir()
            raise
        publish(partial, output)
    return Prepared(manifest, reused=False)


def finished(output: Path, request: str) -> Manifest | None:
    """Manifest of a finished run of this very request; None if nothing is in the way of a new run.

    Raises:
        DataError: the folder holds another corpus, files that we did not write, or a damaged result.
    """
    if not (output / NAME).exists():
        if (taken := [n for n in FINAL_NAMES if (output / n).exists()]) and not (output / PARTIAL).exists():
            raise DataError(f"--output {output} already holds {taken[0]}: choose another folder, or --force to replace")
        return None
    manifest = read_manifest(output)
    if manifest.request != request:
        raise DataError(
            f"--output {output} holds a corpus made from other inputs or options, or by another version: "
            "choose another folder, or --force to replace it"
        )
    for split in manifest.splits.values():
        for name, facts in split.files.items():
            if not (output / name).is_file() or (output / name).stat().st_size != facts["bytes"]:
                raise DataError(f"{output / name} is not as the manifest says: prepare again with --force")
    return manifest


@contextmanager
def work_folder(output: Path, request: str, force: bool) -> Iterator[Path]:
    """Lock `output/.partial` and yield it; it is known to belong to this request (`force` empties another's).

    Raises:
        DataError: another process works there, or another request was left unfinished.
    """
    partial = output / PARTIAL
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / "lock", "w", encoding="utf-8")  # noqa: SIM115 (held until the end of the block)
    except OSError as error:
        raise DataError(f"--output {output} cannot be written ({error.strerror}): choose another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"--output {output} is being written by another process: wait for it to end") from None
        owner = partial / "request"
        if owner.exists() and owner.read_text(encoding="utf-8") != request:
            if not force:
                raise DataError(
                    f"--output {output} holds an unfinished run with other inputs or options: "
                    "repeat that command, choose another folder, or --force to drop it"
                )
            for entry in partial.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        owner.write_text(request, encoding="utf-8")
        yield partial


def publish(partial: Path, output: Path) -> None:
    """Rename the finished files to their final names, the manifest last, and drop the work folder."""
    (output / NAME).unlink(missing_ok=True)  # while names change hands there is no manifest to vouch for them
    for name in FINAL_NAMES[:-1]:
        if (partial / name).exists():
            os.replace(partial / name, output / name)
        else:
            (output / name).unlink(missing_ok=True)  # a forced run may replace a corpus that had more files
    fsync(output)
    os.replace(partial / NAME, output / NAME)
    fsync(output)
    shutil.rmtree(partial)
