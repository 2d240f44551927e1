"""Collectives and their gradients against autograd of one process on all ranks' tensors.

Legend: N rows of a rank, A and B further dimensions.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmtrain.parallel import collectives
from tests.dist.pool import Pool

A, B = 3, 2
LAYOUTS = {"2": [[0, 1]], "4": [[0, 1, 2, 3]], "2 of 4": [[0, 2], [1, 3]]}
OPS = ["gather_rows", "scatter_sum_rows", "gather_alike", "sum_gradient"]


def leaf(op: str, rank: int, ranks: int, empty: bool) -> Tensor:
    """[N, A, B], not contiguous; the same on every rank where the op wants that."""
    generator = torch.Generator().manual_seed(0 if op == "sum_gradient" else rank)
    rows = 0 if empty else 5 * ranks if op == "scatter_sum_rows" else 5
    x_ANB = torch.randn(A, rows, B, dtype=torch.float64, generator=generator)
    return x_ANB.transpose(0, 1).requires_grad_()


def linear(op: str, out_NAB: Tensor, rank: int) -> Tensor:
    """A random linear function, another one on each rank unless the op wants the same; its gradient is not dense."""
    generator = torch.Generator().manual_seed(100 + (0 if op == "gather_alike" else rank))
    weight_BAN = torch.randn(B, A, out_NAB.shape[0], dtype=torch.float64, generator=generator)
    return (out_NAB.permute(2, 1, 0) * weight_BAN).sum()


def work(op: str, groups: list[list[int]], empty: bool) -> tuple[Tensor, Tensor]:
    """Output and gradient on this rank."""
    group, _ = join(groups)
    rank, ranks = group.rank(), group.size()
    x_NAB = leaf(op, rank, ranks, empty)
    out_NAB = getattr(collectives, op)(x_NAB, group)
    linear(op, out_NAB, rank).backward()
    dist.barrier()  # rank 0 keeps the store that the others may still be reading
    return out_NAB.detach(), x_NAB.grad


def join(groups: list[list[int]]) -> tuple[ProcessGroup, list[int]]:
    """This rank's group and its members."""
    dist.init_process_group("gloo")
    made = [(dist.new_group(members), members) for members in groups]
    return next(pair for pair in made if dist.get_rank() in pair[1])


def reference(op: str, ranks: int, empty: bool) -> list[tuple[Tensor, Tensor]]:
    """What `work` has to return on every rank of a group."""
    xs = [leaf(op, rank, ranks, empty) for rank in range(ranks)]
    if op.startswith("gather"):
        outs = [torch.cat(xs)] * ranks
    elif op == "scatter_sum_rows":
        outs = list(torch.stack(xs).sum(0).chunk(ranks))
    else:
        xs = xs[:1] * ranks
        outs = xs
    losses = [linear(op, out, rank) for rank, out in enumerate(outs)]
    (losses[0] if op == "gather_alike" else sum(losses)).backward()
    return [(out.detach(), x.grad) for out, x in zip(outs, xs, strict=True)]


@pytest.mark.parametrize("empty", [False, True], ids=["", "empty"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients(pool: Pool, layout: str, op: str, empty: bool) -> None:
    groups = LAYOUTS[layout]
    ranks = len(groups[0])
    wanted = reference(op, ranks, empty)
    results = pool.run(work, op, groups, empty, world=len(groups) * ranks)
    for members in groups:
        for rank, (out, grad) in zip(members, wanted, strict=True):
            torch.testing.assert_close(results[rank], (out, grad), rtol=1e-14, atol=1e-14)


def sizes(sender: int, receiver: int) -> int:
    """Rows from one rank to another, none from or to rank 2."""
    return 0 if 2 in (sender, receiver) else 1 + 2 * sender + receiver


def work_exchange() -> tuple[Tensor, Tensor]:
    """Rows [N, 3] (the sender, the receiver, a number) to their receivers, and the gradient of a function of them."""
    dist.init_process_group("gloo")
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    rows = [[rank, to, number] for to in range(ranks) for number in range(sizes(rank, to))]
    x_N3 = torch.tensor(rows, dtype=torch.float64).view(-1, 3).requires_grad_()
    send, receive = ([sizes(*pair) for pair in pairs] for pairs in (
        [(rank, other) for other in range(ranks)], [(other, rank) for other in range(ranks)]
    ))  # fmt: skip
    out_R3 = collectives.exchange_rows(x_N3, receive, send, group)
    (out_R3.square().sum() * (rank + 1)).backward()
    dist.barrier()
    return out_R3.detach(), x_N3.grad


def test_rows_are_exchanged_and_their_gradients_come_back(pool: Pool) -> None:
    for rank, (out_R3, grad_N3) in enumerate(pool.run(work_exchange, world=4)):
        wanted = [[sender, rank, number] for sender in range(4) for number in range(sizes(sender, rank))]
        sent = [[rank, to, number] for to in range(4) for number in range(sizes(rank, to))]
        assert out_R3.tolist() == wanted
        assert grad_N3.tolist() == [[2.0 * (row[1] + 1) * one for one in row] for row in sent]


def work_sum() -> list[Tensor]:
    dist.init_process_group("gloo")
    x_AB = torch.arange(6.0).view(2, 3).t() * (dist.get_rank() + 1)
    tracked = torch.ones(2, requires_grad=True) * 1
    for x in (x_AB, tracked):
        assert collectives.sum_in_place(x, dist.group.WORLD) is x
    return [x_AB, tracked.detach()]


def test_sum_in_place(pool: Pool) -> None:
    for x_AB, ones in pool.run(work_sum, world=4):
        assert torch.equal(x_AB, torch.arange(6.0).view(2, 3).t() * 10) and torch.equal(ones, torch.full((2,), 4.0))


def work_alone() -> None:
    dist.init_process_group("gloo")
    x_NA, group = torch.randn(4, 2), dist.group.WORLD
    for op in OPS:
        assert getattr(collectives, op)(x_NA, group) is x_NA
    assert collectives.sum_in_place(x_NA, group) is x_NA
    into_NA = torch.empty_like(x_NA)
    collectives.exchange_into(into_NA, x_NA, None, None, group)
    assert torch.equal(into_NA, x_NA)


def test_a_group_of_one_returns_its_input(pool: Pool) -> None:
    pool.run(work_alone, world=1)


def work_refused() -> None:
    dist.init_process_group("gloo")
    x_NA, group = torch.randn(3, 2), dist.group.WORLD
    with pytest.raises(ValueError, match="3 rows for 2 ranks"):
        collectives.scatter_sum_rows(x_NA, group)


def test_rows_that_cannot_be_sent_are_refused(pool: Pool) -> None:
    pool.run(work_refused, world=2)
