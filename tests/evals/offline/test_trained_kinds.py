"""Training's needles asked offline: the samples of a run and its figures, from the same weights, by another way."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.config.evals import NEEDLE_KINDS
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.offline.request import EvalRequest
from mmtrain.evals.offline.run import SampleLog, run_units
from mmtrain.evals.offline.summary import summarise
from mmtrain.evals.offline.table import tables
from mmtrain.evals.offline.units import Unit, Work, list_units
from mmtrain.evals.ruler.prompt import Kit
from mmtrain.evals.sample import Cell, SampleBuilder
from mmtrain.evals.score import score_cells
from mmtrain.infer.answering import EngineAnswerer, options_for
from mmtrain.infer.engine import Engine
from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import ModelInputs
from tests.evals.answerers import Copier, Guesser
from tests.evals.text import TOKENIZER, VOCAB, Model, split
from tests.model.small import small_model

DEPTHS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Haystack:
    return Haystack(split(tmp_path_factory.mktemp("text")), "held.toy", TOKENIZER, VOCAB)


def test_a_run_s_figures_are_those_of_its_checkpoint_offline(haystack: Haystack, tmp_path: Path) -> None:
    served = small_model(vocab_size=VOCAB, num_layers=3, layer_pattern="LLS").eval()

    class Trained(Model):
        def score_labels(self, batch: ModelInputs) -> LabelScore:
            with torch.no_grad():
                return served(*batch, score=True)

    builder = SampleBuilder(haystack, TOKENIZER, 5)
    cells = [Cell(kind, 700, depth) for kind in NEEDLE_KINDS for depth in DEPTHS]
    of_run = [score.record(2, haystack.laps(600)) for score in score_cells(Trained(), builder, cells, 2, 1e4)]
    request = EvalRequest(NEEDLE_KINDS, (700,), samples=2 * len(DEPTHS), seed=5, depths=DEPTHS)
    answerer = EngineAnswerer(Engine(served, TOKENIZER, replace(options_for(700), memory_bytes=1 << 26)))
    records = run_units(list_units(request, Kit(TOKENIZER, haystack)), answerer, request,
                        SampleLog(tmp_path / "x.jsonl"), 4, lambda record: None)  # fmt: skip
    summary = summarise(records)
    offline = summary["cells"]
    assert len(offline) == len(of_run) == 12
    for ours, theirs in zip(offline, of_run, strict=True):
        assert {**ours, "nats": 0, "repeats": 0} == {**theirs, "nats": 0, "repeats": 0}
        assert ours["nats"] == pytest.approx(theirs["nats"], abs=1e-5) and 4 < ours["nats"] < 8
    mean = sum(cell["nats"] for cell in of_run[:3]) / 3
    assert f"nats an answer token    700\nsingle                {mean:.3f}\n" in tables(summary)
    assert len({record["hash"] for record in records}) == len(records)


def test_a_copier_gets_all_and_a_guesser_nothing(haystack: Haystack, tmp_path: Path) -> None:
    request = EvalRequest(NEEDLE_KINDS, (1000, 4096), samples=3, depths=DEPTHS)
    units = list_units(request, Kit(TOKENIZER, haystack))
    for unit in units:
        assert len(unit.prepare().rows[0]) == unit.length
    for answerer, score in ((Copier(), 100), (Guesser(), 0)):
        log = SampleLog(tmp_path / f"{score}.jsonl")
        found = summarise(run_units(units, answerer, request, log, 8, lambda record: None))
        assert [row["score"] for row in found["scores"]] == [score] * 8
        tokens = [cell["tokens"] for cell in found["cells"]]
        assert np.mean(tokens) == 100 if score else np.mean(tokens) < 15
        assert {row["task"] for row in found["scores"]} == {*NEEDLE_KINDS}  # no mean over RULER's


def test_long_samples_are_asked_alone_and_short_ones_together(tmp_path: Path) -> None:
    sizes: list[list[int]] = []

    class Notes(Copier):
        def score(self, rows: list[np.ndarray], starts: list[int]) -> list:
            sizes.append([len(row) for row in rows])
            return super().score(rows, starts)

    lengths = [4, 2**19, 2**19, 2**19, 2**20 + 1, 9, 9, 9]
    works = [Work(str(i), [np.zeros(n, np.int64)], 0, lambda scores: {"score": 0.0}, {}) for i, n in enumerate(lengths)]
    units = [Unit("choices", None, None, i, partial(works.__getitem__, i)) for i in range(len(works))]
    run_units(units, Notes(), EvalRequest(("choices",)), SampleLog(tmp_path / "x"), 2, lambda record: None)
    assert sizes == [[4, 2**19], [2**19, 2**19], [2**20 + 1], [9, 9], [9]]
