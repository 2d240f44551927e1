"""Identity of a tokenizer: what decides the ids that a text becomes, apart from how a file spells it.

Two `tokenizer.json` files with the same model (vocabulary, merges), normalizer, pre-tokenizer and added tokens are one
tokenizer, whatever their white space, key order, format of merges, truncation, padding, post-processor or decoder:
mmdata uses none of the last four to encode.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmdata.corpus.manifest import NAME, Manifest, read_manifest, sha256_file
from mmdata.errors import DataError

BYTES = "bytes"
BYTES_FILE = "tokenizer_bytes.json"  # in a folder that `save_tokenizer` wrote: the tokenizer is bytes, without a file
_PARTS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
_NO_EFFECT = {"trim_offsets"}  # of pre-tokenizers: they move offsets only


@dataclass(frozen=True)
class TokenizerIdentity:
    """Hashes that a tokenizer is known by.

    Attributes:
        kind: "bytes" or "json".
        sha256: of the file; None for bytes.
        content: hash of what decides the ids; None where only the file's hash is on record.
        vocab_size: tokens, where known.
    """

    kind: str
    sha256: str | None = None
    content: str | None = None
    vocab_size: int | None = None

    def same_as(self, other: TokenizerIdentity) -> bool:
        """Whether both give the same ids, as far as the hashes of both tell."""
        if self.kind != other.kind or self.kind == BYTES:
            return self.kind == other.kind
        if self.content is not None and other.content is not None:
            return self.content == other.content
        return self.sha256 is not None and self.sha256 == other.sha256

    def __str__(self) -> str:
        if self.kind == BYTES:
            return "the byte tokenizer"
        size = "" if self.vocab_size is None else f"{self.vocab_size} tokens, "
        return f"a tokenizer.json ({size}sha256 {(self.sha256 or self.content or '?')[:12]})"

    def as_dict(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return asdict(self)


def identity_of_file(path: str | Path) -> TokenizerIdentity:
    """Identity of a `tokenizer.json`.

    Raises:
        DataError: the file is missing or not such a file.
    """
    path = Path(path)
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
        size = max([len(vocab), *(token["id"] + 1 for token in added)])
        canonical = json.dumps({part: _canonical(part, spec.get(part)) for part in _PARTS}, sort_keys=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a usable tokenizer.json ({type(error).__name__}): save it again") from None
    return TokenizerIdentity("json", sha256_file(path), hashlib.sha256(canonical.encode()).hexdigest(), size)


def identity_of_path(path: str | Path | None) -> TokenizerIdentity:
    """Identity of what :func:`mmdata.tokenizer.load_tokenizer` loads for `path`.

    Raises:
        DataError: there is no tokenizer, or a broken one.
    """
    if path is None or str(path) == BYTES:
        return TokenizerIdentity(BYTES, vocab_size=257)
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        return TokenizerIdentity(BYTES, vocab_size=257)  # load_tokenizer refuses a folder that holds no tokenizer
    return identity_of_file(file)


def identity_on_record(folder: Path, name: str, bin_bytes: int) -> TokenizerIdentity | None:
    """Identity of the tokenizer that made `folder/name.bin`, by the manifest and the `tokenizer.json` beside it.

    None where nothing says it. A manifest of other files (another size of `name.bin`) says nothing.

    Raises:
        DataError: the `tokenizer.json` there is not the one that the manifest records, or broken.
    """
    file = folder / "tokenizer.json"
    try:
        manifest = read_manifest(folder) if (folder / NAME).is_file() else None
    except DataError:
        manifest = None
    if manifest is None or not _covers(manifest, name, bin_bytes):
        return identity_of_file(file) if file.is_file() else None
    facts = manifest.tokenizer
    if facts.get("kind") == BYTES:
        return TokenizerIdentity(BYTES, vocab_size=manifest.vocab_size)
    recorded = TokenizerIdentity("json", facts.get("sha256"), facts.get("content"), manifest.vocab_size)
    if not file.is_file() or (recorded.content is not None and sha256_file(file) == recorded.sha256):
        return recorded
    there = identity_of_file(file)
    if not there.same_as(recorded) and there.sha256 != recorded.sha256:
        raise DataError(
            f"{file} is {there}, but {folder / NAME} records {recorded}: the corpus was made with another tokenizer; "
            "put its own back, or prepare it again with --force"
        )
    return there


def _covers(manifest: Manifest, name: str, bin_bytes: int) -> bool:
    split = manifest.splits.get(name)
    return split is not None and split.files.get(f"{name}.bin", {}).get("bytes") == bin_bytes


def _canonical(part: str, value: Any) -> Any:
    """One form for all spellings of a part that mean the same."""
    if part == "added_tokens":
        return sorted((value or []), key=lambda token: token["id"])
    if part == "model":
        absent = (None, False, "")  # mean what absence means; 0 does not, so no `in`
        model = {name: item for name, item in value.items() if not any(item is nothing for nothing in absent)}
        if isinstance(model.get("merges"), list):
            model["merges"] = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        return model
    return _without(value, _NO_EFFECT)


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(item, names) for name, item in value.items() if name not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value
