"""The tokenizer of a corpus with images: the one given, or one trained on the texts of the records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdata.corpus.manifest import sha256_file
from mmdata.corpus.writer import fsync
from mmdata.prepare.bpe import train_bpe
from mmdata.prepare.skips import Skip, SkipLog
from mmdata.prepare.sources import Piece
from mmdata.prepare_images.records import read_records
from mmdata.prepare_images.shapes import BadRecord, sample_of
from mmdata.prepare_images.template import ImageRef, Sample, Template, Text
from mmdata.tokenizer import Tokenizer, load_tokenizer
from mmdata.tokenizer_identity import identity_of_file

_SAMPLE_TEXTS = 200_000  # records that a tokenizer is trained on, at most


def make_tokenizer(
    source: str,
    vocab_size: int,
    image_token: str,
    template: Template,
    planned: Sequence[Sequence[Piece]],
    partial: Path,
) -> tuple[Tokenizer, dict[str, Any]]:
    """Tokenizer, also saved as `partial/tokenizer.json`, and the manifest's facts about it.

    Args:
        source: "train", or the path of a tokenizer.json or of a folder with one.
        vocab_size: of a tokenizer that is trained.
        image_token: special token that such a one gets.
        template: of the texts that it is trained on.
        planned: pieces of the files with the texts.
        partial: work folder.

    Raises:
        DataError: `vocab_size` is too small, or there is no text.
    """
    path, facts_path = partial / "tokenizer.json", partial / "tokenizer.facts"
    if not (facts_path.exists() and path.exists()):
        if source == "train":
            texts = _RecordTexts(planned, template)
            facts = {"kind": "trained", **train_bpe(texts, vocab_size, path, [image_token])}
        else:
            given = Path(source)
            facts = {"kind": "file"}
            shutil.copyfile(given / "tokenizer.json" if given.is_dir() else given, path)
        fsync(path)
        known_by = {"sha256": sha256_file(path), "content": identity_of_file(path).content}
        facts_path.write_text(json.dumps(facts | known_by), encoding="utf-8")
    return load_tokenizer(path), json.loads(facts_path.read_text(encoding="utf-8"))


class _RecordTexts:
    """Texts of records, to train a tokenizer on; `documents`, `bytes` and `skips` are of those read so far."""

    def __init__(self, planned: Sequence[Sequence[Piece]], template: Template) -> None:
        self._planned, self._template = planned, template
        self.documents = self.bytes = 0
        self.skips = SkipLog()

    def __iter__(self) -> Iterator[str]:
        for sample in self._samples():
            self.documents += 1
            text = "".join("" if isinstance(part, ImageRef) else part.text for part in _all_parts(sample))
            self.bytes += len(text.encode("utf-8", "replace"))
            yield text
            if self.documents >= _SAMPLE_TEXTS:
                return

    def _samples(self) -> Iterator[Sample]:
        for piece in (piece for shard in self._planned for piece in shard):
            for record in read_records(piece, None):
                if isinstance(record, Skip):
                    self.skips.add(record)
                    continue
                try:
                    yield sample_of(record.value, self._template)
                except BadRecord as error:
                    self.skips.add(Skip(str(error), record.where))


def _all_parts(sample: Sample) -> Iterator[Text | ImageRef]:
    yield from sample.parts
    yield from sample.rejected or ()
