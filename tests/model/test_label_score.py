"""Score of labels against all logits at once: the argmax and the cross-entropy, ties, chunks, no labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmtrain.model.label_score import LabelScore, score_labels
from mmtrain.model.loss import IGNORE
from mmtrain.model.packed_seq import Packing
from tests.model.small import draw, draw_tokens, small_model

T, D, V = 90, 8, 23


def full(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> tuple[int, int, Tensor]:
    """The three sums, a token at a time, from all logits."""
    logits_TV = x_TD @ weight_VD.t()
    labelled = correct = 0
    nats = torch.zeros((), dtype=torch.float64)
    for logits_V, label in zip(logits_TV, labels_T.tolist(), strict=True):
        if label != IGNORE:
            labelled += 1
            correct += logits_V.tolist().index(max(logits_V.tolist())) == label
            nats -= logits_V.log_softmax(0)[label]
    return labelled, correct, nats


def labels() -> Tensor:
    """A third of the tokens has the best label, a third another one, the rest none."""
    labels_T = (draw(T, D) @ draw(V, D, seed=1).t()).argmax(1)
    labels_T[::3] = draw_tokens(T, vocab=V)[::3]
    labels_T[1::3] = IGNORE
    return labels_T


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_score_is_that_of_all_logits(chunk: int, dtype: torch.dtype) -> None:
    x_TD, weight_VD = draw(T, D), draw(V, D, seed=1)
    labelled, correct, nats = full(x_TD, weight_VD, labels())
    score = score_labels(x_TD.to(dtype), weight_VD.to(dtype), labels(), chunk)
    assert (int(score.labelled), int(score.correct)) == (labelled, correct) and 0 < correct < labelled
    assert score.ce_sum.dtype == dtype
    torch.testing.assert_close(score.ce_sum.double(), nats, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


def test_parts_of_a_row_add_up() -> None:
    x_TD, weight_VD, whole = draw(T, D), draw(V, D, seed=1), labels()
    parts = [score_labels(x, weight_VD, y, 7) for x, y in zip(x_TD.split(40), whole.split(40), strict=True)]
    score = score_labels(x_TD, weight_VD, whole, 7)
    for name in LabelScore._fields:
        assert sum(float(getattr(part, name)) for part in parts) == pytest.approx(
            float(getattr(score, name)), rel=1e-12
        )


def test_of_equal_logits_the_first_is_the_largest() -> None:
    """A model that says the same of every token gets only token 0 right."""
    x_TD, weight_VD = torch.zeros(V, D), torch.zeros(V, D)
    assert int(score_labels(x_TD, weight_VD, torch.arange(V), 5).correct) == 1


def test_nothing_is_right_where_a_logit_is_not_a_number() -> None:
    x_TD, weight_VD = torch.ones(3, 1), torch.tensor([[0.0], [torch.nan], [2.0]])
    assert int(score_labels(x_TD, weight_VD, torch.arange(3), 5).correct) == 0


def test_no_label_is_no_score() -> None:
    score = score_labels(draw(T, D), draw(V, D), torch.full((T,), IGNORE), 7)
    assert [float(figure) for figure in score] == [0.0, 0.0, 0.0]


def test_a_model_scores_what_its_logits_say() -> None:
    model, tokens_T = small_model().eval(), draw_tokens(T)
    packing = Packing.from_lengths([50, 40])
    with torch.no_grad():
        logits_TV = model(tokens_T, packing)
        labels_T = torch.where(torch.arange(T) % 2 == 0, logits_TV.argmax(1), (logits_TV.argmax(1) + 1) % 160)
        labels_T[:10] = IGNORE
        score = model(tokens_T, packing, labels_T, score=True)
        loss = model(tokens_T, packing, labels_T)
    assert (int(score.labelled), int(score.correct)) == (80, 40)
    assert float(score.ce_sum) == pytest.approx(float(loss.ce_sum), rel=1e-5)
