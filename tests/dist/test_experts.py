"""Experts on several ranks against the same experts on one: outputs and gradients of each rank, at the edges."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.moe import Route, route
from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.model.moe.experts import Experts
from mmtrain.parallel import mesh
from mmtrain.parallel.collectives import sum_gradient
from mmtrain.parallel.expert.exchange import ExpertExchange, build_exchange
from mmtrain.parallel.layout import plan_layout
from tests.dist.layouts import MODEL
from tests.dist.pool import Pool

TOKENS, EXPERTS, HIDDEN, WIDTH = 24, 8, 16, 32


def inputs(batch: int, kind: str) -> tuple[Tensor, Tensor, Route]:
    """Tokens of a micro-batch, the gradient of its output, and where its tokens go."""
    generator = torch.Generator().manual_seed(batch)
    x, dy = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    case, size = kind.split(", ")
    capacity = {"slots": 5, "exact": None}[size]
    if case == "experts without a token":
        logits[:, [0, 3, 4]] -= 100
    elif case == "all tokens to one expert":
        logits[:, 5] += 100
    elif case == "everything dropped" or (case == "a rank whose tokens are all dropped" and batch == 1):
        plan = route(logits, 2, quotas=torch.zeros_like)
        return x, dy, plan._replace(capacity=capacity)
    return x, dy, route(logits, 2 - (case == "all tokens to one expert"), capacity)


def whole_experts() -> Experts:
    experts = Experts(EXPERTS, HIDDEN, WIDTH)
    generator = torch.Generator().manual_seed(99)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return experts


def run(experts: Experts, batch: int, kind: str, tensor: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Output and gradients of a micro-batch's tokens, or of this rank's part of them; weights collect theirs."""
    x, dy, plan = inputs(batch, kind)
    weight = plan.weight_TK.detach().requires_grad_()
    plan = plan._replace(weight_TK=weight)
    if tensor is not None:
        x, dy = (whole.chunk(tensor.size())[tensor.rank()].clone() for whole in (x, dy))
        plan = plan._replace(weight_TK=sum_gradient(weight, tensor))
    x.requires_grad_()
    out = experts(x, plan)
    out.backward(dy)
    return {"out": out.detach(), "dx": x.grad, "dweight": weight.grad}


def exchanged(parallel: ParallelConfig, host_ranks: int) -> dict[str, dict[str, Tensor]]:
    """This rank's outputs and gradients of every kind."""
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(host_ranks)):
        context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, MODEL))
        axes, tensor = context.expert["ep", "etp"], context.dense["tp"].get_group()
        call = build_exchange(axes, tensor, context.device, parallel.token_groups, parallel.exchange)
    assert call.peer_reads == (parallel.exchange == "direct")
    assert call.full_micro_batch == (host_ranks == 4 and parallel.tp == parallel.etp == 2)
    try:
        return {kind: exchanged_once(call, (axes["ep"].get_local_rank(), axes["etp"].get_local_rank()), parallel, kind,
                                     context.dp_rank) for kind in KINDS}  # fmt: skip
    finally:
        mesh.stop()


def exchanged_once(
    call: ExpertExchange, place: tuple[int, int], parallel: ParallelConfig, kind: str, batch: int
) -> dict[str, Tensor]:
    experts = whole_experts()
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(part_of(weight, place, parallel).detach().clone()))
    experts.call = call
    found = run(experts, batch, kind, call.groups.tp_group)
    return {**found, **{name: weight.grad for name, weight in experts.named_parameters()}}


def part_of(weight: Tensor, place: tuple[int, int], parallel: ParallelConfig) -> Tensor:
    """What the rank at this place along ep and etp has of a weight of all experts."""
    ep, etp = place
    return weight.chunk(parallel.ep)[ep].chunk(parallel.etp, dim=2)[etp]


CASES = ["balanced", "experts without a token", "all tokens to one expert", "a rank whose tokens are all dropped",
         "everything dropped"]  # fmt: skip
KINDS = [f"{case}, {size}" for case in CASES for size in ("slots", "exact")]
LAYOUTS = [pytest.param({"ep": 4}, 4, marks=pytest.mark.slow),
           ({"ep": 2, "etp": 2, "token_groups": 3}, 4), ({"ep": 4, "token_groups": 6}, 4),
           ({"etp": 4}, 4), ({"tp": 2, "ep": 4}, 4), ({"tp": 2, "ep": 2, "etp": 2}, 4),
           ({"tp": 2, "ep": 2, "etp": 2, "token_groups": 3}, 4), ({"tp": 2, "ep": 2, "etp": 2}, 2),
           ({"ep": 4, "exchange": "direct"}, 4), ({"tp": 2, "ep": 4, "exchange": "direct"}, 4),
           ({"tp": 2, "ep": 2, "etp": 2, "exchange": "direct"}, 4)]  # fmt: skip


@pytest.mark.parametrize(("options", "host_ranks"), LAYOUTS, ids=str)
def test_every_rank_equals_one_process(pool: Pool, options: dict[str, int], host_ranks: int) -> None:
    parallel = ParallelConfig(**options)
    by_rank = pool.run(exchanged, parallel, host_ranks, world=4)
    for kind in KINDS:
        experts = whole_experts()
        expected = [run(experts, batch, kind) for batch in range(4 // parallel.tp)]
        for rank, found in enumerate(kinds[kind] for kinds in by_rank):
            batch, part = divmod(rank, parallel.tp)
            for name, value in expected[batch].items():
                mine = value if name == "dweight" else value.chunk(parallel.tp)[part]
                close(found[name], mine, f"{name} of rank {rank}, {kind}")
            for name, weight in experts.named_parameters():
                mine = part_of(weight.grad, divmod(rank, parallel.etp), parallel)
                close(found[name], mine, f"{name} on rank {rank}, {kind}")


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")
