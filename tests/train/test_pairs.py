"""Pairs of batches: which are learned from, whose documents they are, what the reference says of them; early stop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmtrain.errors import ConfigError
from mmtrain.train.early_stop import EarlyStop
from mmtrain.train.pairs import PairFigures, References, usable_pairs
from mmtrain.train.reference_pass import Part
from mmtrain.train.step import model_inputs
from tests.dist.layouts import micro_batch
from tests.dist.pair_steps import BETA, pair_batch, pair_row, references

CPU = torch.device("cpu")


def test_pairs_are_named_by_their_documents() -> None:
    found = references().pairs_of(pair_batch(0, 3, bare=(1,)), CPU)
    assert found.document_P2.tolist() == [[0, 1], [3, 4], [10, 11], [13, 14]]
    known = references()._log_probs
    assert found.reference_P2.tolist() == [list(known[f"row/{i}"]) for i in (0, 1, 4, 5)]
    assert found.beta == BETA


def test_rows_of_text_have_no_pairs() -> None:
    for batch in (micro_batch(0, 2), pair_batch(0, 1, bare=(0,))):
        found = references().pairs_of(batch, CPU)
        assert found.document_P2.shape == found.reference_P2.shape == (0, 2)
        assert references().count(batch) == 0
    assert model_inputs(pair_row(0), 1e4, CPU).pairs is None


@pytest.mark.parametrize("answer", [slice(0, 12), slice(12, 22)], ids=["chosen", "rejected"])
def test_a_pair_without_labels_on_an_answer_is_left_out(answer: slice) -> None:
    """As where its image could not be had."""
    row = pair_row(0)
    mask = row.loss_mask_BS.clone()
    mask[0, answer] = False
    assert usable_pairs(replace(row, loss_mask_BS=mask)) == [1]
    known = {"row/0": None, "row/1": (-1.0, -2.0)}
    for batch in (replace(row, loss_mask_BS=mask), row):  # now, or when the reference was computed
        assert References(BETA, known).pairs_of(batch, CPU).document_P2.tolist() == [[3, 4]]
        assert References(BETA, known).count(batch) == 1


def test_a_pair_that_the_reference_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="row/1: the reference knows no such pair"):
        References(BETA, {"row/0": (0.0, 0.0)}).count(pair_row(0))
    assert References(BETA).pairs_of(pair_row(0), CPU).reference_P2.tolist() == [[0, 0], [0, 0]]


def test_figures_are_means_over_pairs() -> None:
    found = PairFigures.of([4.0, 3.0, 2.0, 1.0, -1.0])
    assert found == PairFigures(4, 0.75, 0.5, 0.25, -0.25)
    assert found.record("val_")["val_pair_accuracy"] == 0.75
    assert PairFigures.of([0.0] * 5) == PairFigures(0, 0, 0, 0, 0)


@pytest.mark.parametrize(("rows", "ranks"), [(7, 2), (3, 4), (8, 4), (1, 1)])
def test_a_part_is_shared_out_whole_and_evenly(rows: int, ranks: int) -> None:
    shares = [Part(0, 0, range(10, 10 + rows)).share(rank, ranks) for rank in range(ranks)]
    assert {row for share in shares for row in share} == set(range(10, 10 + rows))
    assert {len(share) for share in shares} == {-(-rows // ranks)}


def test_a_run_ends_after_so_many_validations_without_a_lower_loss() -> None:
    stop, ended = EarlyStop(2), []
    for step, loss in enumerate([0.7, 0.6, 0.6, float("nan"), 0.5], start=1):
        stop.take(step, loss)
        ended.append(stop.reached)
    assert ended == [False, False, False, True, False] and (stop.best, stop.best_step) == (0.5, 5)
    again = EarlyStop(2)
    again.restore(stop.state())
    assert again.__dict__ == stop.__dict__ and again.is_best(5) and not again.is_best(4)
    never = EarlyStop(None)
    for step in range(9):
        never.take(step, 1.0)
    assert not never.reached and not never.is_best(0)
