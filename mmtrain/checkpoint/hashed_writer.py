"""Torch's writer of shards, which hashes what it writes as it goes by: no byte is read again for its checksum."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

from mmtrain.checkpoint.manifest import FileSum


class HashedWriter(dcp.FileSystemWriter):
    """A `FileSystemWriter` that remembers the checksums of the files that this rank writes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs: _HashedFiles = _HashedFiles()

    def sums(self) -> dict[str, FileSum]:
        """Return size and checksum of each file that was written, by name."""
        return dict(self.fs.sums)


class _HashedFiles(FileSystem):
    """Torch's access to files, with checksums of what is written under each name."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            hashed = _HashedStream(stream)
            yield hashed
            self.sums[Path(path).name] = FileSum(hashed.size, hashed.state.hexdigest())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        if Path(path).name in self.sums:
            self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _HashedStream(io.IOBase):
    """A file that is written from its beginning to its end; it cannot seek, as a checksum could not follow."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.state, self.size = stream, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        with memoryview(data) as view, view.cast("B") as given:
            self.state.update(given)
            self.size += len(given)
        return self._stream.write(data)

    def tell(self) -> int:
        return self.size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def close(self) -> None:
        self._stream.close()
        super().close()
