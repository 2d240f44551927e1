"""Merging of finished shards into `train` and `valid` corpora, in shard order.

The split is chosen over all documents at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mmdata.corpus.manifest import SplitInfo, sha256_file
from mmdata.corpus.split import held_out
from mmdata.corpus.writer import CorpusWriter
from mmdata.errors import DataError
from mmdata.prepare.shards import Shard, ShardTask, open_shard
from mmdata.prepare.skips import SkipLog

SPLITS = ("train", "valid")


def merge_shards(
    tasks: Sequence[ShardTask], folder: Path, dtype: np.dtype, valid_fraction: float
) -> tuple[dict[str, SplitInfo], SkipLog]:
    """Write `folder/train.bin/.idx` and, if any document is held out, `folder/valid.bin/.idx`.

    Returns the manifest's facts about each split that was written, and the skips of all shards.

    Raises:
        DataError: there is no document at all.
    """
    shards = [open_shard(task) for task in tasks]
    skips = SkipLog()
    for shard in shards:
        skips.merge(shard.skips)
    facts = np.concatenate([shard.facts for shard in shards])
    if len(facts) == 0:
        reasons = skips.reasons() or "nothing was read"
        raise DataError(f"the corpus is empty: no usable document in --input ({reasons})")
    valid = held_out(facts[:, 1], facts[:, 0], valid_fraction)
    chosen = {name: valid if name == "valid" else ~valid for name in SPLITS[: 2 if valid.any() else 1]}
    largest = _write(shards, valid, folder, dtype, list(chosen))
    splits = {}
    for name, mask in chosen.items():
        tokens, text_bytes = int(facts[mask, 0].sum()), int(facts[mask, 2].sum())
        paths = [folder / f"{name}.bin", folder / f"{name}.idx"]
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in paths}
        splits[name] = SplitInfo(int(mask.sum()), text_bytes, tokens, largest[name], files)
    return splits, skips


def _write(
    shards: Sequence[Shard], valid: np.ndarray, folder: Path, dtype: np.dtype, names: Sequence[str]
) -> dict[str, int]:
    """Write every document to its side; returns the largest token id of each split."""
    largest = dict.fromkeys(names, 0)
    with ExitStack() as stack:
        writers = {name: stack.enter_context(CorpusWriter(folder / name, dtype)) for name in names}
        document = 0
        for shard in shards:
            start = 0
            for length in shard.facts[:, 0].tolist():
                name = SPLITS[int(valid[document])]
                tokens = shard.tokens[start : start + length]
                writers[name].add(tokens)
                largest[name] = max(largest[name], int(tokens.max()))
                start, document = start + length, document + 1
    return largest
