"""Files and folders that are on the disk, not only in the kernel's hands, when the call returns."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file under its name in one piece: a crash or a full disk leaves what was there before.

    Raises:
        OSError: it cannot be written; nothing half-written is left.
    """
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Bring a file that another call wrote to the disk.

    Raises:
        OSError: it cannot be read, or brought there.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Bring a folder's list of names to the disk; file systems that know no such thing are let be."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
