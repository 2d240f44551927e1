"""A look at the first records, so that a wrong --text-field is told before hours of reading, not after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from mmdata.prepare.collect import Source
from mmdata.prepare.kinds import looks_like_json
from mmdata.prepare.parquet import row_groups
from mmdata.prepare.skips import Skip, SkipLog
from mmdata.prepare.sources import Piece, read_piece

_FILES, _RECORDS = 4, 20
_UNSAID = {"", ".txt", ".text"}  # suffixes that promise no language


def first_look(sources: Sequence[Source], text_field: str) -> Iterator[str]:
    """Lines that warn: records without the text field, and JSON that is read as text."""
    log, usable = SkipLog(), False
    records = [source for source in sources if source.kind != "text"]
    if 2 * sum(source.size for source in records) < sum(source.size for source in sources):
        records = []  # settings that lie beside texts
    for source in records[:_FILES]:
        stop = min(row_groups(source.path), 1) if source.kind == "parquet" else source.size
        piece = Piece(source.path, source.kind, 0, stop, packed=source.packed)
        for item in islice(read_piece(piece, text_field), _RECORDS):
            if isinstance(item, Skip):
                log.add(item)
            usable = usable or not isinstance(item, Skip)
    if records and not usable:
        yield f"warning: no text in the first records of {records[0].path} and its neighbours: {log.reasons()}"
    texts = [source for source in sources if source.kind == "text" and Path(source.path).suffix.lower() in _UNSAID]
    odd = next((s.path for s in texts[:100] if looks_like_json(Path(s.path), s.packed)), None)
    if odd is not None:
        yield f"warning: {odd} holds JSON and is read as plain text: name it .jsonl or .json to read one field of it"
