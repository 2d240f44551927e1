"""`MegatronFormat`: one `.bin/.idx` pair written by Megatron's tools, without a hold-out of its own."""

from __future__ import annotations

from pathlib import Path

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.indexed import IndexedCorpus, corpus_prefix
from mmdata.errors import DataError
from mmdata.tokenizer_identity import TokenizerIdentity, identity_on_record


class MegatronFormat:
    """`CorpusFormat` of a single `.bin/.idx` pair; `source` is its prefix, or either file."""

    keeps_valid = False

    def matches(self, source: str) -> bool:
        """Always True: the format stands last in the registry, and says which file is missing."""
        return True

    def train(self, source: str, cache: ArrayCache | None = None) -> IndexedCorpus:
        """Documents of the pair, all of them."""
        return IndexedCorpus(source, cache)

    def valid(self, source: str, cache: ArrayCache | None = None) -> None:
        """Nothing: held-out documents are chosen by a hash."""
        return None

    def tokenizer(self, source: str) -> Path:
        """Folder of the pair, if a `tokenizer.json` (or a manifest that says "bytes") lies beside the pair.

        Raises:
            DataError: there is no such corpus, or no tokenizer beside it.
        """
        prefix = corpus_prefix(source)
        if prefix.with_name("tokenizer.json").is_file():
            return prefix.parent
        if not Path(f"{prefix}.idx").is_file():
            raise DataError(f"data.path={source}: there is no such corpus; prepare one with launch/prepare.py")
        if self.tokenizer_identity(source) is not None:
            return prefix.parent
        raise DataError(f"data.path={source} has no tokenizer.json beside it: give data.tokenizer=PATH (or bytes)")

    def tokenizer_identity(self, source: str) -> TokenizerIdentity | None:
        """Identity by the manifest or the `tokenizer.json` beside the pair; None where there is neither."""
        prefix = corpus_prefix(source)
        tokens = Path(f"{prefix}.bin")
        return identity_on_record(prefix.parent, prefix.name, tokens.stat().st_size) if tokens.is_file() else None
