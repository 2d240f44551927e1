"""Verification of a checkpoint's bytes against its manifest: by one process, or by all ranks, each a share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist

from mmtrain.checkpoint.manifest import MANIFEST, BadManifest, Manifest, file_sum, is_shard, read_manifest


def has_checksums(checkpoint: Path) -> bool:
    """Tell whether a checkpoint has a manifest; those of before manifests have none."""
    return (checkpoint / MANIFEST).is_file()


def size_of(checkpoint: Path) -> int:
    """Return the bytes of all files that a checkpoint's manifest lists.

    Raises:
        OSError: it cannot be read.
        BadManifest: it is damaged.
    """
    return sum(one.size for one in read_manifest(checkpoint).files.values())


def shards_of(manifest: Manifest) -> list[str]:
    """Return the names of the files of tensors, those of rank 0 first."""
    names = (name for name in manifest.files if is_shard(name))
    return sorted(names, key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))


def changed_file(
    checkpoint: Path, manifest: Manifest, names: Iterable[str], told: Callable[[int], None] | None = None
) -> str | None:
    """Read files whole and return what is wrong with the first that is not as its manifest says; None if all are.

    Args:
        checkpoint: folder of the checkpoint.
        manifest: of it.
        names: the files to read, all of the manifest.
        told: called with the bytes of each block that was read, for a progress bar.
    """
    for name in names:
        path, listed = checkpoint / name, manifest.files[name]
        try:
            found = file_sum(path, told)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if found.size != listed.size:
            return f"{path} has {found.size:,} of {listed.size:,} bytes"
        if found.checksum != listed.checksum:
            return f"{path} is not what was saved: its checksum differs from {MANIFEST}"
    return None


def damage_of_tensors(checkpoint: Path, told: Callable[[int], None] | None = None) -> str | None:
    """Return which file of tensors is damaged, and how; None if all are whole, or the checkpoint has no checksums.

    With a process group this is collective: each rank reads its share of the files, that of its own number first, so
    that every byte is read once, mostly by the rank that wrote it and will load it; all ranks return the same.

    Args:
        checkpoint: folder of a checkpoint without damage that shows without a look at its tensors (`damage_of`).
        told: called with the bytes of each block that this rank has read.
    """
    together = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    found = _damage_of_share(checkpoint, rank, world, told)
    if not together:
        return found
    answers: list[str | None] = [None] * world
    dist.all_gather_object(answers, found)
    return next((damage for damage in answers if damage is not None), None)


def _damage_of_share(checkpoint: Path, rank: int, world: int, told: Callable[[int], None] | None) -> str | None:
    if not has_checksums(checkpoint):
        return None
    try:
        manifest = read_manifest(checkpoint)
    except OSError as error:
        return f"{checkpoint / MANIFEST} cannot be read ({error.strerror})"
    except BadManifest as error:
        return f"{checkpoint / MANIFEST} {error}"
    return changed_file(checkpoint, manifest, shards_of(manifest)[rank::world], told)
