"""Log-probabilities of documents from a chunked head, and the loss of preference pairs, against plain float64."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mmtrain.model import document_score
from mmtrain.model.document_score import document_log_probs
from mmtrain.model.gradient_sum import whole_gradient
from mmtrain.model.loss import IGNORE
from mmtrain.model.packed_seq import documents_of
from mmtrain.model.preference import PreferenceLoss, PreferencePairs, pair_scores, preference_loss

D, V, BETA = 12, 37, 0.3
LENGTHS = [9, 4, 1, 20, 6, 6, 3, 2]  # with chunks of 8 they span one, two and four
EMPTY, UNPAIRED = 6, 7
PAIRS = torch.tensor([[0, 1], [3, 2], [5, 4], [6, 4]])  # lengths differ, one comes before its other, one is used twice
T = sum(LENGTHS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, labels and bounds of documents; some prompt tokens, and all of a document, have no label."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    x_TD[::7] *= 5
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels_T = torch.randint(0, V, (T,), generator=generator)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    labels_T[1:5] = IGNORE
    labels_T[bounds[EMPTY] : bounds[EMPTY + 1]] = IGNORE
    return x_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), labels_T, bounds


def reference_pairs() -> PreferencePairs:
    return PreferencePairs(
        PAIRS, torch.randn(PAIRS.shape, generator=torch.Generator().manual_seed(3)).double() - 20, BETA
    )


def loss_of(log_prob_N: Tensor, pairs: PreferencePairs) -> PreferenceLoss:
    return preference_loss(pair_scores(log_prob_N, pairs), pairs)


def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums, loss, and gradients of x and the head, all in float64, document by document."""
    x_TD, weight_VD, labels_T, bounds = inputs(dtype)
    x_TD, weight_VD = (one.detach().double().requires_grad_() for one in (x_TD, weight_VD))
    sums = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        total = x_TD.new_zeros(())
        for place in range(start, end):
            if labels_T[place] != IGNORE:
                total = total + torch.log_softmax(weight_VD @ x_TD[place], 0)[labels_T[place]]
        sums.append(total)
    pairs, loss = reference_pairs(), 0.0
    for (chosen, rejected), (q_c, q_r) in zip(PAIRS.tolist(), pairs.reference_P2, strict=True):
        margin = BETA * ((sums[chosen] - sums[rejected]) - (q_c - q_r))
        loss = loss - torch.log(1 / (1 + torch.exp(-margin)))
    loss.backward()
    return torch.stack(sums).detach(), loss.detach(), x_TD.grad, weight_VD.grad


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("chunk", [1, 8, T, 100])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
def test_the_loss_of_pairs_and_its_gradients(dtype: torch.dtype, chunk: int, kernels: bool) -> None:
    if kernels and (dtype == torch.float64 or chunk == 1):
        pytest.skip("kernels work in fp32; the interpreter takes long")
    x_TD, weight_VD, labels_T, bounds = inputs(dtype)
    expected_N, expected, expected_dx, expected_dw = plain(dtype)
    with patch.object(document_score, "has_kernel", lambda _: kernels):
        document_T = documents_of(bounds, T)
        sums_N = document_log_probs(x_TD, weight_VD, labels_T, document_T, len(LENGTHS), chunk)
        assert sums_N.dtype == torch.float64
        close(sums_N, expected_N, dtype)
        assert sums_N[EMPTY] == 0
        found = loss_of(sums_N, reference_pairs())
        found.loss.backward()
    close(found.loss.detach(), expected, dtype)
    close(x_TD.grad, expected_dx, dtype)
    close(weight_VD.grad, expected_dw, dtype)
    assert x_TD.grad.dtype == weight_VD.grad.dtype == dtype
    alone = slice(bounds[UNPAIRED], bounds[UNPAIRED + 1])
    assert not x_TD.grad[alone].any() and not x_TD.grad[1:5].any()


