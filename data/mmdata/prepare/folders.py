"""Finding the files below folders, symbolic links followed, with nothing passed over in silence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmdata.prepare.skips import Skip


def find_files(folders: Sequence[Path], exclude: Path | None = None) -> tuple[list[str], list[Skip]]:
    """Absolute paths of everything that is no folder below `folders`; and what was passed over.

    Passed over are hidden entries, `__pycache__`, folders that cannot be read, and links to folders that are read
    under another name, which ends loops. Folders that are reached without links come first. `exclude` is a folder left
    out.
    """
    walk = _Walk(os.path.realpath(exclude) if exclude is not None else None)
    for folder in folders:
        walk.read(os.path.abspath(folder))
    walk.follow_links()
    return walk.files, walk.skips


class _Walk:
    def __init__(self, exclude: str | None) -> None:
        self.files: list[str] = []
        self.skips: list[Skip] = []
        self._seen = set() if exclude is None else {exclude}  # real paths
        self._exclude = exclude
        self._links: list[str] = []

    def read(self, folder: str) -> bool:
        """Take all files below a folder, links to folders left for later; False if it was read before."""
        if (real := os.path.realpath(folder)) in self._seen:
            return False
        self._seen.add(real)
        left = [folder]
        while left:
            here = left.pop()
            try:
                entries = sorted(os.scandir(here), key=lambda entry: entry.name)
            except OSError as error:
                self.skips.append(Skip("folder that cannot be read", f"{here} ({error.strerror})"))
                continue
            left += [entry.path for entry in entries if self._take(entry)]
        return True

    def follow_links(self) -> None:
        """Read the folders that links point to, each once."""
        while self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                if not self.read(link) and os.path.realpath(link) != self._exclude:
                    self.skips.append(Skip("link to a folder that is read", link))

    def _take(self, entry: os.DirEntry[str]) -> bool:
        """Note an entry of a folder; whether it is a folder to go into."""
        if entry.name.startswith(".") or entry.name == "__pycache__":
            if os.path.realpath(entry.path) != self._exclude:
                self.skips.append(Skip("hidden or cache", entry.path))
        elif not _is_folder(entry):
            self.files.append(entry.path)
        elif entry.is_symlink():
            self._links.append(entry.path)
        elif (real := os.path.realpath(entry.path)) not in self._seen:
            self._seen.add(real)
            return True
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
