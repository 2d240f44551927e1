"""`CorpusWriter`: writes `.bin/.idx` files through megatron-core's own builder."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


def token_dtype(vocab_size: int) -> np.dtype:
    """Dtype that tokens are stored as: uint16 where every id below `vocab_size` fits, else int32.

    Megatron's tools write these two.
    """
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def builder_class() -> type[Any]:
    """Import megatron-core's `IndexedDatasetBuilder`, without the warnings that its import prints.

    The import takes seconds (it brings torch): callers put it where it overlaps other work.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return IndexedDatasetBuilder


class CorpusWriter:
    """Writer of one corpus, document by document; a context manager, which writes the index on a clean exit.

    Args:
        prefix: path without suffix; the folder must exist.
        dtype: of the stored tokens, np.uint16 or np.int32.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._builder = builder_class()(str(self.bin_path), dtype=np.dtype(dtype).type)

    def __enter__(self) -> CorpusWriter:
        return self

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, int[n], as one sequence."""
        self._builder.add_document(tokens, [len(tokens)])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._builder.data_file.close()
            return
        self._builder.finalize(str(self.idx_path))
        for path in (self.bin_path, self.idx_path):
            fsync(path)


def fsync(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
