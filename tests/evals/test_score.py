"""The same scoring of a model that reads and copies, of one that guesses, and of untrained weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmtrain.evals.sample import Cell, SampleBuilder
from mmtrain.evals.score import score_cells
from mmtrain.evals.tasks import TASKS
from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import ModelInputs
from tests.evals.text import VOCAB, Guesser, Model, Oracle, builder
from tests.model.small import small_model

LENGTH = 1000
CELLS = [Cell(kind, LENGTH, depth) for kind in TASKS for depth in (0.0, 0.5, 1.0)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleBuilder:
    return builder(tmp_path_factory.mktemp("text"))


def test_an_oracle_that_copies_scores_100(made: SampleBuilder) -> None:
    scores = score_cells(Oracle(), made, CELLS, 2, 1e4)
    assert [score.cell for score in scores] == CELLS
    assert all(score.passed == score.tokens == 100 for score in scores)
    assert all(score.nats < torch.tensor(float(VOCAB)).log() for score in scores)


def test_a_guesser_scores_nothing(made: SampleBuilder) -> None:
    scores = score_cells(Guesser(), made, CELLS, 2, 1e4)
    assert all(score.passed == 0 and score.tokens < 15 for score in scores)


class Untrained(Model):
    """Initial weights of a small model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model(vocab_size=VOCAB).eval()

    def score_labels(self, batch: ModelInputs) -> LabelScore:
        with torch.no_grad():
            return self.model(*batch, score=True)


def test_untrained_weights_score_nothing(made: SampleBuilder) -> None:
    cells = [Cell("single", 300, 0.5), Cell("multi_key", 300, 0.5)]
    for score in score_cells(Untrained(), made, cells, 4, 1e4):
        assert score.passed == 0 and score.tokens < 15 and 4 < score.nats < 8


def test_one_wrong_token_fails_its_sample_alone(made: SampleBuilder) -> None:
    class Slips(Oracle):
        def predict(self, tokens: list[int]) -> int:
            slip = len(self.scored) == 2 and tokens[-1] in b" "
            return 0 if slip else super().predict(tokens)

    (score,) = score_cells(Slips(), made, [Cell("single", LENGTH, 0.5)], 4, 1e4)
    assert score.passed == 75 and score.tokens == pytest.approx(100 * (1 - 1 / 32))


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_take_samples_in_turn_and_surplus_ones_do_not_count(made: SampleBuilder, ranks: int) -> None:
    cells = [Cell("single", LENGTH, 0.0), Cell("multi", LENGTH, 1.0)]
    sums = []
    for rank in range(ranks):
        model = Oracle()
        model.context = SimpleNamespace(dp_rank=rank, dp_size=ranks, device=torch.device("cpu"))
        model.sum_over_ranks = lambda x: sums.append(x.clone()) or x.clamp(min=1)
        score_cells(model, made, cells, 3, 1e4)
        assert model.scored == [LENGTH] * -(-6 // ranks)
    assert (sum(sums) == torch.stack(sums).amax(0)).all()  # each sample on one rank
    assert (sum(sums)[:, 0] == sum(sums)[:, 1]).all() and sum(sums)[:, 0].tolist() == [8] * 3 + [32] * 3
