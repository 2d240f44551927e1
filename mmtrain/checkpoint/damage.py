"""Damage of a checkpoint that its sizes and records show, found without reading its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtrain.checkpoint.metadata import FILE_NAME, BadMetadata, read_metadata
from mmtrain.checkpoint.progress import RECORD, read_meta


def damage_of(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is damaged, and how, as "PATH is missing"; None for a whole one."""
    return damage_of_record(checkpoint) or _damage_of_shards(checkpoint)


def damage_of_record(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's record alone, without a look at its shards; None if it is whole."""
    path = checkpoint / RECORD
    try:
        meta = read_meta(checkpoint)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except ValueError:
        return f"{path} is {'empty' if path.stat().st_size == 0 else 'cut short or garbage'}"
    return None if _is_record(meta) else f"{path} is not a checkpoint's record"


def _is_record(meta: Any) -> bool:
    if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
        return False
    return isinstance(meta["config"].get("model"), dict) and all(type(meta.get(n)) is int for n in ("step", "tokens"))


def _damage_of_shards(checkpoint: Path) -> str | None:
    path = checkpoint / FILE_NAME
    try:
        stored = read_metadata(checkpoint).storage_data.values()
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except BadMetadata as error:
        return f"{path} {error}"
    sizes: dict[str, int] = {}
    for entry in stored:
        sizes[entry.relative_path] = max(sizes.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, size in sorted(sizes.items()):
        shard = checkpoint / name
        if not shard.is_file():
            return f"{shard} is missing"
        if (found := shard.stat().st_size) < size:
            return f"{shard} is cut short: {found:,} of {size:,} bytes"
    return None
