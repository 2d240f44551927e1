"""Log-probabilities of a run's pairs under its reference, on disk in parts, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdata.corpus.fingerprint import digest_of, file_facts
from mmtrain.checkpoint.durable import write_text
from mmtrain.checkpoint.manifest import MANIFEST, our_files, read_manifest
from mmtrain.train.pairs import LogProbs

FOLDER, RECORD = "reference", "reference.json"


def fingerprint_of(checkpoint: Path) -> str:
    """Return what tells a checkpoint's contents from another's, wherever it lies: of a manifest's checksums, else of
    the sizes and samples of its files.

    Args:
        checkpoint: ours, or a Hugging Face folder.

    Raises:
        OSError: a file cannot be read.
        BadManifest: the manifest is damaged.
    """
    if (checkpoint / MANIFEST).is_file():
        return digest_of({name: one.checksum for name, one in read_manifest(checkpoint).files.items()})[:32]
    files = our_files(checkpoint) or sorted(path.name for path in checkpoint.glob("*.safetensors"))
    return digest_of({name: file_facts(checkpoint / name) for name in files})[:32]


@dataclass(frozen=True)
class ReferenceStore:
    """The folder ``reference`` of a run: a record of what the numbers are of, and parts of them.

    Only the main process writes and reads it.

    Attributes:
        folder: the store's.
        identity: what the numbers follow from, as JSON; ``checkpoint`` is the fingerprint of the reference.
        parts: their number.
    """

    folder: Path
    identity: Mapping[str, Any]
    parts: int

    def difference(self) -> str | None:
        """Name the first entry in which the folder is of something else; None where it is not, or holds nothing."""
        found = recorded(self.folder)
        if found is None:
            return None
        return next((name for name in {**self.identity, **found} if found.get(name) != self.identity.get(name)), None)

    def open(self) -> None:
        """Make the folder and its record.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / RECORD, json.dumps(dict(self.identity), indent=1) + "\n")

    def missing(self) -> list[int]:
        """Return the parts that are not there, or damaged."""
        return [part for part in range(self.parts) if self._part(part) is None]

    def write(self, part: int, log_probs: Mapping[str, LogProbs | None]) -> None:
        """Write a part.

        Raises:
            OSError: it cannot be written.
        """
        pairs = {name: log_probs[name] for name in sorted(log_probs)}
        write_text(self._path(part), json.dumps({"pairs": pairs, "sum": _sum(pairs)}) + "\n")

    def read(self) -> dict[str, LogProbs | None]:
        """Return the log-probabilities of all parts, which must be there."""
        found: dict[str, LogProbs | None] = {}
        for part in range(self.parts):
            pairs = self._part(part)
            assert pairs is not None
            found |= {name: None if one is None else (one[0], one[1]) for name, one in pairs.items()}
        return found

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.json"

    def _part(self, part: int) -> dict[str, Any] | None:
        try:
            made = json.loads(self._path(part).read_text(encoding="utf-8"))
            return made["pairs"] if made["sum"] == _sum(made["pairs"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def recorded(folder: Path) -> dict[str, Any] | None:
    """Return the record of a store; None where there is none, or it cannot be read."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sum(pairs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(pairs, sort_keys=True).encode()).hexdigest()
