"""Log-probabilities of documents whose tokens, or whose head, lie on several ranks, against plain float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.model.document_score import document_log_probs
from mmtrain.model.packed_seq import documents_of
from mmtrain.parallel.collectives import sum_alike
from mmtrain.parallel.tensor.vocab_parallel import VocabParallelDocuments
from tests.dist.pool import Pool
from tests.model.test_document_score import LENGTHS, T, V, close, inputs, loss_of, plain, reference_pairs

CHUNK = 8
SHARDS = [[V - 12, 12], [V, 0], [20, 0, 17]]  # of T = 51 tokens, cut to what the ranks divide


def over_vocabulary(shards: list[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Sums and loss, and gradients of this rank's tokens and rows."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x_TD, weight_VD, labels_T, bounds = inputs(dtype)
    padding = -T % ranks
    padded_TD = torch.cat([x_TD.detach(), x_TD.new_ones(padding, x_TD.shape[1])])
    labels_T, document_T = torch.cat([labels_T, labels_T.new_zeros(padding)]), documents_of(bounds, T + padding)
    x_SD = padded_TD.chunk(ranks)[rank].clone().requires_grad_()
    weight_ND = weight_VD.detach().split(shards)[rank].clone().requires_grad_()
    score = VocabParallelDocuments(sum(shards[:rank]), dist.group.WORLD)
    sums_N = score(x_SD, weight_ND, labels_T, document_T, len(LENGTHS) + 1, CHUNK)  # the last one is padding
    loss = loss_of(sums_N, reference_pairs()).loss
    loss.backward()
    return sums_N.detach()[: len(LENGTHS)], loss.detach(), x_SD.grad, weight_ND.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shards", SHARDS, ids=str)
def test_a_split_vocabulary_gives_the_loss_and_gradients_of_the_whole_one(
    pool: Pool, shards: list[int], dtype: torch.dtype
) -> None:
    expected_N, expected, expected_dx, expected_dw = plain(dtype)
    outcomes = pool.run(over_vocabulary, shards, dtype, world=len(shards))
    for sums_N, loss, _, _ in outcomes:
        close(sums_N, expected_N, dtype)
        close(loss, expected, dtype)
        assert torch.equal(sums_N, outcomes[0][0])
    close(torch.cat([dx for _, _, dx, _ in outcomes])[:T], expected_dx, dtype)
    close(torch.cat([dw for _, _, _, dw in outcomes]), expected_dw, dtype)


def over_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and gradients of this rank's tokens and of the whole head by them; ranks have every other four tokens."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x_TD, weight_VD, labels_T, bounds = inputs(torch.float64)
    mine_T = torch.arange(T) // 4 % ranks == rank
    x_SD = x_TD.detach()[mine_T].requires_grad_()
    document_S = documents_of(bounds, T)[mine_T]
    part_N = document_log_probs(x_SD, weight_VD, labels_T[mine_T], document_S, len(LENGTHS), CHUNK)
    loss = loss_of(sum_alike(part_N, dist.group.WORLD), reference_pairs()).loss
    loss.backward()
    dx_TD = torch.zeros_like(x_TD)
    dx_TD[mine_T] = x_SD.grad
    return loss.detach(), dx_TD.detach(), weight_VD.grad


@pytest.mark.parametrize("ranks", [2, 3])
def test_documents_that_ranks_share_have_the_gradients_of_whole_ones(pool: Pool, ranks: int) -> None:
    """As under context parallelism: gradients of all ranks add up."""
    _, expected, expected_dx, expected_dw = plain(torch.float64)
    outcomes = pool.run(over_tokens, world=ranks)
    for loss, _, _ in outcomes:
        close(loss, expected, torch.float64)
    close(sum(dx for _, dx, _ in outcomes), expected_dx, torch.float64)
    close(sum(dw for _, _, dw in outcomes), expected_dw, torch.float64)
