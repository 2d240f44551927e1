"""Padding is not routed: a micro-batch that ends its rows in padding against the same documents without any."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mmkernels.moe import permute, route, unpermute
from mmtrain.build import build_model
from mmtrain.model.moe.layer import MoE
from mmtrain.model.moe.padding import around_padding
from mmtrain.model.moe.router import Router, RouterStats, RoutingScope, expert_capacity, load_balancing_loss
from mmtrain.model.packed_seq import Packing, RealTokens
from tests.kernels.poison import fill_new_memory
from tests.model.small import draw, draw_tokens, relative, small_config

ROW = 60
REAL = RealTokens.from_rows([37, 11, 60], ROW)
DOCUMENTS = [[30, 7], [11], [25, 35]]  # of each row
M = len(REAL.index_M)
CONFIG = small_config(num_layers=3, layer_pattern="LSL", capacity_factor=0.7, aux_loss_coef=0.5)


def packed(real: RealTokens) -> Packing:
    """Rows whose documents do not matter to a router."""
    rows = len(real.per_row)
    return replace(Packing.from_lengths([real.row_length] * rows, real.index_M.device), real=real)


def padded(seed: int) -> tuple[Tensor, Packing, Tensor]:
    """Real tokens that are always the same, and padding that depends on the seed."""
    tokens, labels = draw_tokens(3 * ROW, seed), torch.full((3 * ROW,), -100)
    tokens[REAL.index_M] = draw_tokens(M, 1)
    labels[REAL.index_M] = draw_tokens(M, 2)
    lengths = [n for row in DOCUMENTS for n in (*row, ROW - sum(row)) if n]
    flat = Packing.from_lengths(lengths)
    return tokens, replace(flat, real=REAL), labels


def step(recompute: bool, *inputs: object, **changes: object) -> tuple[dict[str, Tensor], list[RouterStats]]:
    """Losses and gradients of one micro-batch, and what the routers did."""
    model = build_model(replace(CONFIG, **changes), seed=5).train()
    for layer in model.layers:
        layer.recompute = recompute
    out = model(*inputs)
    (out.ce_sum / 100 + out.aux_loss).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {"ce_sum": out.ce_sum.detach(), "aux_loss": out.aux_loss.detach(), **found}, out.router


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_a_micro_batch_is_that_of_its_real_tokens(policy: str, recompute: bool) -> None:
    tokens, packing, labels = padded(seed=3)
    alone = Packing.from_lengths([n for row in DOCUMENTS for n in row])
    theirs, their_router = step(False, tokens[REAL.index_M], alone, labels[REAL.index_M], drop_policy=policy)
    ours, our_router = step(recompute, tokens, packing, labels, drop_policy=policy)
    for name, value in theirs.items():
        assert relative(ours[name], value) < 2e-5, name
    for mine, other in zip(our_router, their_router, strict=True):
        assert mine.assigned_E.tolist() == other.assigned_E.tolist() and int(mine.assigned_E.sum()) == 2 * M
        assert mine.drop_rate.item() == pytest.approx(other.drop_rate.item(), rel=1e-6) and mine.drop_rate > 0.1
        assert mine.entropy.item() == pytest.approx(other.entropy.item(), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_what_padding_holds_changes_no_bit(training: bool, parts: int) -> None:
    results = []
    for seed in (3, 4):
        model = build_model(CONFIG, seed=5).train(training)
        for layer in model.layers:
            layer.ffn.router.scope = RoutingScope(parts=parts)
        out = model(*padded(seed))
        (out.ce_sum + out.aux_loss).backward()
        figures = [value for stats in out.router for value in stats]
        results.append([out.ce_sum, *figures, *(p.grad for p in model.layers.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_useful_work_is_that_of_real_documents() -> None:
    _, packing, _ = padded(0)
    assert packing.lengths == (30, 7, 23, 11, 49, 25, 35) and packing.real_lengths == (30, 7, 11, 25, 35)
    assert Packing.from_lengths([3, 4]).real_lengths == (3, 4)
    empty = replace(Packing.from_lengths([ROW, ROW]), real=RealTokens.from_rows([0, ROW], ROW))
    assert empty.real_lengths == (ROW,)


def test_real_tokens_are_the_first_of_each_row() -> None:
    found = RealTokens.from_rows([2, 0, 3], 3)
    assert found.index_M.tolist() == [0, 1, 6, 7, 8] and found.index_M.dtype == torch.int64
    assert (found.per_row, found.row_length) == ((2, 0, 3), 3)


def router_of(**changes: object) -> Router:
    made = Router(small_config(hidden_size=16, num_experts=6, capacity_factor=0.8, aux_loss_coef=0.03, **changes))
    nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


def test_capacity_and_figures_are_of_real_tokens() -> None:
    router, x = router_of(), draw(3 * ROW, 16, dtype=torch.float32)
    plan, stats = router(x, packed(REAL))
    prob = (x[REAL.index_M] @ router.weight.T).double().softmax(-1)
    wanted = torch.bincount(prob.topk(2).indices.flatten(), minlength=6)
    kept = wanted.clamp(max=math.ceil(M * 2 / 6 * 0.8))
    assert stats.assigned_E.tolist() == plan.assigned_E.tolist() == wanted.tolist()
    assert plan.count_E.tolist() == kept.tolist() and kept.sum() < wanted.sum()
    assert stats.drop_rate.item() == pytest.approx(1 - kept.sum().item() / (2 * M), abs=1e-6)
    assert stats.entropy.item() == pytest.approx(-(prob * prob.log()).sum(-1).mean().item(), rel=1e-6)
    expected = 0.03 * load_balancing_loss(prob, wanted, 2)
    assert stats.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # What is sent to other ranks has the size that all of them know.
    assert plan.capacity == expert_capacity(3 * ROW, 2, 6, 0.8) and plan.token_R.shape == (6 * plan.capacity,)
    with torch.no_grad():
        assert router.eval()(x, packed(REAL))[0].token_R.shape == (3 * ROW * 2,)


@pytest.mark.parametrize("counts", [(37, 11, 60), (37, 0, 60)], ids=str)
def test_the_loss_over_sequences_is_the_mean_of_rows_that_have_tokens(counts: tuple[int, ...]) -> None:
    router, real = router_of(), RealTokens.from_rows(counts, ROW)
    x = draw(3 * ROW, 16, dtype=torch.float32).requires_grad_()
    router.scope = RoutingScope(parts=3)
    stats = router(x, packed(real))[1]
    losses, entropy = [], 0.0
    for row, count in zip(x.split(ROW), counts, strict=True):
        if count:
            prob = (row[:count].double() @ router.weight.double().T).softmax(-1)
            wanted = torch.bincount(prob.topk(2).indices.flatten(), minlength=6)
            losses.append(0.03 * load_balancing_loss(prob, wanted, 2))
            entropy -= (prob * prob.log()).sum().item() / sum(counts)
    expected = sum(losses) / len(losses)
    assert stats.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert stats.entropy.item() == pytest.approx(entropy, rel=1e-6)
    for mine, exact in zip(*(torch.autograd.grad(loss, (x, router.weight)) for loss in (stats.aux_loss, expected)),
                           strict=True):  # fmt: skip
        assert relative(mine, exact) < 1e-5
    router.scope = RoutingScope()
    assert stats.aux_loss.item() != pytest.approx(router(x, packed(real))[1].aux_loss.item(), rel=1e-3)


def test_fractions_of_the_global_batch_meet_probabilities_of_real_tokens() -> None:
    router, x = router_of(), draw(3 * ROW, 16, dtype=torch.float32)
    router.fractions_E = torch.arange(6.0) * 2 / 15
    mean_E = (x[REAL.index_M] @ router.weight.T).softmax(-1).mean(0)
    expected = 0.03 * 6 / 2 * (mean_E * router.fractions_E).sum()
    assert router(x, packed(REAL))[1].aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_padding_alone(parts: int) -> None:
    """Nothing is learned from it, and nothing counted."""
    config = small_config(hidden_size=16, capacity_factor=1.0)
    moe, x = MoE(config), draw(8, 16, dtype=torch.float32).requires_grad_()
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    moe.router.scope = RoutingScope(parts=parts)
    out, stats = moe(x, packed(RealTokens.from_rows([0, 0], 4)))
    (out.sum() + stats.aux_loss).backward()
    assert torch.count_nonzero(out) == 0 and torch.count_nonzero(x.grad) == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in moe.parameters())
    assert [value.sum().item() for value in stats] == [0.0] * 5


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_kernels_give_padding_nothing(monkeypatch: pytest.MonkeyPatch, policy: str, capacity: int | None) -> None:
    """Rows and sums of the kernels against the definition, in memory that holds garbage."""
    fill_new_memory(monkeypatch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index, logits = RealTokens.from_rows([13, 5], 20).index_M, draw(18, 4, dtype=torch.float32)
    results = []
    for backend in ("triton", "naive"):
        leaves = [draw(40, 24, dtype=torch.float32), logits.clone()]
        x, logits_M = (leaf.to(device).requires_grad_() for leaf in leaves)
        alone = route(logits_M, 2, capacity, policy, backend=backend)
        plan = around_padding(alone, index.to(device), 40, None if capacity is None else 12)
        rows = permute(x, plan, backend=backend)
        out = unpermute(rows * 2, plan.weight_TK, plan, backend=backend)
        upstream = draw(40, 24, seed=1, dtype=torch.float32).to(device)
        results.append([*plan[1:-1], plan.weight_TK, rows, out, *torch.autograd.grad(out, (x, logits_M), upstream)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)
    padding = torch.ones(40, dtype=torch.bool).index_fill(0, index, False)
    kept = int(plan.offset_E[-1])
    assert (plan.row_TK[padding] == -1).all() and torch.count_nonzero(plan.weight_TK[padding]) == 0
    assert sorted(plan.row_TK[plan.row_TK >= 0].tolist()) == list(range(kept)) and (plan.token_R[kept:] == -1).all()
    assert plan.token_R[:kept].tolist() == index[alone.token_R[:kept].cpu().long()].tolist()
    assert torch.count_nonzero(out[padding]) == 0 and torch.count_nonzero(results[0][-2][padding]) == 0
    assert plan.token_R.shape == (80 if capacity is None else 4 * 12,) and int(plan.assigned_E.sum()) == 36


@pytest.mark.gpu
def test_padding_on_a_gpu_without_waiting_for_it() -> None:
    """The layer against the CPU's, forward and backward."""
    config = small_config(hidden_size=32, capacity_factor=0.7, aux_loss_coef=0.5)
    results = []
    for device in ("cpu", "cuda"):
        moe, x = MoE(config), draw(3 * ROW, 32, dtype=torch.float32).to(device).requires_grad_()
        for i, parameter in enumerate(moe.parameters()):
            parameter.data.copy_(draw(*parameter.shape, seed=i, dtype=torch.float32) * 0.3)
        moe.to(device).router.scope = RoutingScope(parts=3)
        real = RealTokens.from_rows(REAL.per_row, ROW, device)
        packing = packed(real)
        out, stats = moe(x, packing)
        found = torch.autograd.grad(out.square().sum() + stats.aux_loss, (x, *moe.parameters()))
        if device == "cuda":  # all is compiled now; torch's grouped product of fp32 waits, so routing is asked alone
            torch.cuda.set_sync_debug_mode("error")
            try:
                moe.router(x, packing)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append([t.detach().cpu() for t in (out, *stats, *found)])
    for mine, other in zip(*results, strict=True):
        assert relative(mine, other) < 1e-3
