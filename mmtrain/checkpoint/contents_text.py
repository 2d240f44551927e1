"""Text of what is in a checkpoint, and of what two of them differ in, for a terminal."""

from __future__ import annotations

from typing import Any

KINDS = ("weights", "exp_avg", "exp_avg_sq")


def contents_lines(found: dict[str, Any]) -> list[str]:
    """Return the lines that tell `contents.contents`."""
    files = found["files"]
    lines = [
        found["path"],
        f"  step        {found['step']:,}, {found['tokens']:,} tokens, phase {found['phase']}",
        f"  layout      {found['layout']}",
    ]
    if "parameters" in found:
        lines.append(f"  parameters  {found['parameters']:,} in {', '.join(found['dtypes'])}")
    shards = f"{files['shards']} of them shards" if files["shards"] != 1 else "one of them a shard"
    lines += [
        f"  files       {files['count']}, {shards}, {readable(files['bytes'])}, format {found['format']}",
        f"  integrity   {found['integrity']}: {found['integrity_line']}",
    ]
    if "norms" in found:
        lines += ["", *_table("norm", found["norms"])]
    return lines


def difference_lines(found: dict[str, Any]) -> list[str]:
    """Return the lines that tell `contents.difference`."""
    lines = [f"a  {found['paths'][0]}", f"b  {found['paths'][1]}"]
    lines += [f"  {name:<7} {_word(old)} -> {_word(new)}" for name, (old, new) in found["position"].items()]
    lines.append(f"{len(found['options'])} options differ" if found["options"] else "no option differs")
    lines += [f"  {name}  {_word(old)} -> {_word(new)}" for name, (old, new) in found["options"].items()]
    for key, where in (("only_in_first", "a"), ("only_in_second", "b")):
        lines += [f"only in {where}: {name}" for name in found[key]]
    lines += [f"shape of {name}: {tuple(old)} -> {tuple(new)}" for name, (old, new) in found["shapes"].items()]
    if "relative_difference" in found:
        lines += ["", *_table("|a - b| / |a|", found["relative_difference"])]
    return lines


def readable(size: int) -> str:
    """Return a number of bytes as a person reads it: "22.1 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def _table(title: str, rows: dict[str, dict[str, float | None]]) -> list[str]:
    width = max([len(title), *map(len, rows)])
    kinds = [kind for kind in KINDS if any(kind in row for row in rows.values())]
    lines = ["  ".join([f"{title:<{width}}", *(f"{kind:>11}" for kind in kinds)])]
    for layer, row in rows.items():
        lines.append("  ".join([f"{layer:<{width}}", *(f"{_number(row, kind):>11}" for kind in kinds)]).rstrip())
    return lines


def _number(row: dict[str, float | None], kind: str) -> str:
    if kind not in row:
        return ""
    value = row[kind]
    return "from zero" if value is None else f"{value:.4g}"


def _word(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)
