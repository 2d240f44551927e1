"""Batches of a stream of rows with images, or of any stream: what a training loop asks for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from mmdata.errors import DataError
from mmdata.images.batch import ImageBatch, collate_images
from mmdata.images.grid import TileRules
from mmdata.images.place import need_pillow
from mmdata.images.reader import TILES_AHEAD, TileReader
from mmdata.images.stream import ImageStream
from mmdata.rows.loader import PackedBatch, Rows, micro_batches
from mmdata.rows.mixture import Mixture


def image_batches(
    stream: Rows,
    batches: Iterable[Sequence[int]],
    *,
    num_workers: int = 0,
    threads: int = 2,
    tiles_ahead: int = TILES_AHEAD,
    log: Callable[[str], None] | None = None,
) -> Generator[ImageBatch]:
    """Make one batch of each list of row numbers, as `micro_batches` does, with the tiles of its images.

    Args:
        stream: an `ImageStream`, or a `Mixture` with one in it.
        batches: lists of row numbers, maybe without end.
        num_workers: processes that make rows (their tokens, not their pixels).
        threads: that decode images.
        tiles_ahead: see `TileReader`.
        log: gets a line for each of the first images that failed.

    Raises:
        DataError: a stream without images, or of corpora that were prepared by different rules; Pillow is missing; or
            as `micro_batches`.
    """
    rules = stream_rules(stream)
    if rules is None:
        raise DataError("image_batches reads rows of corpora with images: use micro_batches for text alone")
    if any(len(one.corpus.places) for one in _image_streams(stream)):  # preference pairs may be of text alone
        need_pillow()
    if threads < 1:
        raise DataError(f"threads is {threads}: decoding images needs at least 1")
    rows = micro_batches(stream, batches, num_workers=num_workers, collate=collate_images(rules))
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as executor:
        try:
            yield from TileReader(rules, executor, tiles_ahead=tiles_ahead, log=log).read(rows)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
            rows.close()


def read_batches(
    stream: Rows,
    batches: Iterable[Sequence[int]],
    *,
    num_workers: int = 0,
    log: Callable[[str], None] | None = None,
) -> Generator[PackedBatch]:
    """Batches of a stream of any kind: by `image_batches` where it has images, else by `micro_batches`.

    Args:
        stream: of rows.
        batches: lists of row numbers, maybe without end.
        num_workers: processes that make rows, and threads (one at least) that decode images.
        log: gets a line for each of the first images that failed.

    Raises:
        DataError: as they do.
    """
    if stream_rules(stream) is None:
        return micro_batches(stream, batches, num_workers=num_workers)
    return image_batches(stream, batches, num_workers=num_workers, threads=max(1, num_workers), log=log)


def stream_rules(stream: Rows) -> TileRules | None:
    """Rules by which the images of a stream become tiles; None where the stream has none.

    Raises:
        DataError: two corpora of a mixture have different rules, or different tokens for images.
    """
    corpora = [one.corpus for one in _image_streams(stream)]
    for corpus in corpora[1:]:
        if (corpus.rules, corpus.image_id) != (corpora[0].rules, corpora[0].image_id):
            raise DataError(
                f"{corpora[0].prefix} and {corpus.prefix} were prepared with different tiles or image tokens: prepare "
                "them with the same --tile, --patch, --grids and --image-token"
            )
    return corpora[0].rules if corpora else None


def _image_streams(stream: Rows) -> list[ImageStream]:
    """Streams of corpora with images, or with preference pairs, in a stream of any kind."""
    streams = stream.streams if isinstance(stream, Mixture) else [stream]
    return [one for one in streams if isinstance(one, ImageStream)]
