"""Decoding ahead: in order whatever is done first, within its bound, and images that fail late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mmdata.errors import DataError
from mmdata.images.batch import ImageBatch, collate_images, count_images
from mmdata.images.grid import TileRules
from mmdata.images.header import BadImage
from mmdata.images.pixels import GREY
from mmdata.images.reader import TileReader, read_tiles
from mmdata.images.row import RowImage
from mmdata.images.stream import ImageStream
from mmdata.images.stream_batches import image_batches, stream_rules
from mmdata.rows.loader import PackedBatch, micro_batches
from mmdata.rows.stream import RowStream
from tests.data.images.made import SMALL, encoded, picture, prepared, write_images, write_records

ROW = 64
COUNT = 24


@pytest.fixture
def stream(tmp_path) -> ImageStream:
    names = write_images(tmp_path, [(16 + i, 40 - i) for i in range(COUNT)])
    records = [{"image": name, "caption": f"caption {name}"} for name in names]
    corpus = prepared(write_records(tmp_path, records), tmp_path / "corpus")
    return ImageStream(corpus, seq_len=ROW, seed=3, eod_id=0, vocab_size=300)


def packed(stream: ImageStream, rows: int = 12) -> Iterator[ImageBatch]:
    return micro_batches(stream, [[i] for i in range(rows)], collate=collate_images(SMALL))


def test_each_image_has_its_own_tiles_where_its_tokens_are(stream):
    for batch in image_batches(stream, [[0, 1], [2, 3]], threads=2):
        assert isinstance(batch, ImageBatch) and batch.tiles_TCHW.dtype == torch.uint8
        assert batch.tiles_TCHW.shape == (batch.num_tiles, 3, 16, 16)
        flat, at = batch.tokens_BS.view(-1), 0
        marked = torch.zeros_like(flat, dtype=torch.bool)
        for image in batch.images:
            assert image.first_tile == at
            right = read_tiles(image.source, SMALL)
            assert torch.equal(batch.tiles_TCHW[at : at + image.tiles], torch.from_numpy(right))
            marked[image.first : image.first + image.tokens] = True
            at += image.tiles
        assert at == batch.num_tiles and torch.equal(marked, flat == stream.corpus.image_id)
        moved = batch.to("cpu")
        assert isinstance(moved, ImageBatch) and torch.equal(moved.tiles_TCHW, batch.tiles_TCHW)


def test_order_does_not_depend_on_which_image_is_done_first(stream):
    right = list(image_batches(stream, [[i] for i in range(12)], threads=1))
    gate, others = threading.Event(), threading.Semaphore(0)
    first = right[0].images[0].source

    def decode(image: RowImage, rules: TileRules) -> np.ndarray:
        if image == first:
            assert gate.wait(60)
        else:
            others.release()
        return read_tiles(image, rules)

    def wait_for_others() -> None:
        for _ in range(sum(len(batch.images) for batch in right[:4]) - 1):
            assert others.acquire(timeout=60)
        gate.set()  # only now is the first image decoded

    with ThreadPoolExecutor(2) as pool:
        threading.Thread(target=wait_for_others, daemon=True).start()
        read = list(TileReader(SMALL, pool, decode=decode).read(packed(stream)))
    assert [batch.rows for batch in read] == [batch.rows for batch in right]
    for one, other in zip(read, right, strict=True):
        assert torch.equal(one.tiles_TCHW, other.tiles_TCHW) and one.images == other.images


class Counting(ThreadPoolExecutor):
    """Counts the tiles that decoding was started for."""

    tiles = 0

    def submit(self, work, image, part):
        self.tiles += len(part)
        return super().submit(work, image, part)


@pytest.mark.parametrize("limit", [1, 25, 60])
def test_no_more_is_decoded_ahead_than_the_bound(stream, limit):
    with Counting(2) as pool:
        used = most = 0
        sizes = [batch.num_tiles for batch in packed(stream, 20)]
        for i, batch in enumerate(TileReader(SMALL, pool, tiles_ahead=limit).read(packed(stream, 20))):
            assert batch.rows == (i,)
            used += len(batch.tiles_TCHW)
            ahead = pool.tiles - used  # the next batches are at work while this one is in use
            most = max(most, ahead)
            assert ahead <= max(limit, max(sizes)) and (ahead > 0 or i == 19)
        assert used == sum(sizes) and most > min(limit, 60) - max(sizes)


def test_batches_without_images_are_not_drawn_without_end(stream):
    drawn = []

    def batches() -> Iterator[ImageBatch]:
        for batch in packed(stream, 20):
            drawn.append(batch.rows)
            yield batch

    with ThreadPoolExecutor(1) as pool:
        next(TileReader(SMALL, pool, batches_ahead=2).read(batches()))
    assert len(drawn) == 3


def test_an_image_that_fails_late_keeps_its_tokens_and_loses_its_labels(stream, tmp_path):
    whole = list(image_batches(stream, [[i, i + 1] for i in range(0, 12, 2)]))
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    (tmp_path / "5.png").unlink()
    (tmp_path / "7.png").write_bytes(encoded(picture(9, 9)))
    right = {"3.png": "truncated", "5.png": "missing", "7.png": "size changed"}
    lines, seen = [], {}
    for batch, before in zip(image_batches(stream, [[i, i + 1] for i in range(0, 12, 2)], log=lines.append), whole,
                             strict=True):  # fmt: skip
        assert torch.equal(batch.tokens_BS, before.tokens_BS) and torch.equal(batch.labels_BS, before.labels_BS)
        mask = before.loss_mask_BS.clone().view(-1)
        for image in batch.images:
            name = image.source.path.rpartition("/")[2]
            part = batch.tiles_TCHW[image.first_tile : image.first_tile + image.tiles]
            assert image.failed == right.get(name)
            if image.failed:
                seen[name] = image.failed
                assert (part == GREY).all()
                piece = int(torch.searchsorted(batch.cu_seqlens, image.first, right=True))
                bounds = slice(int(batch.cu_seqlens[piece - 1]), int(batch.cu_seqlens[piece]))
                assert mask[bounds].any()
                mask[bounds] = False
            else:
                assert torch.equal(part, before.tiles_TCHW[image.first_tile : image.first_tile + image.tiles])
        assert torch.equal(batch.loss_mask_BS.view(-1), mask)
        assert len(batch.failures) == sum(image.failed is not None for image in batch.images)
    assert seen == right and len(lines) == 3 and any("3.png: truncated; grey" in line for line in lines)


def test_failures_are_counted_by_reason_and_the_first_are_named(stream):
    def decode(image: RowImage, rules: TileRules) -> np.ndarray:
        raise BadImage("truncated")

    lines = []
    with ThreadPoolExecutor(1) as pool:
        reader = TileReader(SMALL, pool, decode=decode, log=lines.append)
        rows = stream.rows_per_epoch()
        batches = list(reader.read(packed(stream, rows)))
    assert reader.counts["failed: truncated"] == reader.counts["images"] == COUNT
    assert reader.counts["tiles"] == sum(len(batch.tiles_TCHW) for batch in batches)
    assert len(lines) == 20 and "only counted" in lines[-1]
    assert not any(batch.loss_mask_BS.any() for batch in batches)
    tiles = reader.counts["tiles"]
    assert count_images(batches) == {"images": COUNT, "tiles": tiles, "images_failed/truncated": COUNT}
    assert count_images([]) == {"images": 0, "tiles": 0}


def test_an_error_of_ours_is_not_taken_for_a_bad_image(stream):
    def decode(image: RowImage, rules: TileRules) -> np.ndarray:
        raise KeyError("ours")

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError, match="ours"):
        list(TileReader(SMALL, pool, decode=decode).read(packed(stream)))


def test_what_cannot_be_read_is_tried_three_times(stream, monkeypatch):
    tries = []

    def failing(*place):
        tries.append(place)
        raise OSError(5, "Input/output error")

    image = stream[0].images[0]
    monkeypatch.setattr("mmdata.images.reader.open_section", failing)
    with pytest.raises(BadImage, match="unreadable"):
        read_tiles(image, SMALL)
    assert len(tries) == 3


def test_batches_that_are_left_end_their_threads(stream):
    batches = image_batches(stream, [[i] for i in range(12)], threads=2)
    next(batches)
    assert any(thread.name.startswith("images") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())


def test_row_workers_change_nothing(stream):
    lists = [[i] for i in range(4)]
    for one, other in zip(image_batches(stream, lists), image_batches(stream, lists, num_workers=1), strict=True):
        assert one.images == other.images and torch.equal(one.tiles_TCHW, other.tiles_TCHW)


def test_text_alone_is_no_affair_of_images(numbered_corpus, stream):
    text = RowStream(numbered_corpus([100]), seq_len=ROW, seed=0, eod_id=0)
    assert stream_rules(text) is None and stream_rules(stream) == SMALL
    with pytest.raises(DataError, match="use micro_batches"):
        next(image_batches(text, [[0]]))
    (batch,) = micro_batches(text, [[0]])
    assert type(batch) is PackedBatch
    with pytest.raises(DataError, match=r"tiles_ahead is 0"):
        TileReader(SMALL, ThreadPoolExecutor(1), tiles_ahead=0)
    with pytest.raises(DataError, match="one set of rules"):
        next(micro_batches(stream, [[0, 1]], collate=collate_images(TileRules(tile=32, patch=8))))
