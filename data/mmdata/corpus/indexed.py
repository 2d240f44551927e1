"""`IndexedCorpus`: reader of Megatron `.bin/.idx` files, memory-mapped, and checked when opened.

An `.idx` file is the header `MMIDIDX`, version, dtype code, the numbers of sequences and of document boundaries, then
int32 sequence lengths, int64 byte pointers and int64 document boundaries (in sequences); multimodal ones add an int8
mode for each sequence. The `.bin` file is the tokens, end to end.
"""

from __future__ import annotations

import struct
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from mmdata.corpus.array_cache import ArrayCache, Entry, Tick
from mmdata.corpus.fingerprint import digest_of, file_facts
from mmdata.corpus.manifest import recorded_max_id, recorded_sha256
from mmdata.errors import DataError

LARGE = 1 << 16  # documents from which on the index is kept on disk; below, reading the .idx costs milliseconds
MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


def corpus_prefix(path: str | Path) -> Path:
    """Path of a pair without its `.bin` or `.idx`; any other dot belongs to the corpus's name."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class IndexedCorpus:
    """`Corpus` of one `.bin/.idx` pair.

    Attributes:
        prefix: path without `.bin` or `.idx` (either suffix may be given and is dropped).
        cache: where the index of a corpus of 65,536 documents or more is kept once it is worked out; None keeps none.
        idx_path, tokens_path: the two files.
        num_documents, num_tokens: totals.
        num_empty: documents without a token.
        dtype: numpy dtype of the stored tokens.
        doc_lengths: int64[num_documents], tokens of each document, over all of its sequences.
        doc_offsets: int64[num_documents], where each document starts in `data`.
        data: dtype[num_tokens], every token, memory-mapped, read-only.

    Raises:
        DataError: a file is missing, truncated or corrupt.
    """

    def __init__(self, prefix: str | Path, cache: ArrayCache | None = None) -> None:
        self.prefix, self.cache = corpus_prefix(prefix), cache
        self.idx_path = Path(f"{self.prefix}.idx")
        self.tokens_path = Path(f"{self.prefix}.bin")
        for path in (self.idx_path, self.tokens_path):
            if not path.is_file():
                folder = Path(prefix)
                hint = f"; {folder} is a folder: name a corpus in it, for example {folder / 'train'}"
                raise DataError(f"{path} is missing{hint if folder.is_dir() else ': make it with launch/prepare.py'}")
        with open(self.idx_path, "rb") as stream:
            self.dtype, self._sequences, boundaries = self._read_header(stream, self.idx_path.stat().st_size)
        self.num_documents = boundaries - 1
        index = self._index()
        bounds = index.arrays["bounds"]
        self.num_tokens, self.num_empty = int(bounds[-1]), int(index.facts["empty"])
        self.doc_offsets, self.doc_lengths = bounds[:-1], index.arrays["lengths"]
        self.data = self._map_tokens()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle by path: a worker process opens its own maps."""
        return {"prefix": self.prefix, "cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(f"{state['prefix']}.bin", state["cache"])

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        try:
            files = {"bin": file_facts(self.tokens_path), "idx": file_facts(self.idx_path)}
        except OSError as error:
            raise DataError(f"{self.prefix}.bin/.idx cannot be read: {error.strerror}") from None
        recorded = recorded_sha256(self.prefix, files["bin"]["bytes"])
        for kind, facts in files.items():
            if kind in recorded:
                facts["sha256"] = recorded[kind]
        tokens = files["bin"]["bytes"] // self.dtype.itemsize
        return {"documents": self.num_documents, "tokens": tokens, "dtype": self.dtype.name, "files": files}

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a later launch knows these files again; see :mod:`mmdata.corpus.fingerprint`."""
        return self._fingerprint

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

    def _index(self) -> Entry:
        """Where documents begin and end in `data` (`bounds`, int64[documents + 1]), and their `lengths`, int64."""
        if self.cache is None or self.num_documents < LARGE:
            return self._read_index()
        key = {"corpus": digest_of(self.fingerprint()), "format": 1}
        return self.cache.get("documents", key, lambda tick: self._read_index(tick), f"the index of {self.prefix}")

    def _read_index(self, tick: Tick | None = None) -> Entry:
        """Read and check the whole .idx file."""
        with open(self.idx_path, "rb") as stream:
            stream.seek(_HEADER.size)
            lengths = np.fromfile(stream, dtype="<i4", count=self._sequences)
            pointers = np.fromfile(stream, dtype="<i8", count=self._sequences)
            documents = np.fromfile(stream, dtype="<i8", count=self.num_documents + 1)
        if self._sequences and lengths.min() < 0:
            raise self._corrupt(self.idx_path, "a sequence length is negative")
        ends = np.zeros(self._sequences + 1, dtype=np.int64)
        np.cumsum(lengths, out=ends[1:], dtype=np.int64)
        if not np.array_equal(pointers, ends[:-1] * self.dtype.itemsize):
            raise self._corrupt(self.idx_path, "its sequence pointers do not follow from its sequence lengths")
        if documents[0] != 0 or documents[-1] != self._sequences or (np.diff(documents) < 0).any():
            problem = f"document boundaries do not run from 0 to its {self._sequences} sequences"
            raise self._corrupt(self.idx_path, problem)
        bounds = ends[documents]
        sizes = np.diff(bounds)
        return Entry({"bounds": bounds, "lengths": sizes}, {"empty": int((sizes == 0).sum())})

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
