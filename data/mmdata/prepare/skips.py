"""What was left out of a corpus and why, kept in bounded memory however much it is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmdata.corpus.manifest import NAMES_KEPT

FIELDS_KEPT = 20  # names of fields told, for each reason

# The way to go on from each reason, for those where there is one.
WAYS_ON = {
    "archive": "unpack it and give the folder",
    "table": "convert it to .jsonl or .parquet; --suffix .csv takes it as plain text",
    "not UTF-8": "convert it: iconv -f LATIN1 -t UTF-8",
    "bad JSON line": "each line must be one JSON object",
    "folder that cannot be read": "see its permissions",
    "unreadable": "see its permissions",
}


class Skip(NamedTuple):
    """A document or file left out.

    Attributes:
        reason: "not UTF-8", "empty", ...
        where: file, with the line where there is one.
        fields: for a record without the text field, the fields that hold text there, with their size.
    """

    reason: str
    where: str
    fields: tuple[tuple[str, int], ...] = ()


@dataclass
class _Reason:
    count: int = 0
    names: list[str] = field(default_factory=list)
    fields: dict[str, int] = field(default_factory=dict)


class SkipLog:
    """Counts of skips by reason, with the first `NAMES_KEPT` places of each in the order of their names."""

    def __init__(self, skips: Iterable[Skip] = ()) -> None:
        self._reasons: dict[str, _Reason] = {}
        for skip in skips:
            self.add(skip)

    def __bool__(self) -> bool:
        return bool(self._reasons)

    def add(self, skip: Skip) -> None:
        """Count one skip."""
        self._put(skip.reason, 1, [skip.where], dict(skip.fields))

    def merge(self, other: SkipLog) -> None:
        """Count all that `other` counted."""
        for reason, entry in other._reasons.items():
            self._put(reason, entry.count, entry.names, entry.fields)

    def _put(self, reason: str, count: int, names: list[str], fields: dict[str, int]) -> None:
        entry = self._reasons.setdefault(reason, _Reason())
        entry.count += count
        entry.names += names
        if len(entry.names) > 2 * NAMES_KEPT:
            entry.names = sorted(entry.names)[:NAMES_KEPT]
        for name, size in fields.items():
            if name in entry.fields or len(entry.fields) < FIELDS_KEPT:
                entry.fields[name] = entry.fields.get(name, 0) + size

    def facts(self) -> dict[str, dict[str, Any]]:
        """`{reason: {"count", "names"}}` for the manifest, and "fields" (most text first) where some were seen."""
        told = {}
        for reason, entry in sorted(self._reasons.items()):
            told[reason] = {"count": entry.count, "names": sorted(entry.names)[:NAMES_KEPT]}
            if entry.fields:
                told[reason]["fields"] = sorted(entry.fields, key=lambda name: (-entry.fields[name], name))
        return told

    def reasons(self) -> str:
        """All reasons with their counts, and the option that reads the fields seen, in one line."""
        facts = self.facts()
        parts = [f"{reason}: {entry['count']:,}" for reason, entry in facts.items()]
        fields = next((entry["fields"] for entry in facts.values() if "fields" in entry), [])
        hint = [f"fields that hold text there: {', '.join(fields)}; try --text-field {fields[0]}"] if fields else []
        return "; ".join([", ".join(parts), *hint])

    def dump(self) -> str:
        """JSON from which `load` makes an equal log."""
        return json.dumps({name: [e.count, e.names, e.fields] for name, e in self._reasons.items()})

    @classmethod
    def load(cls, text: str) -> SkipLog:
        """Read what `dump` wrote."""
        log = cls()
        for reason, (count, names, fields) in json.loads(text).items():
            log._put(reason, count, names, fields)
        return log
