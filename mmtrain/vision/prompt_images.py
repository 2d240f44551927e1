"""Images of a prompt on their way to a server: tiles, and where in the prompt their tokens stand. Needs no torch.

Legend: N tiles, S pixels of a tile's side, I tokens of all images.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

from mmdata.images.grid import ImageLayout


@dataclass(frozen=True, eq=False)
class PromptImages:
    """Images of a prompt, in the order in which it shows them.

    Attributes:
        tiles_N3SS: uint8, tiles of all images, as `mmdata.images.tiles.cut_tiles` makes them.
        layouts: one an image.
        firsts: place in the prompt of the first token of each.
    """

    tiles_N3SS: np.ndarray
    layouts: tuple[ImageLayout, ...]
    firsts: tuple[int, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First place, and the one after the last, of each image."""
        return [(first, first + layout.tokens) for first, layout in zip(self.firsts, self.layouts, strict=True)]

    @property
    def at_I(self) -> np.ndarray:
        """Places of all tokens of images, int64, ascending."""
        return np.concatenate([np.arange(*span, dtype=np.int64) for span in self.spans])

    def each(self) -> Iterator[np.ndarray]:
        """Yield the tiles of each image."""
        first = 0
        for layout in self.layouts:
            yield self.tiles_N3SS[first : first + layout.tiles]
            first += layout.tiles

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """256 bits of BLAKE2 of each image's pixels and layout: what tells it from others of its size."""
        return tuple(
            blake2b(repr(layout).encode() + np.ascontiguousarray(tiles).tobytes(), digest_size=32).digest()
            for layout, tiles in zip(self.layouts, self.each(), strict=True)
        )

    def key_bytes(self, tokens: Sequence[int], start: int, stop: int) -> bytes:
        """Return the bytes by which a part of a prompt is known: ids, and in place of a placeholder its image's digest.

        The bytes of two parts that follow one another are those of both, so that they can be hashed piece by piece.

        Args:
            tokens: of the prompt, and what was added to it.
            start, stop: the part.
        """
        parts, at = [], start
        for (first, last), digest in zip(self.spans, self.digests, strict=True):
            low, high = max(at, first), min(stop, last)
            if low < high:
                parts += [array("q", tokens[at:low]).tobytes(), digest * (high - low)]
                at = high
        return b"".join([*parts, array("q", tokens[at:stop]).tobytes()])
