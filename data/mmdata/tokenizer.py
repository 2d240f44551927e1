"""Tokenizers: bytes, and anything in a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmdata.corpus.manifest import read_manifest
from mmdata.errors import DataError
from mmdata.special_tokens import EOD_NAMES, special_ids, unspellable
from mmdata.text_parts import PART, cut_pattern, parts
from mmdata.tokenizer_identity import BYTES_FILE

EOD_TOKEN = EOD_NAMES[0]


class Tokenizer(Protocol):
    """Protocol of a tokenizer. Ids are 0..vocab_size-1; no text gives a special token, EOD least of all.

    Attributes:
        vocab_size: one more than the largest id.
        eod_id: id of the end-of-document token.
        cuts_exactly: whether `cut` finds places in ordinary text.
        special_tokens: ids by name of the tokens that no text gives, EOD among them.
    """

    vocab_size: int
    eod_id: int
    cuts_exactly: bool
    special_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts."""

    def encode_documents(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, an EOD after each text (dtype[total]), and lengths with EOD (int64[n])."""

    def cut(self, text: str, start: int) -> int:
        """First place at or after `start` where cutting `text` in two changes none of its ids; -1 if there is none."""

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
    cuts_exactly = True

    def __init__(self) -> None:
        self.special_tokens = {EOD_TOKEN: self.eod_id}

    def encode(self, text: str) -> list[int]:
        """Bytes of the text."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Bytes of each text."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of all texts end to end, an EOD after each text (dtype[total]), and lengths with EOD (int64[n])."""
        encoded = [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]
        return _join(encoded, self.eod_id, dtype)

    def cut(self, text: str, start: int) -> int:
        """Any place will do."""
        return start if start < len(text) else -1

    def decode(self, ids: list[int]) -> str:
        """Text of the ids below 256."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """1 for each byte, 0 for EOD: int32[257]."""
        counts = np.ones(self.vocab_size, dtype=np.int32)
        counts[self.eod_id] = 0
        return counts


class SpeltSpecialToken(DataError):
    """A text whose every encoding holds a special token: the tokenizer has no other token for what it says."""


class FileTokenizer:
    """A `tokenizer.json`, read with the `tokenizers` package.

    Special tokens spelt out in a text are encoded as ordinary text, whatever the kind of tokenizer: a document that
    mentions "<end_of_document>" does not end there, and a prompt cannot either.

    Raises:
        DataError: the file is broken or has no end-of-document token that we know.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.source = path.read_bytes()  # as it is saved with a run
            self._spec: dict[str, Any] = json.loads(self.source.decode("utf-8"))
            self._backend = _backend(self._spec, path)
        except Exception as error:  # tokenizers raises bare Exception
            what = " ".join(str(error).split())[:120]
            raise DataError(f"{path} is not a usable tokenizer.json ({what}): save it again with tokenizers") from None
        self._vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        eod = next((self._vocab[name] for name in EOD_NAMES if name in self._vocab), None)
        if eod is None:
            raise DataError(f"{path} has no end-of-document token: add one of {', '.join(EOD_NAMES)} to it")
        self.eod_id = eod
        self._special = special_ids(self._spec, self._vocab, eod)
        self.special_tokens = {name: i for name, i in self._vocab.items() if i in self._special}
        self._plain: Any = None  # backend in which no text spells a special token, made when first needed
        self._cut_pattern = cut_pattern(self._spec)
        self.cuts_exactly = self._cut_pattern is not None

    def encode(self, text: str) -> list[int]:
        """Ids of one text.

        Raises:
            SpeltSpecialToken: the text cannot be encoded without a special token.
        """
        return self._without_special(text, self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts, on as many threads as `TOKENIZERS_PARALLELISM` allows.

        Raises:
            SpeltSpecialToken: a text cannot be encoded without a special token.
        """
        found = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        if self._special.isdisjoint(chain.from_iterable(found)):  # of all at once: texts may be short and many
            return found
        return [self._without_special(text, ids) for text, ids in zip(texts, found, strict=True)]

    def encode_documents(self, texts: list[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, an EOD after each text (dtype[total]), and lengths with EOD (int64[n]).

        Texts of over a million characters go through in parts, to bound the memory (see `mmdata.text_parts`).

        Raises:
            SpeltSpecialToken: a text cannot be encoded without a special token.
        """
        if all(len(text) <= PART for text in texts):
            return _join([np.array(ids, dtype=dtype) for ids in self.encode_batch(texts)], self.eod_id, dtype)
        return _join([self._encode_long(text, dtype) for text in texts], self.eod_id, dtype)

    def cut(self, text: str, start: int) -> int:
        """First place at or after `start` where cutting `text` in two changes none of its ids; -1 if there is none."""
        found = self._cut_pattern.search(text, start) if self._cut_pattern else None
        return -1 if found is None else found.start()

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
        encoded = [np.array(self.encode(part), dtype=dtype) for part in parts(text, self.cut)]
        return np.concatenate(encoded) if encoded else np.empty(0, dtype=dtype)

    def _without_special(self, text: str, ids: list[int]) -> list[int]:
        """`ids` of `text` if no special token is among them, else those of a tokenizer that takes its name apart."""
        if self._special.isdisjoint(ids):
            return ids
        if self._plain is None:
            self._plain = _backend(unspellable(self._spec, self.special_tokens))
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if self._special.isdisjoint(ids):
            return ids
        name = next(name for name, i in self._vocab.items() if i in self._special.intersection(ids))
        raise SpeltSpecialToken(f"a text gives the special token {name}, and this tokenizer has no other for it")


def _backend(spec: dict[str, Any], path: Path | None = None) -> Any:
    """Tokenizer of the `tokenizers` package from a file or, without one, from its content.

    It is set to encode special tokens as text, and to truncate and pad nothing.
    """
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(spec)) if path is None else Backend.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


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
