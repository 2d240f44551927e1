"""Fingerprint of a corpus: cheap facts by which a later launch tells that the same corpus is there, wherever it lies.

Taken are: the numbers of documents and tokens; the size of each file; a hash of each file's content, or where the file
is larger than 16 MiB, of 64 blocks of 64 KiB spread evenly over it (first and last among them); and the SHA-256 of the
whole files where a manifest records it. So it reads at most 32 MiB of a corpus of any size, and a corpus that was moved
has the fingerprint it had. A change that keeps every size and lies between the blocks is seen only by a manifest that
changed with it; in a large `.idx`, though, a changed document length shifts all positions after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WHOLE_BYTES = 16 << 20  # files up to this size are hashed as a whole
_BLOCKS, _BLOCK_BYTES = 64, 64 << 10


def file_facts(path: Path) -> dict[str, Any]:
    """Size of a file and a hash of samples of its content: ``{"bytes", "sample"}``.

    Raises:
        OSError: the file cannot be read.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as stream:
        if size <= WHOLE_BYTES:
            digest.update(stream.read())
        else:
            for block in range(_BLOCKS):
                stream.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return {"bytes": size, "sample": digest.hexdigest()}


def digest_of(fingerprint: Mapping[str, Any] | None) -> str:
    """One hex digest for a fingerprint, to use as a key."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def difference(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str | None:
    """Say in a few words what changed between two fingerprints of a corpus, None where nothing did.

    Facts that only one of them has (a manifest that was added or removed) are not compared.
    """
    if before is None or now is None:
        return None if before is now else f"it {'is gone' if now is None else 'was not there before'}"
    found = [
        f"{name} {before[name]:,} -> {now[name]:,}"
        for name in ("documents", "tokens")
        if name in before and name in now and before[name] != now[name]
    ]
    content = _changed_content(before.get("files", {}), now.get("files", {}))
    return ", ".join([*found, *([content] if content else [])]) or None


def _changed_content(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """First file whose size, or else hash, differs."""
    for kind in sorted(before.keys() & now.keys()):
        for fact, name in (("bytes", "bytes"), ("sha256", "sha256"), ("sample", "hash of samples")):
            old, new = before[kind].get(fact), now[kind].get(fact)
            if old is not None and new is not None and old != new:
                shown = (f"{old:,}", f"{new:,}") if fact == "bytes" else (str(old)[:12], str(new)[:12])
                return f"{kind} {name} {shown[0]} -> {shown[1]}"
    return None
