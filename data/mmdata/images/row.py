"""`ImageRow`, a packed row with images and preference pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmdata.rows.assemble import Row


@dataclass(frozen=True)
class RowImage:
    """An image of a row.

    Attributes:
        path: of its file.
        begin, size: its bytes there.
        width, height: pixels, after any turn.
        first: the row's token that is the first of its placeholders.
        tokens: placeholders, one after the other.
    """

    path: str
    begin: int
    size: int
    width: int
    height: int
    first: int
    tokens: int


@dataclass(frozen=True)
class ImageRow(Row):
    """A packed row with images. `loss_mask` is False too where the next token is not to be learned.

    Attributes:
        images: in the order of the row.
        pairs: int32[p, 3] of preference pairs: where the preferred answer's document begins, where the rejected one's
            begins, and where it ends. Each is a piece of its own in `cu_seqlens`.
        pair_ids: which pair each is, ``CORPUS/DOCUMENT``: the same wherever the corpus lies, however rows are packed.
    """

    images: tuple[RowImage, ...] = ()
    pairs: np.ndarray | None = None
    pair_ids: tuple[str, ...] = ()
