"""What is in a checkpoint, and in what two of them differ, as plain data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.manifest import is_shard
from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.recorded_options import NOTHING, flat_options
from mmtrain.checkpoint.tensors import StoredTensors, place_in_model, square_sum
from mmtrain.checkpoint.verify import damage_of_tensors, has_checksums

Told = Callable[[int], None]
AXES = ("pp", "dp", "cp", "tp", "edp", "ep", "etp")


def integrity(checkpoint: Path, quick: bool, told: Told | None = None) -> tuple[str, str]:
    """Return what is known of a checkpoint's integrity: "whole", "damaged", "unverified", and a line on it.

    Args:
        checkpoint: its folder.
        quick: look at names, sizes and small files alone.
        told: called with bytes that were read, for a progress bar.
    """
    if (damage := damage_of(checkpoint)) is not None:
        return "damaged", damage
    if not has_checksums(checkpoint):
        return "unverified", "of before checksums; its files are there and as long as they should be"
    if quick:
        return "unverified", "files are there and as long as they should be; tensors were not read"
    damage = damage_of_tensors(checkpoint, told)
    return ("whole", "every file is what was saved") if damage is None else ("damaged", damage)


def contents(checkpoint: Path, quick: bool, told: Told | None = None) -> dict[str, Any]:
    """Return what is in a checkpoint, for a table or as JSON.

    Args:
        checkpoint: its folder; its record is whole.
        quick: read no tensors: no norms, and integrity by names and sizes.
        told: called with bytes that were read, for a progress bar.

    Raises:
        ConfigError: its tensors are damaged in a way that only shows as they are read.
    """
    meta = read_meta(checkpoint)
    state, line = integrity(checkpoint, quick, told)
    found: dict[str, Any] = {
        "path": str(checkpoint),
        "format": meta.get("format", 1),
        "step": meta["step"],
        "tokens": meta["tokens"],
        "phase": _phase(meta),
        "layout": _layout(meta),
        "files": _sizes(checkpoint),
        "integrity": state,
        "integrity_line": line,
    }
    if state == "damaged":
        return found
    tensors = StoredTensors(checkpoint)
    sizes = {name: math.prod(shape) for name, shape in tensors.shapes.items()}
    found["parameters"] = sum(size for name, size in sizes.items() if name.startswith("model."))
    found["dtypes"] = sorted({str(tensors.dtype(n)).removeprefix("torch.") for n in sizes if n.startswith("model.")})
    if not quick:
        found["norms"] = _norms(tensors, told)
    return found


def difference(before: Path, now: Path, quick: bool, told: Told | None = None) -> dict[str, Any]:
    """Return in what two checkpoints differ: options, position, tensors of other shapes, values by layer.

    Values differ by the norm of the difference over the norm of the first, for weights and for each moment.

    Args:
        before: folder of a checkpoint whose record is whole.
        now: folder of another.
        quick: compare no values.
        told: called with bytes that were read, for a progress bar.

    Raises:
        ConfigError: a checkpoint's tensors are damaged.
    """
    old, new = read_meta(before), read_meta(now)
    first, second = StoredTensors(before), StoredTensors(now)
    both = [name for name in first.shapes if name in second.shapes]
    found: dict[str, Any] = {
        "paths": [str(before), str(now)],
        "position": {key: [old.get(key), new.get(key)] for key in ("step", "tokens", "phase")},
        "options": _options(old["config"], new["config"]),
        "only_in_first": [name for name in first.shapes if name not in second.shapes],
        "only_in_second": [name for name in second.shapes if name not in first.shapes],
        "shapes": {n: [first.shapes[n], second.shapes[n]] for n in both if first.shapes[n] != second.shapes[n]},
    }
    if not quick:
        same = [name for name in both if name not in found["shapes"]]
        found["relative_difference"] = _relative(first, second, same, told)
    return found


def bytes_to_read(tensors: StoredTensors) -> int:
    """Return the bytes of all weights and moments."""
    return sum(tensors.bytes_of(name) for name in tensors.shapes if place_in_model(name))


def _norms(tensors: StoredTensors, told: Told | None) -> dict[str, dict[str, float]]:
    squares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name in tensors.shapes:
        if (place := place_in_model(name)) is not None:
            squares[place[0]][place[1]] += tensors.square_sum(name)
            if told is not None:
                told(tensors.bytes_of(name))
    return {layer: {kind: math.sqrt(value) for kind, value in kinds.items()} for layer, kinds in squares.items()}


def _relative(
    first: StoredTensors, second: StoredTensors, names: list[str], told: Told | None
) -> dict[str, dict[str, float | None]]:
    """Return, by layer and kind, the norm of the difference over the first's; None where that one is zero."""
    apart: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for name in names:
        if (place := place_in_model(name)) is not None:
            sums, mine = apart[place[0]][place[1]], first.whole(name)
            sums[0] += square_sum(mine, second.whole(name))
            sums[1] += square_sum(mine)
            if told is not None:
                told(first.bytes_of(name) + second.bytes_of(name))
    return {layer: {kind: _ratio(*sums) for kind, sums in kinds.items()} for layer, kinds in apart.items()}


def _ratio(apart: float, size: float) -> float | None:
    if size == 0:
        return 0.0 if apart == 0 else None
    return math.sqrt(apart / size)


def _options(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    before, now = flat_options(old, ""), flat_options(new, "")
    places = dict.fromkeys([*before, *now])
    pairs = {place: [before.get(place, NOTHING), now.get(place, NOTHING)] for place in places}
    return {place: pair for place, pair in pairs.items() if pair[0] != pair[1]}


def _phase(meta: dict[str, Any]) -> str:
    index, phases = meta.get("phase"), meta["config"].get("stage", {}).get("phases", [])
    if index is None:
        return "not recorded"
    name = phases[index].get("name") if index < len(phases) else None
    return f"{index} ({name})" if name else str(index)


def _layout(meta: dict[str, Any]) -> str:
    recorded = meta.get("layout")
    if isinstance(recorded, dict):
        return " ".join(f"{axis}={recorded.get(axis)}" for axis in AXES)
    options = meta["config"].get("parallel", {})
    return " ".join(f"{axis}={options[axis]}" for axis in AXES if axis in options) + " by its options"


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    shards = [path for path in files if is_shard(path.name)]
    return {"count": len(files), "shards": len(shards), "bytes": sum(path.stat().st_size for path in files)}
