"""Rows cut over ranks: every token lies on one rank, and documents are followed from rank to rank."""

from __future__ import annotations

import random

import pytest

from mmtrain.infer.context.row_cut import RowCut


def owners(cut: RowCut) -> list[tuple[int, int]]:
    """Document and rank of each token, told by the pieces."""
    return [(piece.document, rank) for rank in range(cut.ranks) for piece in cut.pieces(rank)
            for _ in range(piece.first, piece.stop)]  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_pieces_make_up_the_row(seed: int) -> None:
    rng = random.Random(seed)
    ranks = rng.randint(1, 8)
    lengths = [rng.choice([1, 1, 2, 3, 40]) for _ in range(rng.randint(1, 9))]
    lengths.append(max(1, ranks - sum(lengths)))
    cut = RowCut(tuple(lengths), ranks)
    document_T = [document for document, length in enumerate(lengths) for _ in range(length)]
    rank_T = [rank for rank in range(ranks) for _ in cut.span(rank)]
    assert owners(cut) == list(zip(document_T, rank_T, strict=True))
    assert min(cut.sizes) >= 1 and max(cut.sizes) - min(cut.sizes) <= 1 and sum(cut.sizes) == len(document_T)
    for rank in range(ranks):
        mine = document_T[cut.edges[rank]]
        before = {rank_T[t] for t in range(cut.edges[rank]) if document_T[t] == mine}
        assert set(cut.earlier(rank)) == before
        for other in before:
            assert cut.pieces(other)[-1].document == mine
    assert cut.crosses == any(len({r for d, r in owners(cut) if d == document}) > 1 for document in range(len(lengths)))
