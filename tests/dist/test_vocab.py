"""Split vocabulary against the whole one: values on every rank, gradients of every shard.

Legend: T tokens, W ranks, S = T / W, D model width, V vocabulary, N rows of a rank.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mmtrain.model import loss as loss_module
from mmtrain.model.loss import IGNORE, linear_cross_entropy
from mmtrain.parallel.tensor.vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_embedding
from tests.dist.pool import Pool

T, D, V, CHUNK = 88, 16, 101, 20
SHARDS = [[V], [51, 50], [101, 0], [26, 26, 26, 23], [40, 0, 60, 1]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}
UPSTREAM = 0.37


def table(dtype: torch.dtype) -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def hidden(dtype: torch.dtype) -> Tensor:
    """Some logits are large, so that probabilities are near 1 and near 0."""
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_TD[::7] *= 10
    return x_TD.to(dtype)


def labels() -> Tensor:
    """The second chunk and the tokens of some rank have no label."""
    labels_T = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(2))
    labels_T[::3] = IGNORE
    labels_T[CHUNK : 2 * CHUNK + 4] = IGNORE
    return labels_T


def embedding(tokens_T: Tensor, shards: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and weight gradient of this rank; the upstream gradient is a function of the token."""
    group, rank, first = place(shards)
    weight_ND = table(dtype).split(shards)[rank].clone().requires_grad_()
    out_SD = vocab_parallel_embedding(tokens_T, weight_ND, first, group)
    out_SD.backward(hidden(dtype).chunk(len(shards))[rank])
    return out_SD.detach(), weight_ND.grad


def cross_entropy(
    labels_T: Tensor, shards: list[int], dtype: torch.dtype, trained: str, in_place: bool = False
) -> tuple[Tensor | None, ...]:
    """Loss and gradients of x and weight on this rank; `in_place`: with one buffer of logits, as where kernels run."""
    group, rank, first = place(shards)
    x_SD = hidden(dtype).chunk(len(shards))[rank].clone().requires_grad_("x" in trained)
    weight_ND = table(dtype).split(shards)[rank].clone().requires_grad_("w" in trained)
    with patch.object(loss_module, "has_kernel", lambda _: in_place):
        loss = vocab_parallel_cross_entropy(x_SD, weight_ND, labels_T, first, CHUNK, group)
    (loss * UPSTREAM).backward()
    return loss.detach(), x_SD.grad, weight_ND.grad


def place(shards: list[int]) -> tuple[dist.ProcessGroup, int, int]:
    """The group, this rank, its first row of the table."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    return dist.group.WORLD, rank, sum(shards[:rank])


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
@pytest.mark.parametrize("shards", SHARDS, ids=str)
def test_embedding(pool: Pool, shards: list[int], dtype: torch.dtype) -> None:
    tokens_T = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(3))
    weight_VD = table(dtype).requires_grad_()
    out_TD = F.embedding(tokens_T, weight_VD)
    out_TD.backward(hidden(dtype))
    outs, grads = zip(*pool.run(embedding, tokens_T, shards, dtype, world=len(shards)), strict=True)
    assert torch.equal(torch.cat(outs), out_TD)
    assert [len(grad) for grad in grads] == shards
    assert torch.equal(torch.cat(grads), weight_VD.grad)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shards", SHARDS, ids=str)
def test_cross_entropy(pool: Pool, shards: list[int], dtype: torch.dtype, in_place: bool) -> None:
    x_TD, weight_VD = hidden(dtype).requires_grad_(), table(dtype).requires_grad_()
    loss = linear_cross_entropy(x_TD, weight_VD, labels(), CHUNK)
    (loss * UPSTREAM).backward()
    results = pool.run(cross_entropy, labels(), shards, dtype, "xw", in_place, world=len(shards))
    losses, dxs, dweights = zip(*results, strict=True)
    assert all(torch.equal(each, losses[0]) for each in losses)
    assert [len(dweight) for dweight in dweights] == shards
    for found, wanted in [(losses[0], loss), (torch.cat(dxs), x_TD.grad), (torch.cat(dweights), weight_VD.grad)]:
        close(found, wanted.detach(), dtype)


@pytest.mark.parametrize("trained", ["x", "w"])
def test_cross_entropy_of_what_is_trained(pool: Pool, trained: str) -> None:
    shards = [51, 50]
    both, one = (pool.run(cross_entropy, labels(), shards, torch.float64, t, world=2) for t in ("xw", trained))
    kept = 1 if trained == "x" else 2
    for rank in range(2):
        assert torch.equal(one[rank][kept], both[rank][kept]) and one[rank][3 - kept] is None


def test_cross_entropy_without_any_label(pool: Pool) -> None:
    results = pool.run(cross_entropy, torch.full((T,), IGNORE), [51, 50], torch.float64, "xw", world=2)
    assert all(not tensor.any() for result in results for tensor in result)


def test_the_gradient_of_a_sure_token_keeps_its_digits(pool: Pool) -> None:
    """Softmax - 1 at a probability that bf16 rounds to 1."""
    results = pool.run(sure_token, world=2)
    dx = torch.stack(results).sum().item()
    assert dx == pytest.approx(-torch.sigmoid(torch.tensor(-8.0)).item() * 8, rel=1e-2)


def sure_token() -> Tensor:
    """Two tokens of width 1, a vocabulary of two with logits 8 and 0, one on each rank; one token has a label."""
    group, rank, first = place([1, 1])
    x_SD = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight_ND = torch.full((1, 1), 8.0 * (rank == 0), dtype=torch.bfloat16)
    vocab_parallel_cross_entropy(x_SD, weight_ND, torch.tensor([0, IGNORE]), first, 2, group).backward()
    return x_SD.grad.float()
