"""`MegatronFormat`: one `.bin/.idx` pair written by Megatron's tools, without a hold-out of its own."""

from __future__ import annotations

from pathlib import Path

from mmdata.corpus.indexed import IndexedCorpus
from mmdata.errors import DataError


class MegatronFormat:
    """`CorpusFormat` of a single `.bin/.idx` pair; `source` is its prefix, or either file."""

    keeps_valid = False

    def matches(self, source: str) -> bool:
        """Always True: the format stands last in the registry, and says which file is missing."""
        return True

    def train(self, source: str) -> IndexedCorpus:
        """Documents of the pair, all of them."""
        return IndexedCorpus(source)

    def valid(self, source: str) -> None:
        """Nothing: held-out documents are chosen by a hash."""
        return None

    def tokenizer(self, source: str) -> Path:
        """Folder of the pair, if a `tokenizer.json` lies beside the pair.

        Raises:
            DataError: there is no such corpus, or no `tokenizer.json` beside it.
        """
        path = Path(source)
        if path.parent.joinpath("tokenizer.json").is_file():
            return path.parent
        if not Path(f"{path.with_suffix('')}.idx").is_file():
            raise DataError(f"data.path={source}: there is no such corpus; prepare one with launch/prepare.py")
        raise DataError(f"data.path={source} has no tokenizer.json beside it: give data.tokenizer=PATH (or bytes)")