def test_a_weight_s_sum_takes_the_gradient_whatever_factor_was_left_there() -> None:
    x_TD, weight_VD, labels_T, bounds = inputs(torch.float64)
    weight_VD.gradient_sum, weight_VD.gradient_factor = torch.zeros_like(weight_VD), torch.tensor(5.0)
    _, _, expected_dx, expected_dw = plain(torch.float64)
    for _ in range(2):  # micro-batches
        sums_N = document_log_probs(x_TD, weight_VD, labels_T, documents_of(bounds, T), len(LENGTHS), 8)
        loss_of(sums_N, reference_pairs()).loss.backward()
    assert weight_VD.grad is None
    close(whole_gradient(weight_VD).detach(), 2 * expected_dw, torch.float64)
    close(x_TD.grad, 2 * expected_dx, torch.float64)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    x_TD, weight_VD, labels_T, bounds = inputs(torch.float64)
    (x_TD if frozen == "x" else weight_VD).requires_grad_(False)
    sums_N = document_log_probs(x_TD, weight_VD, labels_T, documents_of(bounds, T), len(LENGTHS), 8)
    loss_of(sums_N, reference_pairs()).loss.backward()
    _, _, expected_dx, expected_dw = plain(torch.float64)
    assert (x_TD.grad is None) is (frozen == "x") and (weight_VD.grad is None) is (frozen == "weight")
    close(*((weight_VD.grad, expected_dw) if frozen == "x" else (x_TD.grad, expected_dx)), torch.float64)


def test_documents_are_found_by_their_bounds() -> None:
    """Empty ones too, which rows of recorded graphs have at their end."""
    assert documents_of(torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32), 6).tolist() == [0, 0, 2, 2, 2, 3]


def test_a_long_document_s_sum_keeps_its_digits() -> None:
    """In fp32 a sum near two million has steps of 0.125."""
    tokens = 200_000
    x_TD = torch.zeros(tokens, 1)
    labels_T = torch.zeros(tokens, dtype=torch.int64)
    sums_N = document_log_probs(x_TD, torch.zeros(V, 1), labels_T, labels_T, 1, 4096)
    per_token = float(torch.log_softmax(torch.zeros(V), 0)[0])
    assert sums_N.item() == pytest.approx(tokens * per_token, abs=1e-6)


def test_figures_of_implicit_rewards() -> None:
    pairs = PreferencePairs(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[-4.0, -4.0], [-1.0, -2.0]]).double(), 0.5)
    found = loss_of(torch.tensor([-3.0, -5.0, -2.0, -2.5]).double(), pairs)
    assert (int(found.pairs), int(found.correct)) == (2, 1)
    assert found.rewards_2.tolist() == [0.5 * (1 - 1), 0.5 * (-1 - 0.5)]
    assert found.margin.item() == pytest.approx(0.5 * ((1 + 1) + (-1 + 0.5)))
    assert found.loss.item() == pytest.approx(sum(torch.nn.functional.softplus(-torch.tensor([1.0, -0.25])).tolist()))


def test_a_model_that_is_the_reference_has_log_2_of_loss_a_pair() -> None:
    log_probs_N = torch.tensor([-3.0, -5.0, -2.0, -2.5]).double()
    pairs = PreferencePairs(torch.tensor([[0, 1], [2, 3]]), log_probs_N.view(2, 2), 0.1)
    found = loss_of(log_probs_N, pairs)
    assert found.loss.item() == pytest.approx(2 * 0.6931471805599453) and int(found.correct) == 0


def test_the_reference_gets_no_gradient_and_no_pair_is_no_loss() -> None:
    reference = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    log_probs_N = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss_of(log_probs_N, PreferencePairs(torch.tensor([[0, 1]]), reference, 0.1)).loss.backward()
    assert reference.grad is None and log_probs_N.grad.tolist() == [-0.05, 0.05]
    none = PreferencePairs(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2).double(), 0.1)
    found = loss_of(log_probs_N, none)
    found.loss.backward()
    assert (found.loss.item(), int(found.pairs), int(found.correct)) == (0.0, 0, 0)


def test_far_margins_stay_finite() -> None:
    log_probs_N = torch.tensor([0.0, -1e6], dtype=torch.float64, requires_grad=True)
    for order, expected in (([[0, 1]], 0.0), ([[1, 0]], 1e6)):
        log_probs_N.grad = None
        found = loss_of(log_probs_N, PreferencePairs(torch.tensor(order), torch.zeros(1, 2).double(), 1.0))
        found.loss.backward()
        assert found.loss.item() == pytest.approx(expected) and log_probs_N.grad.isfinite().all()
