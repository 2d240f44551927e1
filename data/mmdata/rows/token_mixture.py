"""`TokenMixture`: rows of several components whose shares are met in tokens, over every stretch of the stream.

A component is documents of one corpus: all of it, or those of a bucket of lengths. `Mixture` gives each row to one
stream; here documents of all components share rows, since a row's worth of documents of 32K to 128K tokens leaves gaps
that only short ones fill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.documents import Documents
from mmdata.corpus.protocol import Corpus
from mmdata.errors import DataError
from mmdata.hashing import mix_array, salt_of
from mmdata.images.corpus import ImageCorpus
from mmdata.rows.assemble import Row, assemble
from mmdata.rows.cache import cached
from mmdata.rows.pieces import Pieces, TokenRanges
from mmdata.rows.share_schedule import Segment, ShareSchedule
from mmdata.rows.spread import spread_evenly
from mmdata.rows.window_layout import Parts, lay_best_fit, lay_end_to_end

WINDOW_ROWS = 256  # at least, and as many as hold
WINDOW_DOCUMENTS = 16_384  # documents, but no more than
MOST_ROWS = 4096  # rows: more of them pack no better, and take longer to put in order
_LAYOUTS: dict[str, Callable[[np.ndarray, int, int], Parts]] = {"concat": lay_end_to_end, "best_fit": lay_best_fit}


@dataclass(frozen=True)
class Component:
    """Documents that have a share of the tokens.

    Attributes:
        corpus: that holds them.
        documents: at least one.
        cache: where the order of many documents is kept.
    """

    corpus: Corpus
    documents: Documents
    cache: ArrayCache | None = None


class WindowRows(NamedTuple):
    """Pieces of documents in the rows of a window, in their order, int64 each.

    Attributes:
        components: [n], the component of each piece.
        documents, starts, lengths: [n], as `Pieces` has them.
        bounds: [rows + 1], where each row's pieces begin and the last one's end.
    """

    components: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray


class TokenMixture:
    """Endless packed rows: row i is a pure function of (components, segments, seed, packing, seq_len, i).

    A window of rows takes from each component the next tokens of its endless shuffled sequence, as many as the
    integral of its share says (`ShareSchedule`), so that shares are exact to a token at every window's end. A document
    across the end of a window is cut there. The window's pieces are laid into its rows together. Then its rows are put
    in an order in which every stretch of them holds nearly the window's mixture (`spread_evenly`).

    ``concat`` lays pieces end to end, without padding. ``best_fit`` keeps them whole: of the tokens of a window of R
    rows, half a row is padding, a share of 1 / 2R, and what does not fit whole is cut (`lay_best_fit`).

    Args:
        components: with the shares of `segments`, by their places.
        segments: of the stream's rows. Without an end, in the last.
        seq_len: s, tokens in a row.
        seed: of all shuffles, any integer.
        packing: ``concat`` or ``best_fit``.
        eod_id: fills padding, and labels that do not count.
        vocab_size: if given, each row's tokens are checked against it.

    Raises:
        DataError: a bad option, bad shares, or a component that has a share and no token.
    """

    def __init__(
        self,
        components: Sequence[Component],
        segments: Sequence[Segment],
        *,
        seq_len: int,
        seed: int,
        packing: str = "concat",
        eod_id: int,
        vocab_size: int | None = None,
    ) -> None:
        if packing not in _LAYOUTS:
            raise DataError(f"packing is {packing!r}: choose one of {', '.join(_LAYOUTS)}")
        if seq_len < 1:
            raise DataError(f"seq_len is {seq_len}: a row needs at least 1 token")
        for component in components:
            if component.documents.num_tokens == 0:
                raise DataError(f"a mixture takes documents of {component.corpus.prefix} that it does not have")
            if isinstance(component.corpus, ImageCorpus):
                raise DataError(
                    f"{component.corpus.prefix} holds images, which a mixture by tokens would cut: give its phase "
                    "buckets=[] and transition=0 and leave data.long_sources empty, so that each row is of one source"
                )
        self.components, self.segments, self.seq_len, self.seed = tuple(components), tuple(segments), seq_len, seed
        self.packing, self.eod_id, self.vocab_size = packing, eod_id, vocab_size
        rows = window_rows(components, segments[-1].end, seq_len)
        self.schedule = ShareSchedule(segments, rows, row_tokens(packing, seq_len, rows))
        self._ranges = [TokenRanges(part.documents, seed, part.cache) for part in components]
        self._windows: dict[int, WindowRows] = {}

    def __getitem__(self, i: int) -> Row:
        """Row i, for any i >= 0.

        Raises:
            DataError: it holds a token outside the vocabulary.
            IndexError: i is negative.
        """
        components, pieces = self.pieces(i)
        corpora = [(self.components[k].corpus, np.flatnonzero(components == k)) for k in np.unique(components).tolist()]
        return assemble(
            corpora, pieces, seq_len=self.seq_len, eod_id=self.eod_id, vocab_size=self.vocab_size,
            pads=self.packing == "best_fit",
        )  # fmt: skip

    def pieces(self, i: int) -> tuple[np.ndarray, Pieces]:
        """Pieces of row i, and the component of each, int64[n].

        Raises:
            IndexError: i is negative.
        """
        if i < 0:
            raise IndexError(f"row {i}: rows are numbered from 0")
        window = self.schedule.window(i)
        laid = cached(self._windows, window.first_row, self.window, keep=4)
        a, b = laid.bounds[i - window.first_row : i - window.first_row + 2].tolist()
        return laid.components[a:b], Pieces(laid.documents[a:b], laid.starts[a:b], laid.lengths[a:b])

    def window(self, row: int) -> WindowRows:
        """Lay out the window that holds a row: about 2 microseconds a document."""
        window = self.schedule.window(row)
        salt = salt_of(self.seed, window.first_row, 2)
        found = [
            (component, self._ranges[component].pieces(start, stop))
            for component, (start, stop) in enumerate(zip(window.starts, window.stops, strict=True))
            if start < stop
        ]
        components = np.repeat([k for k, _ in found], [len(pieces.lengths) for _, pieces in found])
        pieces = Pieces(*(np.concatenate(arrays) for arrays in zip(*(part for _, part in found), strict=True)))
        order = np.argsort(mix_array(np.arange(len(components)) ^ np.int64(salt >> 1)), kind="stable")
        components, pieces = components[order], Pieces(*(array[order] for array in pieces))
        parts = _LAYOUTS[self.packing](pieces.lengths, self.seq_len, window.num_rows)
        shape = (window.num_rows, len(self.components))
        held = np.bincount(parts.rows * shape[1] + components[parts.pieces], parts.lengths, shape[0] * shape[1])
        rows = spread_evenly(held.reshape(shape).astype(np.int64), salt)[parts.rows]
        order = np.argsort(rows, kind="stable")
        bounds = np.zeros(window.num_rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=window.num_rows), out=bounds[1:])
        of = parts.pieces[order]
        starts = pieces.starts[of] + parts.offsets[order]
        return WindowRows(components[of], pieces.documents[of], starts, parts.lengths[order], bounds)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by arguments: a worker process makes its windows anew, and maps what is kept on disk."""
        return _rebuild, (
            self.components, self.segments, self.seq_len, self.seed, self.packing, self.eod_id, self.vocab_size,
        )  # fmt: skip


def window_rows(components: Sequence[Component], shares: Sequence[Fraction], seq_len: int) -> int:
    """Rows of a window: as many as hold 16,384 documents of a mixture of these shares, between 256 and 4,096."""
    a_row = sum(
        seq_len * share * len(part.documents) / Fraction(part.documents.num_tokens)
        for part, share in zip(components, shares, strict=True)
    )
    return min(MOST_ROWS, max(WINDOW_ROWS, -int(-WINDOW_DOCUMENTS // a_row)))


def row_tokens(packing: str, seq_len: int, rows: int) -> Fraction:
    """Tokens of documents in a row on average: all but half a row a window, where the packing pads."""
    return seq_len * (1 - Fraction(1, 2 * rows)) if packing == "best_fit" else Fraction(seq_len)


def _rebuild(
    components: Sequence[Component],
    segments: Sequence[Segment],
    seq_len: int,
    seed: int,
    packing: str,
    eod_id: int,
    vocab_size: int | None,
) -> TokenMixture:
    return TokenMixture(
        components, segments, seq_len=seq_len, seed=seed, packing=packing, eod_id=eod_id, vocab_size=vocab_size
    )
