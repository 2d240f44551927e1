"""Batches with decoded images, read ahead by threads within a bound of memory, in order whatever is done first.

Threads, not processes: Pillow decodes and resizes without Python's lock, and tiles (338 KB each) need not be copied
from one process to another (data/bench/bench_images.py measures it).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

import numpy as np
import torch

from mmdata.errors import DataError
from mmdata.images.batch import BatchImage, ImageBatch, mask_failed
from mmdata.images.grid import TileRules
from mmdata.images.header import MAX_PIXELS, BadImage, reason_of
from mmdata.images.pixels import GREY, decode_tiles
from mmdata.images.place import open_section
from mmdata.images.row import RowImage

TILES_AHEAD = 512  # decoded or at work beyond the batch in use: 173 MB of tiles of 336 pixels
BATCHES_AHEAD = 16  # batches of few images, or none
_TRIES = 3  # of a file that could not be read, as network file systems fail now and then
_NAMED = 20  # failures that get a line each

Decode = Callable[[RowImage, TileRules], np.ndarray]


@dataclass
class _Open:
    """A batch whose tiles are being decoded: each image writes to its own part of `tiles`."""

    batch: ImageBatch
    tiles: torch.Tensor
    work: list[Future[str | None]]


class TileReader:
    """Reader of the pixels of batches, ahead of need.

    Beyond the batch that is handed out, at most `tiles_ahead` tiles are decoded or being decoded, or one batch if that
    has more. An image that is being decoded takes 4 bytes a pixel besides, 8 while it is turned or converted, 13 while
    it is put on white: 48 MB of a photograph of 12M pixels (less of a JPEG), and never more than 0.9 GB a thread.

    Args:
        rules: how images become tiles.
        executor: runs the decoding, in threads.
        tiles_ahead, batches_ahead: limits, both at least 1.
        decode: gives the tiles of an image, uint8[T, C, H, W], or raises BadImage.
        log: gets a line for each of the first images that failed.

    Attributes:
        counts: images and tiles handed out, and ``failed: REASON`` images whose pixels could not be had.
    """

    def __init__(
        self,
        rules: TileRules,
        executor: Executor,
        *,
        tiles_ahead: int = TILES_AHEAD,
        batches_ahead: int = BATCHES_AHEAD,
        decode: Decode | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        if tiles_ahead < 1 or batches_ahead < 1:
            raise DataError(f"tiles_ahead is {tiles_ahead}, batches_ahead {batches_ahead}: both must be at least 1")
        self._rules, self._executor, self._decode = rules, executor, decode or read_tiles
        self._tiles_ahead, self._batches_ahead, self._log = tiles_ahead, batches_ahead, log
        self.counts: Counter[str] = Counter()

    def read(self, batches: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
        """Yield the batches with their tiles, in order."""
        waiting: deque[_Open] = deque()
        drawn: deque[ImageBatch] = deque()  # at most one: it waits for room
        try:
            self._fill(waiting, drawn, batches)
            while waiting:
                done = self._finish(waiting.popleft())
                self._fill(waiting, drawn, batches)
                yield done
        finally:
            for opened in waiting:
                for work in opened.work:
                    work.cancel()

    def _fill(self, waiting: deque[_Open], drawn: deque[ImageBatch], batches: Iterator[ImageBatch]) -> None:
        """Start batches as long as there is room."""
        while len(waiting) < self._batches_ahead:
            if not drawn:
                batch = next(batches, None)
                if batch is None:
                    return
                drawn.append(batch)
            held = sum(opened.batch.num_tiles for opened in waiting)
            if waiting and held + drawn[0].num_tiles > self._tiles_ahead:
                return
            waiting.append(self._start(drawn.popleft()))

    def _start(self, batch: ImageBatch) -> _Open:
        side = self._rules.tile
        tiles = torch.empty(batch.num_tiles, 3, side, side, dtype=torch.uint8)
        pixels = tiles.numpy()
        parts = [pixels[image.first_tile : image.first_tile + image.tiles] for image in batch.images]
        work = [
            self._executor.submit(self._write, image, part) for image, part in zip(batch.images, parts, strict=True)
        ]
        return _Open(batch, tiles, work)

    def _write(self, image: BatchImage, part: np.ndarray) -> str | None:
        """Decode an image into its part of the tiles; why that failed, or None."""
        try:
            part[:] = self._decode(image.source, self._rules)
        except BadImage as error:
            part[:] = GREY
            return error.reason
        return None

    def _finish(self, opened: _Open) -> ImageBatch:
        """Wait for the images of a batch; a failed one is grey, and its document without labels."""
        reasons = [work.result() for work in opened.work]
        images = tuple(
            image if reason is None else replace(image, failed=reason)
            for image, reason in zip(opened.batch.images, reasons, strict=True)
        )
        self.counts.update(images=len(images), tiles=len(opened.tiles))
        for image in images:
            if image.failed is not None:
                self._tell(image)
        return mask_failed(replace(opened.batch, tiles_TCHW=opened.tiles, images=images))

    def _tell(self, image: BatchImage) -> None:
        self.counts[f"failed: {image.failed}"] += 1
        failed = sum(count for name, count in self.counts.items() if name.startswith("failed: "))
        if self._log is not None and failed <= _NAMED:
            place = f" at byte {image.source.begin}" if image.source.begin else ""
            last = " (the next ones are only counted)" if failed == _NAMED else ""
            self._log(f"image {image.source.path}{place}: {image.failed}; grey, and its document not learned{last}")


def read_tiles(image: RowImage, rules: TileRules, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read and decode one image, uint8[T, C, H, W]; a file that cannot be read is tried three times.

    Raises:
        BadImage: it cannot be had.
    """
    for attempt in range(_TRIES):
        try:
            with open_section(image.path, image.begin, image.size) as stream:
                return decode_tiles(stream, image.width, image.height, rules, max_pixels)
        except (OSError, BadImage) as error:
            reason = reason_of(error, "unreadable")
            if reason != "unreadable" or attempt == _TRIES - 1:
                raise BadImage(reason) from None
    raise AssertionError("the last attempt returns or raises")
