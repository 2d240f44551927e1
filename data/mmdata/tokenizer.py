"""Tokenizers: bytes, and anything in a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmdata.corpus.manifest import read_manifest
from mmdata.errors import DataError
from mmdata.tokenizer_identity import BYTES_FILE

EOD_TOKEN = "<end_of_document>"
_EOD_NAMES = (EOD_TOKEN, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<end_of_sentence>")
_LONG_TEXT = 1 << 20  # characters; longer texts are encoded in parts where that is exact


class Tokenizer(Protocol):
    """Protocol of a tokenizer. Ids are 0..vocab_size-1; `encode` adds no special token.

    Attributes:
        vocab_size: one more than the largest id.
        eod_id: id of the end-of-document token.
    """

    vocab_size: int
    eod_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts."""

    def encode_documents(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, an EOD after each text (dtype[total]), and lengths with EOD (int64[n])."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens vanish and broken UTF-8 becomes U+FFFD."""

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32[vocab_size]; 0 for EOD and other special tokens.

        Exact for bytes and byte-level BPE: the sum over a text's ids is the text's size in bytes.
        """


def load_tokenizer(path: str | Path | None) -> Tokenizer:
    """Load the tokenizer of a `tokenizer.json`, of a folder that holds one, or of "bytes" (also None).

    A folder without a `tokenizer.json` that `save_tokenizer` wrote for bytes, or whose manifest says "bytes", gives the
    byte tokenizer.

    Raises:
        DataError: the file is missing or broken, or names no end-of-document token that we know.
    """
    if path is None or str(path) == "bytes":
        return ByteTokenizer()
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file() and (
            (path / BYTES_FILE).is_file() or read_manifest(path).tokenizer.get("kind") == "bytes"
        ):
            return ByteTokenizer()
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(f'tokenizer {path} is missing: give a tokenizer.json, a folder that holds one, or "bytes"')
    return FileTokenizer(path)


class ByteTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is EOD."""

    vocab_size = 257
    eod_id = 256

    def encode(self, text: str) -> list[int]:
        """Bytes of the text."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Bytes of each text."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of all texts end to end, an EOD after each text (dtype[total]), and lengths with EOD (int64[n])."""
        parts = [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]
        return _join(parts, self.eod_id, dtype)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids below 256."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """1 for each byte, 0 for EOD: int32[257]."""
        counts = np.ones(self.vocab_size, dtype=np.int32)
        counts[self.eod_id] = 0
        return counts


class FileTokenizer:
    """A `tokenizer.json`, read with the `tokenizers` package.

    Special tokens spelt out in a text are encoded as ordinary text: a document that mentions "<end_of_document>" does
    not end there.

    Raises:
        DataError: the file is broken or has no end-of-document token that we know.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            what = " ".join(str(error).split())[:120]
            raise DataError(f"{path} is not a usable tokenizer.json ({what}): save it again with tokenizers") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        eod = next((self._vocab[name] for name in _EOD_NAMES if name in self._vocab), None)
        if eod is None:
            raise DataError(f"{path} has no end-of-document token: add one of {', '.join(_EOD_NAMES)} to it")
        self.eod_id = eod
        self._parts_are_exact = self._splits_at_newlines()

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, on as many threads as `TOKENIZERS_PARALLELISM` allows."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_documents(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, an EOD after each text (dtype[total]), and lengths with EOD (int64[n]).

        Texts of over a million characters go through in parts, where that is exact, to bound the memory.
        """
        if not self._parts_are_exact or all(len(text) <= _LONG_TEXT for text in texts):
            return _join([np.array(ids, dtype=dtype) for ids in self.encode_batch(texts)], self.eod_id, dtype)
        return _join([self._encode_long(text, dtype) for text in texts], self.eod_id, dtype)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes behind each token, int32[vocab_size]; an estimate for tokenizers that are not byte-level."""
        byte_level = '"ByteLevel"' in json.dumps([self._spec.get("pre_tokenizer"), self._spec.get("decoder")])
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self._vocab.items():
            counts[i] = len(token) if byte_level else _spelt_bytes(token)  # byte-level: one character stands for a byte
        for added in self._spec.get("added_tokens") or []:
            counts[added["id"]] = 0 if added.get("special") else len(added["content"].encode("utf-8"))
        counts[self.eod_id] = 0
        return counts

    def _encode_long(self, text: str, dtype: np.dtype) -> np.ndarray:
        parts = [np.array(self.encode(part), dtype=dtype) for part in _parts(text)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)

    def _splits_at_newlines(self) -> bool:
        """Whether a text may be cut between a letter and a newline without changing its ids.

        It may for GPT-2's byte-level pattern, which never joins the two, when nothing else looks at the text.
        """
        pre = self._spec.get("pre_tokenizer") or {}
        plain = self._spec.get("normalizer") is None and not any(
            "\n" in added["content"] or not added.get("special") for added in self._spec.get("added_tokens") or []
        )
        byte_level = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")
        return plain and bool(byte_level)


def _parts(text: str) -> list[str]:
    """`text` cut into parts of about a million characters, each cut between an ASCII letter and a newline."""
    parts, start = [], 0
    while start < len(text):
        stop = min(start + _LONG_TEXT, len(text))
        while stop < len(text):
            stop = text.find("\n", stop)
            if stop < 0:
                stop = len(text)
            elif text[stop - 1].isascii() and text[stop - 1].isalpha():
                break
            else:
                stop += 1
        parts.append(text[start:stop])
        start = stop
    return parts


def _spelt_bytes(token: str) -> int:
    """Bytes behind a SentencePiece- or WordPiece-style token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.removeprefix("##").replace("\u2581", " ").encode("utf-8"))


def _join(parts: list[np.ndarray], eod: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(part) + 1 for part in parts], dtype=np.int64)
    ends = np.cumsum(lengths)
    flat = np.full(int(lengths.sum()), eod, dtype=dtype)
    for part, end in zip(parts, ends, strict=True):
        flat[end - 1 - len(part) : end - 1] = part
    return flat, lengths
