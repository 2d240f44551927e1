"""`Encoder`: documents in, tokens in a file out, a bounded amount of text at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from mmdata.hashing import content_hash
from mmdata.prepare.skips import Skip, SkipLog
from mmdata.prepare.sources import Document
from mmdata.text_parts import PartCutter
from mmdata.tokenizer import SpeltSpecialToken, Tokenizer

_BATCH_BYTES = 1 << 19  # text of whole documents encoded at a time: bounds a worker's memory
_SPELT = "only a special token can say it"


class Encoder:
    """Writer of the tokens of documents, in order, an EOD after each.

    Memory is bounded by one item of `add` and by `mmdata.text_parts.LARGEST_PART`, not by a document that comes in
    fragments.

    Args:
        tokenizer: what makes tokens of text.
        dtype: of the tokens written.
        stream: file open for reading and writing; tokens go to its end.
        tell: called with the bytes of text done so far, from time to time.

    Attributes:
        skips: what was left out.
    """

    def __init__(
        self, tokenizer: Tokenizer, dtype: np.dtype, stream: BinaryIO, tell: Callable[[int], object] = lambda size: None
    ) -> None:
        self.skips = SkipLog()
        self._tokenizer, self._dtype, self._stream, self._tell = tokenizer, dtype, stream, tell
        self._batch: list[Document] = []
        self._batch_bytes = self._done = 0
        self._facts: list[np.ndarray] = []
        self._long: _LongDocument | None = None
        self._dropping = False  # the rest of a long document that cannot be encoded

    def add(self, item: Document | Skip) -> None:
        """Take the next document, fragment or skip."""
        if isinstance(item, Skip):
            if self._long is not None:
                self._stream.truncate(self._long.start)
                self._stream.seek(self._long.start)
                self._long = None
            self._dropping = False
            self.skips.add(item)
        elif self._dropping:
            self._dropping = item.more
        elif item.more or self._long is not None:
            self._add_fragment(item)
        else:
            self._batch.append(item)
            self._batch_bytes += len(item.data)
            if self._batch_bytes >= _BATCH_BYTES:
                self._write_batch()

    def finish(self) -> np.ndarray:
        """Write what is held back.

        Returns:
            uint64[documents, 3]: tokens with EOD, content hash, UTF-8 bytes of each document.
        """
        self._write_batch()
        return np.concatenate(self._facts) if self._facts else np.empty((0, 3), dtype=np.uint64)

    def _write_batch(self) -> None:
        batch, self._batch = self._batch, []
        self._done += self._batch_bytes
        self._batch_bytes = 0
        if not batch:
            return
        try:
            flat, lengths = self._tokenizer.encode_documents([document.text for document in batch], self._dtype)
        except SpeltSpecialToken:
            if len(batch) > 1:
                for document in batch:
                    self._batch = [document]
                    self._write_batch()
            else:
                self.skips.add(Skip(_SPELT, repr(batch[0].text[:40])))
            return
        flat.tofile(self._stream)
        facts = np.empty((len(batch), 3), dtype=np.uint64)
        facts[:, 0] = lengths
        facts[:, 1] = [content_hash(document.data) for document in batch]
        facts[:, 2] = [len(document.data) for document in batch]
        self._facts.append(facts)
        self._tell(self._done)

    def _add_fragment(self, item: Document) -> None:
        if self._long is None:
            self._write_batch()
            self._long = _LongDocument(self._stream.tell(), PartCutter(self._tokenizer.cut))
        document = self._long
        document.digest.update(item.data)
        document.bytes += len(item.data)
        self._done += len(item.data)
        try:
            for part in document.cutter.take(item.text, last=not item.more):
                flat, _ = self._tokenizer.encode_documents([part], self._dtype)
                flat[:-1].tofile(self._stream)
                document.tokens += len(flat) - 1
        except SpeltSpecialToken:
            self.add(Skip(_SPELT, repr(item.text[:40])))
            self._dropping = item.more
            return
        self._tell(self._done)
        if not item.more:
            np.array([self._tokenizer.eod_id], dtype=self._dtype).tofile(self._stream)
            content = int.from_bytes(document.digest.digest(), "little")
            self._facts.append(np.array([[document.tokens + 1, content, document.bytes]], dtype=np.uint64))
            self._long = None


class _LongDocument:
    """A document that comes in fragments: where its tokens start in the file, and what is known of it so far."""

    def __init__(self, start: int, cutter: PartCutter) -> None:
        self.start = start
        self.cutter = cutter
        self.digest = hashlib.blake2b(digest_size=8)  # as `mmdata.hashing.content_hash`
        self.tokens = self.bytes = 0
