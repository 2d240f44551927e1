"""`Row`, one packed row with its labels and masks, and its assembly from the pieces of documents that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdata.corpus.protocol import Corpus
from mmdata.rows.pieces import Pieces


@dataclass(frozen=True)
class Row:
    """One packed row of s tokens.

    Attributes:
        tokens: int32[s].
        labels: int32[s], the next token of the same document, even where that is in another row.
        loss_mask: bool[s], False at each document's last token and in padding (where labels are EOD).
        position_ids: int32[s], from 0 in each piece of a document, and in the padding.
        cu_seqlens: int32[n + 1], where each piece begins, then s. Padding is a piece of its own, the last.
        real_tokens: tokens before the padding, at least 1; None if rows of this packing never have any.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    real_tokens: int | None = None


def assemble(
    corpora: Sequence[tuple[Corpus, np.ndarray | slice]],
    pieces: Pieces,
    *,
    seq_len: int,
    eod_id: int,
    vocab_size: int | None,
    pads: bool,
) -> Row:
    """Read the tokens of a row's pieces and lay them end to end, then padding.

    Args:
        corpora: each corpus that the row reads, with which of the pieces are its own (indices in increasing order, or
            a slice). Together they are all pieces, each once.
        pieces: in the order of the row, of at most `seq_len` tokens together.
        seq_len: tokens of the row.
        eod_id: fills padding, and labels that do not count.
        vocab_size: if given, tokens are checked against it.
        pads: whether the packing may pad.

    Raises:
        DataError: a token outside the vocabulary, with its document.
    """
    edges = np.zeros(len(pieces.lengths) + 1, dtype=np.int64)
    np.cumsum(pieces.lengths, out=edges[1:])
    real, last = int(edges[-1]), edges[1:] - 1
    steps = np.arange(real)
    tokens, labels = np.full(seq_len, eod_id, dtype=np.int32), np.full(seq_len, eod_id, dtype=np.int32)
    mask = np.ones(seq_len, dtype=np.bool_)
    mask[real:] = False
    for corpus, own in corpora:
        documents, lengths, begins = pieces.documents[own], pieces.lengths[own], edges[:-1][own]
        shift = np.repeat(corpus.doc_offsets[documents] + pieces.starts[own] - begins, lengths)
        places = steps if isinstance(own, slice) else _places(begins, lengths)
        index = places + shift
        stored = corpus.data[index]
        _check(corpus, stored, index, vocab_size)  # before narrowing to int32, which could hide an id out of range
        tokens[places] = stored
    labels[: real - 1] = tokens[1:real]
    for corpus, own in corpora:
        documents, ends = pieces.documents[own], last[own]
        stops = (pieces.starts + pieces.lengths)[own]
        closed = stops == corpus.doc_lengths[documents]  # pieces that end their document
        labels[ends[closed]] = eod_id
        mask[ends[closed]] = False
        goes_on = ~closed  # in another row
        if goes_on.any():
            following = corpus.doc_offsets[documents[goes_on]] + stops[goes_on]
            values = corpus.data[following]
            _check(corpus, values, following, vocab_size)
            labels[ends[goes_on]] = values
    positions = np.empty(seq_len, dtype=np.int32)
    positions[:real] = steps - np.repeat(edges[:-1], pieces.lengths)
    if real < seq_len:
        positions[real:] = np.arange(seq_len - real)
        edges = np.append(edges, seq_len)
    return Row(tokens, labels, mask, positions, edges.astype(np.int32), real if pads else None)


def _places(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Places in the row of the tokens of pieces that begin there, int64[tokens]."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1])) + np.repeat(begins - (ends - lengths), lengths)


def _check(corpus: Corpus, values: np.ndarray, index: np.ndarray, vocab_size: int | None) -> None:
    """Raise the DataError for the first of `values` (from `index` of the corpus) that is out of range."""
    if vocab_size is None:
        return
    if values.max() >= vocab_size or values.min() < 0:
        bad = int(np.flatnonzero((values >= vocab_size) | (values < 0))[0])
        corpus.refuse_token(int(index[bad]), vocab_size)
