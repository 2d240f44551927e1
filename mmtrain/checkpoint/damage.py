"""Damage of a checkpoint that shows without reading its tensors: in their sizes, and in all its small files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.manifest import MANIFEST, BadManifest, Manifest, our_files, read_manifest
from mmtrain.checkpoint.metadata import FILE_NAME, BadMetadata, read_metadata
from mmtrain.checkpoint.progress import FORMAT, RECORD, read_meta
from mmtrain.checkpoint.tensor_index import INDEX, BadIndex, read_index, sizes_of
from mmtrain.checkpoint.verify import changed_file, has_checksums, shards_of

_GROUPS = ("data", "optim", "parallel", "stage")
_POSITION = ("phase", "row", "phase_tokens")  # of a record that has one of them
_MOST = 1 << 62  # steps, rows and tokens


def damage_of(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is damaged, and how, as "PATH is missing"; None for a whole one.

    Flipped bits are seen in all files but those of tensors, which `verify.damage_of_tensors` reads.
    """
    return damage_of_record(checkpoint) or _damage_by_manifest(checkpoint) or _damage_of_shards(checkpoint)


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


def _damage_by_manifest(checkpoint: Path) -> str | None:
    """Compare the names and sizes of all files, and the bytes of small ones, with the manifest, if there is one."""
    path, made_by = checkpoint / MANIFEST, read_meta(checkpoint).get("format", 1)
    if type(made_by) is not int or made_by > FORMAT:
        return f"{checkpoint / RECORD} is of a later mmtrain: format {made_by}, this one reads {FORMAT} and before"
    if made_by < 2 and not has_checksums(checkpoint):
        return None
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"{path} is missing, so nothing can be verified"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except BadManifest as error:
        return f"{path} {error}"
    named = re.fullmatch(r"step-(\d{8,})", checkpoint.name)
    if named and int(named[1]) != manifest.step:
        return f"{path} is that of step {manifest.step}"
    return _other_files(checkpoint, manifest)


def _other_files(checkpoint: Path, manifest: Manifest) -> str | None:
    """Return the first file that is missing, has another size, is not listed, or is small and has other bytes."""
    shards = shards_of(manifest)
    small = [name for name in manifest.files if name not in set(shards)]
    if (changed := changed_file(checkpoint, manifest, small)) is not None:
        return changed
    for name in shards:
        file, size = checkpoint / name, manifest.files[name].size
        if not file.is_file():
            return f"{file} is missing"
        if (found := file.stat().st_size) != size:
            return f"{file} {'is cut short' if found < size else 'is too long'}: {found:,} of {size:,} bytes"
    unlisted = next((name for name in our_files(checkpoint) if name not in manifest.files), None)
    return None if unlisted is None else f"{checkpoint / unlisted} is not listed in {MANIFEST}"


def _is_record(meta: Any) -> bool:
    """Whether a record has what every reader of it takes for granted; its options are checked by who builds them."""
    config = meta.get("config") if isinstance(meta, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        return False
    groups = all(isinstance(config.get(name, {}), dict) for name in _GROUPS)
    position = ("step", "tokens", *(_POSITION if any(name in meta for name in _POSITION) else ()))
    base = meta.get("rope_base", 1)
    base_is_one = type(base) in (int, float) and 0 < base <= sys.float_info.max
    return (
        groups
        and _phases_fit(config, meta.get("phase", 0))
        and base_is_one
        and all(type(meta.get(name)) is int and 0 <= meta[name] < _MOST for name in position)
    )


def _phases_fit(config: dict[str, Any], index: Any) -> bool:
    """Whether a configuration's phases, if it has any, are groups of options, and the one at work is among them."""
    phases = config.get("stage", {}).get("phases", [])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        return False
    return type(index) is int and 0 <= index < max(1, len(phases))


def _damage_of_shards(checkpoint: Path) -> str | None:
    old = read_meta(checkpoint).get("format", 1) < 3
    path = checkpoint / (FILE_NAME if old else INDEX)
    try:
        sizes = _old_sizes(checkpoint) if old else sizes_of(read_index(checkpoint).storage_data.values())
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (BadMetadata, BadIndex) as error:
        return f"{path} {error}"
    for name, size in sorted(sizes.items()):
        shard = checkpoint / name
        if not shard.is_file():
            return f"{shard} is missing"
        if (found := shard.stat().st_size) < size:
            return f"{shard} is cut short: {found:,} of {size:,} bytes"
    return None


def _old_sizes(checkpoint: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for entry in read_metadata(checkpoint).storage_data.values():
        sizes[entry.relative_path] = max(sizes.get(entry.relative_path, 0), entry.offset + entry.length)
    return sizes
