"""`ImageBatch`: a micro-batch with the tiles of its images and where their tokens lie.

Letters in shapes: B rows, S tokens of a row, T tiles, C colours, H and W pixels of a tile's sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from mmdata.errors import DataError
from mmdata.images.grid import ImageLayout, TileRules, lay_image
from mmdata.images.row import ImageRow, RowImage
from mmdata.rows.assemble import Row
from mmdata.rows.loader import PackedBatch, collate


@dataclass(frozen=True)
class BatchImage:
    """An image of a batch, on the host.

    Attributes:
        source: its file and size; `source.first` is in its row.
        first: the first of its placeholders in the flattened B * S tokens.
        tokens: placeholders, one after the other, all in one row.
        first_tile: the first of its tiles in the batch's.
        layout: its tiles, and which of their patches are tokens, by the rules of its corpus.
        failed: why its pixels could not be had, in a few words; its tiles are grey then. None where they could.
    """

    source: RowImage
    first: int
    tokens: int
    first_tile: int
    layout: ImageLayout
    failed: str | None = None

    @property
    def tiles(self) -> int:
        """The thumbnail and, after it, those of its grid, row by row."""
        return self.layout.tiles


def _no_tiles() -> torch.Tensor:
    return torch.empty(0, 3, 0, 0, dtype=torch.uint8)


@dataclass(frozen=True)
class ImageBatch(PackedBatch):
    """A `PackedBatch` with images; there may be none of them in it.

    Attributes:
        tiles_TCHW: uint8[T, C, H, W], tiles of all images end to end: red, green and blue from 0 to 255.
        images: in the order of the tokens.
        pairs: of preference pairs: where the preferred answer's document begins in the flattened tokens, where the
            rejected one's begins, and where it ends.
        pair_ids: which pair each is (`ImageRow.pair_ids`).
    """

    tiles_TCHW: torch.Tensor = field(default_factory=_no_tiles)
    images: tuple[BatchImage, ...] = ()
    pairs: tuple[tuple[int, int, int], ...] = ()
    pair_ids: tuple[str, ...] = ()

    @property
    def num_tiles(self) -> int:
        """T, whether they are decoded yet or not."""
        return sum(image.tiles for image in self.images)

    @property
    def failures(self) -> tuple[BatchImage, ...]:
        """Images whose pixels could not be had."""
        return tuple(image for image in self.images if image.failed is not None)

    def to(self, device: torch.device | str) -> ImageBatch:
        """Copy the batch to `device`, tiles too, as `PackedBatch.to` does."""
        moved = super().to(device)
        assert isinstance(moved, ImageBatch)
        pin = torch.device(device).type == "cuda" and self.tiles_TCHW.device.type == "cpu"
        tiles = self.tiles_TCHW.pin_memory() if pin else self.tiles_TCHW
        return replace(moved, tiles_TCHW=tiles.to(device, non_blocking=pin))


def collate_images(rules: TileRules) -> Callable[[Sequence[Row], Sequence[int]], ImageBatch]:
    """A `collate` that makes batches whose tiles are not decoded yet, of rows with and without images.

    Args:
        rules: by which the images' tokens were counted.
    """

    def make(rows: Sequence[Row], numbers: Sequence[int]) -> ImageBatch:
        packed = collate(rows, numbers)
        s, first_tile = packed.tokens_BS.shape[1], 0
        images: list[BatchImage] = []
        pairs: list[tuple[int, int, int]] = []
        pair_ids: list[str] = []
        for b, row in enumerate(rows):
            if not isinstance(row, ImageRow):
                continue
            for source in row.images:
                layout = lay_image(source.width, source.height, rules)
                if layout.tokens != source.tokens:
                    raise DataError(
                        f"{source.path}: its corpus has {source.tokens} tokens for it, tiles of {rules.tile} pixels "
                        f"make {layout.tokens}: the corpora of a run must be prepared by one set of rules"
                    )
                images.append(BatchImage(source, b * s + source.first, source.tokens, first_tile, layout))
                first_tile += layout.tiles
            if row.pairs is not None:
                pairs += [(b * s + x, b * s + y, b * s + z) for x, y, z in row.pairs.tolist()]
                pair_ids += row.pair_ids
        given = {one.name: getattr(packed, one.name) for one in fields(PackedBatch)}
        return ImageBatch(**given, images=tuple(images), pairs=tuple(pairs), pair_ids=tuple(pair_ids))

    return make


def count_images(batches: Iterable[PackedBatch]) -> dict[str, int]:
    """Counts of what a step's batches show, for its metrics: ``images``, ``tiles``, and ``images_failed/REASON``."""
    counts: Counter[str] = Counter(images=0, tiles=0)
    for batch in batches:
        if isinstance(batch, ImageBatch):
            counts.update(images=len(batch.images), tiles=batch.num_tiles)
            counts.update(f"images_failed/{image.failed}" for image in batch.failures)
    return dict(counts)


def mask_failed(batch: ImageBatch) -> ImageBatch:
    """The batch with no label on any document that shows an image whose pixels could not be had.

    What stands before such an image in its document goes too: a document is learned from as a whole or not at all.
    """
    if not batch.failures:
        return batch
    mask, bounds = batch.loss_mask_BS.clone(), batch.cu_seqlens
    for image in batch.failures:
        piece = int(torch.searchsorted(bounds, image.first, right=True)) - 1
        mask.view(-1)[int(bounds[piece]) : int(bounds[piece + 1])] = False
    return replace(batch, loss_mask_BS=mask)
