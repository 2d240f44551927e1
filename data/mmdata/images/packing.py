"""Where documents with images may be cut, and which of them fit into rows at all."""

from __future__ import annotations

import numpy as np

from mmdata.corpus.documents import Documents
from mmdata.images.corpus import ImageCorpus
from mmdata.rows.pieces import Pieces

CUT_VERSION = {"cut": "before images", "version": 1}


def cut_before_images(corpus: ImageCorpus, documents: np.ndarray, lengths: np.ndarray, row: int) -> Pieces:
    """Cut documents into pieces of at most a row, longest first, and no image into two.

    A piece is as long as a row; where that would cut an image, it ends before the image.

    Args:
        corpus: of the documents.
        documents: int64[n], ids.
        lengths: int64[n], tokens of each.
        row: tokens of a row; no image of these documents has more.
    """
    whole = lengths <= row
    found = [(documents[whole], np.zeros(int(whole.sum()), dtype=np.int64), lengths[whole])]
    for document, length in zip(documents[~whole].tolist(), lengths[~whole].tolist(), strict=True):
        cuts = np.array(_cuts(corpus, document, length, row), dtype=np.int64)
        found.append((np.full(len(cuts) - 1, document, dtype=np.int64), cuts[:-1], np.diff(cuts)))
    ids, starts, sizes = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = np.argsort(-sizes, kind="stable")
    return Pieces(ids[order], starts[order], sizes[order])


def fitting(corpus: ImageCorpus, documents: Documents, row: int) -> tuple[Documents, np.ndarray]:
    """Documents that rows of `row` tokens can hold, and the ids of the others, int64[m], in order.

    A document is left out if one of its images is longer than a row, or if it is a preference pair that is: the two
    answers of a pair must be in one row.
    """
    large = np.flatnonzero(corpus.places["tokens"] > row)
    left_out = corpus.documents_of(corpus.places["first"][large])
    pairs = np.flatnonzero((corpus.halves > 0) & (corpus.doc_lengths > row))
    left_out = np.union1d(left_out, pairs)
    ids = np.arange(len(documents)) if documents.ids is None else np.asarray(documents.ids)
    stays = ~np.isin(ids, left_out)
    if stays.all():
        return documents, np.empty(0, dtype=np.int64)
    lengths = np.asarray(documents.lengths)[stays]
    return Documents(ids[stays], lengths, int(lengths.sum())), ids[~stays]


def _cuts(corpus: ImageCorpus, document: int, length: int, row: int) -> list[int]:
    """Where the pieces of a document begin and the last ends, in tokens of the document."""
    begin = int(corpus.doc_offsets[document])
    images = corpus.images_between(begin, begin + length)
    firsts, ends = images["first"] - begin, images["first"] - begin + images["tokens"]
    cuts = [0]
    while length - cuts[-1] > row:
        stop = cuts[-1] + row
        image = int(np.searchsorted(firsts, stop)) - 1  # the last that begins before the cut
        cuts.append(int(firsts[image]) if image >= 0 and ends[image] > stop else stop)
    return [*cuts, length]
