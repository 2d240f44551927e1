"""Record of the corpora that a run trains on, and its comparison with the corpora at hand when a run is resumed.

The record is what `RunInputs.fingerprints` returns. It stands in the run folder (`corpora.json`) and, as ``corpora``,
in the record of every checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdata.corpus.fingerprint import difference
from mmdata.tokenizer_identity import TokenizerIdentity
from mmtrain.checkpoint.durable import write_text
from mmtrain.errors import ConfigError

FILE_NAME = "corpora.json"
ENTRY = "corpora"  # of a checkpoint's record
_OVERRIDE = "data.allow_changed=true"


def write_corpora(folder: Path, fingerprints: Mapping[str, Any]) -> None:
    """Write the record into a run folder; on the main process only."""
    write_text(folder / FILE_NAME, json.dumps(fingerprints, indent=1) + "\n")


def check_same_corpora(
    checkpoint: Path, meta: Mapping[str, Any], now: Mapping[str, Any], allow_changed: bool
) -> list[str]:
    """Refuse to resume on corpora that are not those of the checkpoint; return a line for each that was moved.

    A corpus at another path with the same fingerprint is the same corpus. A checkpoint without a record of its corpora
    (written before there was one) vouches for paths alone.

    Args:
        checkpoint: folder of the checkpoint, for messages.
        meta: its record.
        now: `RunInputs.fingerprints` of this launch.
        allow_changed: go on all the same; the changes are among the lines that are returned.

    Raises:
        ConfigError: naming the corpus, what changed, and the option that overrides.
    """
    lines = []
    for source, problem in _changes(checkpoint, meta, now, lines):
        if not allow_changed:
            raise ConfigError(source["option"], source["path"], problem, f"restore it, or give {_OVERRIDE}")
        lines.append(f"{source['option']}={source['path']}: {problem}; going on all the same ({_OVERRIDE})")
    return lines


def check_same_tokenizer(
    option: str, checkpoint: Path, meta: Mapping[str, Any], now: Mapping[str, Any], allow_changed: bool
) -> list[str]:
    """Refuse weights that were trained with another tokenizer than this launch's.

    Args:
        option: the option that names the checkpoint.
        checkpoint: its folder, for messages.
        meta: its record.
        now: `RunInputs.fingerprints` of this launch.
        allow_changed: go on all the same, with a line that says so.

    Raises:
        ConfigError: naming both tokenizers.
    """
    problem = _other_tokenizer(checkpoint, meta.get(ENTRY), now)
    if problem is None:
        return []
    if not allow_changed:
        raise ConfigError(option, checkpoint, problem, f"take its tokenizer and corpora made with it, or {_OVERRIDE}")
    return [f"{option}={checkpoint}: {problem}; going on all the same ({_OVERRIDE})"]


def _changes(
    checkpoint: Path, meta: Mapping[str, Any], now: Mapping[str, Any], lines: list[str]
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each source of this launch that is not the checkpoint's, and what is wrong with it."""
    recorded = meta.get(ENTRY)
    if recorded is None:
        yield from _other_paths(checkpoint, meta.get("config", {}), now)
        return
    before = {_place(source): source for source in recorded["sources"]}
    problem = _other_tokenizer(checkpoint, recorded, now)
    if problem is not None:
        yield now["sources"][0], problem
    for source in now["sources"]:
        old = before.get(_place(source))
        if old is None:
            yield source, f"{checkpoint} was trained without this corpus"
            continue
        train, valid = (difference(old[side], source[side]) for side in ("train", "valid"))
        if train is not None:
            yield source, f"it has changed since {checkpoint}: {train}"
        elif valid is not None:
            yield source, f"its held-out part has changed since {checkpoint}: {valid}"
        elif old["resolved"] != source["resolved"]:
            lines.append(f"{source['option']}={source['path']}: the corpus that was at {old['resolved']}")


def _other_paths(
    checkpoint: Path, config: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each source that lies elsewhere than the recorded configuration says."""
    before = _recorded_paths(config)
    for source in now["sources"]:
        old = before.get(_place(source))
        if old is not None and Path(old).resolve() != Path(source["path"]).resolve():
            yield source, f"{checkpoint} was trained on {old}, and it has no fingerprint to know a moved corpus by"
    old, given = config.get("data", {}).get("tokenizer"), now["tokenizer_given"]
    if old != given and "data" in config:
        yield (
            {"option": "data.tokenizer", "path": given},
            f"{checkpoint} was trained with {old}, and it has no hash to know a moved tokenizer by",
        )


def _recorded_paths(config: Mapping[str, Any]) -> dict[str, str]:
    data, stage = config.get("data", {}), config.get("stage", {})
    found = {f"data.sources[{i}].path": source["path"] for i, source in enumerate(data.get("sources") or [])}
    if data.get("path"):
        found["data.sources[0].path"] = data["path"]
    for i, phase in enumerate(stage.get("phases") or []):
        for j, source in enumerate(phase.get("sources") or []):
            found[f"stage.phases[{i}].sources[{j}].path"] = source["path"]
    return found


def _place(source: Mapping[str, Any]) -> str:
    """Return where a source stands: `data.path` is short for the only one of `data.sources`."""
    return "data.sources[0].path" if source["option"] == "data.path" else source["option"]


def _other_tokenizer(checkpoint: Path, recorded: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    if recorded is None:
        return None
    before, this = (TokenizerIdentity(**record["tokenizer"]) for record in (recorded, now))
    return None if this.same_as(before) else f"{checkpoint} was trained with {before}, this launch's is {this}"
