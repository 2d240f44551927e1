"""The lines that end a run of launch/prepare_images.py."""

from __future__ import annotations

from mmdata.corpus.manifest import Manifest
from mmdata.prepare.summary import skipped_line


def image_summary(manifest: Manifest, output: str) -> str:
    """Four lines: the counts of each split, the images, the records left out and why, the folder."""
    images = manifest.images or {}
    total = sum(split.tokens for split in manifest.splits.values())
    parts = [
        f"{name} {split.documents:,} documents, {split.tokens:,} tokens" for name, split in manifest.splits.items()
    ]
    formats = ", ".join(f"{name} {count:,}" for name, count in images["formats"].items()) or "none"
    width, height = images["largest"]
    return "\n".join([
        f"{'; '.join(parts)} (vocabulary {manifest.vocab_size:,}, images are token {images['token']})",
        f"{images['count']:,} images ({formats}; up to {width} x {height} pixels, {images['turned']:,} turned by EXIF)"
        f", {images['tokens']:,} of {total:,} tokens",
        skipped_line(manifest),
        f"written to {output}; train on it with data.path={output}",
    ])  # fmt: skip
