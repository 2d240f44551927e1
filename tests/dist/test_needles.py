"""Scores of labels and of needles under layouts against one process."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, ParallelConfig
from mmtrain.evals.sample import Cell
from mmtrain.evals.score import score_cells
from mmtrain.model.label_score import LabelScore, score_labels
from mmtrain.model.loss import IGNORE
from mmtrain.model.model import ModelInputs
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.parallel.tensor.vocab_score import VocabParallelScore
from tests.dist.layouts import MODEL
from tests.dist.pool import Pool
from tests.dist.test_vocab import CHUNK, SHARDS, T, V, hidden, labels, place, table
from tests.evals.text import VOCAB, builder

SMALL = replace(MODEL, num_layers=2, layer_pattern="LS", vocab_size=VOCAB)
LENGTH, BASE = 480, 1e4
CELLS = [Cell(kind, LENGTH, depth) for kind in ("single", "multi_key") for depth in (0.0, 1.0)]


def split_score(shards: list[int], labels_T: Tensor, dtype: torch.dtype) -> LabelScore:
    group, rank, first = place(shards)
    weight_ND = table(dtype).split(shards)[rank]
    return VocabParallelScore(first, group)(hidden(dtype).chunk(len(shards))[rank], weight_ND, labels_T, CHUNK)


@pytest.mark.parametrize("shards", [s for s in SHARDS if len(s) in (2, 4)][:3])
def test_a_split_vocabulary_scores_like_the_whole_one(pool: Pool, shards: list[int]) -> None:
    labels_T = (hidden(torch.float64) @ table(torch.float64).t()).argmax(1)
    labels_T[::4] = labels()[::4].clamp(min=0)
    labels_T[labels() == IGNORE] = IGNORE
    one = score_labels(hidden(torch.float64), table(torch.float64), labels_T, CHUNK)
    assert 0 < one.correct < one.labelled
    for rank, many in enumerate(pool.run(split_score, shards, labels_T, torch.float64, world=len(shards))):
        assert (many.labelled, many.correct) == (one.labelled, one.correct), rank
        torch.testing.assert_close(many.ce_sum, one.ce_sum, rtol=1e-12, atol=0)


def test_equal_logits_of_two_ranks_are_the_first_one_s(pool: Pool) -> None:
    (score, same) = pool.run(tied, world=2)
    assert int(score.correct) == int(same.correct) == 1 and int(score.labelled) == T


def tied() -> LabelScore:
    """Labels 0 to T - 1 of a head that gives every token the same logits."""
    group, rank, first = place([51, 50])
    x_SD, weight_ND = torch.zeros(T // 2, 4), torch.zeros(V, 4).split([51, 50])[rank]
    return VocabParallelScore(first, group)(x_SD, weight_ND, torch.arange(T), CHUNK)


def figures(parallel: ParallelConfig, best_T: Tensor | None, folder: str, model: ModelConfig) -> dict:
    """Scores of a row with labels, and of needles, on this rank of the world."""
    layout = plan_layout(mesh.world_size(), parallel, model, [LENGTH])
    try:
        context = mesh.start(ClusterConfig(device="cpu"), layout)
        laid = apply_parallel(meta_model(model), context, parallel, torch.float32)
        laid.initialise(7)
        tokens_T = torch.arange(LENGTH) * 7 % VOCAB
        packing = Packing.from_lengths([LENGTH])
        if best_T is None:  # one process: it says which labels are right
            with laid.evaluating(), torch.no_grad():
                best_T = laid.module(tokens_T, packing, None, BASE).argmax(1)
        labels_T = torch.where(torch.arange(LENGTH) % 3 == 0, (best_T + 1) % VOCAB, best_T)
        labels_T[LENGTH // 5 : LENGTH // 2] = IGNORE
        with laid.evaluating():
            score = laid.score_labels(ModelInputs(tokens_T, packing, labels_T, BASE))
            loss = laid.evaluate(ModelInputs(tokens_T, packing, labels_T, BASE))
        path = Path(folder) / str(context.rank)
        path.mkdir(exist_ok=True)
        found = score_cells(laid, builder(path), CELLS, 3, BASE)  # 12 samples, whatever the ranks
        row = None if score is None else [float(figure) for figure in score]
        return {"best": best_T, "row": row, "loss": None if loss is None else loss.item(), "cells": found}
    finally:
        mesh.stop()


def test_layouts_score_like_one_process(pool: Pool, tmp_path: Path) -> None:
    """Tensor, data, pipeline, expert and context parallelism, each over two ranks."""
    check(pool, tmp_path, SMALL, [{"tp": 2}, {}, {"pp": 2}, {"tp": 2, "ep": 2}, {"cp": 2, "cp_chunks": 2}], world=2)


@pytest.mark.slow
def test_layouts_of_several_axes_score_like_one_process(pool: Pool, tmp_path: Path) -> None:
    deep = replace(SMALL, num_layers=4, layer_pattern="LLLS")
    chunks = {"pp": 2, "pp_chunks": 2, "pp_schedule": "interleaved"}
    check(pool, tmp_path, deep, [{"tp": 2, "pp": 2}, {**chunks, "tp": 2}, {"tp": 2, "ep": 2, "etp": 2}], world=4)


def check(pool: Pool, folder: Path, model: ModelConfig, layouts: list[dict], world: int) -> None:
    (one,) = pool.run(figures, ParallelConfig(), None, str(folder), model, world=1)
    assert 0 < one["row"][1] < one["row"][0] == LENGTH - (LENGTH // 2 - LENGTH // 5)
    assert one["row"][2] == pytest.approx(one["loss"], rel=1e-5)
    for options in layouts:
        ranks = pool.run(figures, ParallelConfig(**options), one["best"], str(folder), model, world=world)
        assert ("pp" in options) == any(rank["row"] is None for rank in ranks)
        if "cp" in options:  # each has the labels of its own tokens
            assert [sum(figure) for figure in zip(*(rank["row"] for rank in ranks), strict=True)] == pytest.approx(
                one["row"], rel=1e-5
            )
        for rank in ranks:
            assert "cp" in options or rank["row"] is None or rank["row"] == pytest.approx(one["row"], rel=1e-5), options
            for mine, theirs in zip(rank["cells"], one["cells"], strict=True):
                assert astuple(mine)[:3] == astuple(theirs)[:3], options
                assert mine.nats == pytest.approx(theirs.nats, rel=1e-4), options
