"""`IndexedCorpus`: reader of Megatron `.bin/.idx` files, memory-mapped, and checked when opened.

An `.idx` file is the header `MMIDIDX`, version, dtype code, the numbers of sequences and of document boundaries, then
int32 sequence lengths, int64 byte pointers and int64 document boundaries (in sequences); multimodal ones add an int8
mode for each sequence. The `.bin` file is the tokens, end to end.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from mmdata.corpus.manifest import recorded_max_id
from mmdata.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


class IndexedCorpus:
    """`Corpus` of one `.bin/.idx` pair.

    Attributes:
        prefix: path without `.bin` or `.idx` (either suffix may be given and is dropped).
        idx_path, tokens_path: the two files.
        num_documents, num_tokens: totals.
        dtype: numpy dtype of the stored tokens.
        doc_lengths: int64[num_documents], tokens of each document, over all of its sequences.
        doc_offsets: int64[num_documents], where each document starts in `data`.
        data: dtype[num_tokens], every token, memory-mapped, read-only.

    Raises:
        DataError: a file is missing, truncated or corrupt.
    """

    def __init__(self, prefix: str | Path) -> None:
        prefix = Path(prefix)
        self.prefix = prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix
        self.idx_path = Path(f"{self.prefix}.idx")
        self.tokens_path = Path(f"{self.prefix}.bin")
        for path in (self.idx_path, self.tokens_path):
            if not path.is_file():
                hint = f"; {prefix} is a folder: name a corpus in it, for example {prefix / 'train'}"
                raise DataError(f"{path} is missing{hint if prefix.is_dir() else ': make it with launch/prepare.py'}")
        self.dtype, bounds = self._read_index()
        self.num_documents = len(bounds) - 1
        self.num_tokens = int(bounds[-1])
        self.doc_offsets = bounds[:-1]
        self.doc_lengths = np.diff(bounds)
        self.data = self._map_tokens()

    def __getstate__(self) -> dict[str, Path]:
        """Pickle by path: a worker process opens its own map."""
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["prefix"])

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, dtype[doc_lengths[i]], a view of the map."""
        return self.tokens(i, 0, int(self.doc_lengths[i]))

    def tokens(self, doc: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of one document, dtype[stop - start], a view of the map.

        Raises:
            IndexError: no such document, or the range leaves it.
        """
        if not 0 <= start <= stop <= self.doc_lengths[doc]:
            raise IndexError(f"tokens {start}:{stop} of document {doc}, which has {self.doc_lengths[doc]}")
        offset = int(self.doc_offsets[doc])
        return self.data[offset + start : offset + stop]

    def document_at(self, token: int) -> int:
        """Id of the document that holds position `token` of `data`."""
        return int(np.searchsorted(self.doc_offsets + self.doc_lengths, token, side="right"))

    def recorded_max_id(self) -> int | None:
        """Largest token id by the manifest beside the files; None without one, or if it is of other files."""
        return recorded_max_id(self.prefix, self.tokens_path.stat().st_size)

    def refuse_token(self, position: int, vocab_size: int) -> NoReturn:
        """Raise the error for the out-of-range token at `position` of `data`.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"{self.tokens_path}, document {self.document_at(position)}: token id {int(self.data[position])} is "
            f"outside 0..{vocab_size - 1}: use the tokenizer the corpus was made with, or a model vocabulary that "
            "covers it"
        )

    def _corrupt(self, path: Path, what: str) -> DataError:
        return DataError(f"{path} is not a usable Megatron corpus: {what}; copy or prepare it again")

    def _read_index(self) -> tuple[np.dtype, np.ndarray]:
        """Read the tokens' dtype, and where documents begin and end in `data`: int64[documents + 1]."""
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as stream:
            dtype, sequences, boundaries = self._read_header(stream, size)
            lengths = np.fromfile(stream, dtype="<i4", count=sequences)
            pointers = np.fromfile(stream, dtype="<i8", count=sequences)
            documents = np.fromfile(stream, dtype="<i8", count=boundaries)
        if sequences and lengths.min() < 0:
            raise self._corrupt(self.idx_path, "a sequence length is negative")
        ends = np.zeros(sequences + 1, dtype=np.int64)
        np.cumsum(lengths, out=ends[1:], dtype=np.int64)
        if not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
            raise self._corrupt(self.idx_path, "its sequence pointers do not follow from its sequence lengths")
        if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
            raise self._corrupt(self.idx_path, f"document boundaries do not run from 0 to its {sequences} sequences")
        return dtype, ends[documents]

    def _read_header(self, stream: BinaryIO, size: int) -> tuple[np.dtype, int, int]:
        """Read the tokens' dtype, the number of sequences and the number of document boundaries."""
        if size < _HEADER.size:
            raise self._corrupt(self.idx_path, f"it has {size} bytes, less than a header")
        magic, version, code, sequences, boundaries = _HEADER.unpack(stream.read(_HEADER.size))
        if magic != MAGIC or version != 1:
            raise self._corrupt(self.idx_path, "it does not start with the header MMIDIDX, version 1")
        dtype = np.dtype(_DTYPES.get(code, np.float64)).newbyteorder("<")
        if dtype.kind not in "iu":
            raise self._corrupt(self.idx_path, f"dtype code {code} does not stand for an integer type")
        if boundaries < 1:
            raise self._corrupt(self.idx_path, "it has no document boundaries")
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (expected, expected + sequences):  # the longer form has an int8 mode for each sequence
            raise self._corrupt(self.idx_path, f"it has {size} bytes where its header asks for {expected}")
        return dtype, sequences, boundaries

    def _map_tokens(self) -> np.ndarray:
        size, expected = self.tokens_path.stat().st_size, self.num_tokens * self.dtype.itemsize
        if size != expected:
            raise self._corrupt(self.tokens_path, f"it has {size} bytes where the .idx asks for {expected}")
        if size == 0:
            return np.empty(0, dtype=self.dtype)
        # A plain ndarray over the map: slicing np.memmap itself costs microseconds.
        return np.asarray(np.memmap(self.tokens_path, dtype=self.dtype, mode="r"))
