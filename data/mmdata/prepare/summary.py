"""The three lines that end a run of launch/prepare.py."""

from __future__ import annotations

from pathlib import Path

from mmdata.corpus.manifest import Manifest
from mmdata.prepare.next_command import next_command
from mmdata.prepare.skips import WAYS_ON

_NAMES_SHOWN = 3


def summary(manifest: Manifest, output: Path, script: str = "launch/pretrain.py") -> str:
    """Three lines: the counts of each split, the files left out and why, the folder and the next command.

    `script` is how torchrun is told to train (see `next_command`).
    """
    return "\n".join([_counts(manifest), skipped_line(manifest), _next(manifest, output, script)])


def _counts(manifest: Manifest) -> str:
    parts = [
        f"{name} {split.documents:,} documents, {split.bytes / 1e6:,.1f} MB, {split.tokens:,} tokens"
        for name, split in manifest.splits.items()
    ]
    if "valid" not in manifest.splits:
        parts.append("nothing held out")
    kind = {"bytes": "bytes", "trained": "BPE trained here", "file": "the tokenizer given"}[manifest.tokenizer["kind"]]
    return f"{'; '.join(parts)} ({kind}, vocabulary {manifest.vocab_size:,}, {manifest.dtype})"


def skipped_line(manifest: Manifest) -> str:
    """What was left out and why, in one line."""
    if not manifest.skipped:
        return "skipped nothing"
    total = sum(entry["count"] for entry in manifest.skipped.values())
    parts = []
    for reason, entry in manifest.skipped.items():
        names = [_short(name) for name in entry["names"][:_NAMES_SHOWN]]
        if entry["count"] > len(names):
            names.append(f"{entry['count'] - len(names)} more in manifest.json")
        if fields := entry.get("fields"):
            names.append(f"fields with text: {', '.join(fields)}: --text-field {fields[0]}")
        if way := WAYS_ON.get(reason):
            names.append(way)
        parts.append(f"{reason} {entry['count']} ({', '.join(names)})")
    return f"skipped {total}: {'; '.join(parts)}"


def _short(name: str) -> str:
    """The last two components of a path: enough to know the file by."""
    return "/".join(name.split("/")[-2:]) if name.startswith("/") else name


def _next(manifest: Manifest, output: Path, script: str) -> str:
    return f"written to {output}; next: {next_command(manifest, output, script)}"
