"""Loss by position against a plain loop, to the last token; rows of held-out text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmtrain.errors import ConfigError
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.perplexity import bucket_edges, bucket_nats, loss_by_position, text_row
from tests.evals.answerers import Bigrams
from tests.evals.text import TOKENIZER, VOCAB, split


@pytest.mark.parametrize("length", [2, 3, 16, 17, 1000, 4096, 2**20])
def test_buckets_grow_and_hold_each_position_once(length: int) -> None:
    edges = bucket_edges(length)
    assert edges[0] == 1 and edges[-1] == length and (np.diff(edges) > 0).all()
    wide = edges[:-1] >= 8
    assert (edges[1:][wide] / edges[:-1][wide] <= 1.52).all()


@pytest.mark.parametrize("length", [2, 77, 1024])
def test_losses_are_those_of_a_plain_loop(length: int) -> None:
    model, rng = Bigrams(), np.random.default_rng(3)
    rows = [rng.integers(0, 257, length) for _ in range(3)]
    made = loss_by_position(length, [bucket_nats(one.log_probs_N) for one in model.score(rows, [1] * 3)])
    for bucket in made:
        losses = [-float(model.log_probs_VV[row[i - 1], row[i]]) for row in rows
                  for i in range(bucket["first"], bucket["last"] + 1)]  # fmt: skip
        assert bucket["tokens"] == len(losses) and bucket["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert made[-1]["last"] == length - 1 and sum(bucket["tokens"] for bucket in made) == 3 * (length - 1)


def test_rows_are_documents_where_they_are_long_enough(tmp_path: Path) -> None:
    held_out = split(tmp_path)
    haystack = Haystack(held_out, "x", TOKENIZER, VOCAB)
    lengths = sorted(map(int, held_out.corpus.doc_lengths))
    rows = [text_row(haystack, lengths[-3] - 1, 0, index) for index in range(4)]
    assert all(whole for _, whole in rows)
    documents = {tuple(held_out.corpus.document(i)[: lengths[-3] - 1]) for i in range(40)}
    assert {tuple(row) for row, _ in rows} <= documents and len({tuple(row) for row, _ in rows}) == 3
    row, whole = text_row(haystack, lengths[-1], 0, 0)
    assert not whole and len(row) == lengths[-1] and TOKENIZER.eod_id not in row
    assert (text_row(haystack, lengths[-1], 0, 0)[0] == row).all()
    assert (text_row(haystack, lengths[-1], 0, 1)[0] != row).any()
    with pytest.raises(ConfigError, match="repeated, it would flatter"):
        text_row(haystack, haystack.num_tokens + 1, 0, 0)
