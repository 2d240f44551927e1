"""Training in bf16 on CPU: what must stay fp32 inside of it, against float64 code that knows no bf16."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.model.model import ModelInputs
from mmtrain.model.moe import router as router_module
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import model_inputs
from tests.dist.layouts import MODEL, SEQ, micro_batch, whole
from tests.dist.pool import Pool

# Without the auxiliary loss, whose share a micro-batch has depends on their number.
CONFIG = replace(MODEL, num_layers=2, layer_pattern="LS", aux_loss_coef=0.0)
EXACT = 1e-5  # fp32 inside; bf16 is off by 1e-3 and more
START, BASE = 1_000_000, 1e4
LABELLED = 4 * SEQ


def build(context: mesh.ParallelContext, parallel: ParallelConfig) -> ParallelModel:
    model = apply_parallel(meta_model(CONFIG), context, parallel, torch.bfloat16)
    model.initialise(7)
    return model


def seen_inside(parallel: ParallelConfig) -> list[tuple[float, float, str]]:
    """Per layer: how far its logits and RoPE tables are from float64, and the dtype of the router's input."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, CONFIG, [SEQ]))
    try:
        model = build(context, parallel)
        weights = {name: value.double() for name, value in whole(model.module).items()}
        hidden: list[Tensor] = []
        logits: list[Tensor] = []
        tables: list[tuple[Tensor, Tensor]] = []
        for block in model.module.layers:
            block.ffn.router.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
            block.mixer.register_forward_pre_hook(lambda _, args: tables.append(args[2]))

        def watched(logits_NE: Tensor, *args: object, **kwargs: object) -> object:
            logits.append(logits_NE.detach())
            return route(logits_NE, *args, **kwargs)

        route = router_module.route
        packing = Packing.from_lengths([SEQ], start=START)
        tokens = torch.arange(SEQ) % CONFIG.vocab_size
        batch = ModelInputs(tokens, packing, tokens.roll(-1), BASE)
        with mock.patch.object(router_module, "route", watched):
            list(model.forward_backward([batch], 1, torch.tensor([SEQ * context.dp_size])))
        found = []
        for layer, (x, mine, table) in enumerate(zip(hidden, logits, tables, strict=True)):
            exact = x.double() @ weights[f"layers.{layer}.ffn.router.weight"].T
            assert mine.dtype == torch.float32
            found.append((relative(mine, exact), off_the_circle(table), str(x.dtype)))
        return found
    finally:
        mesh.stop()


def off_the_circle(table: tuple[Tensor, Tensor]) -> float:
    """Largest error of cosines and sines, whose angles are formed in extended precision."""
    exponent = -2 * np.arange(CONFIG.rotary_dim // 2, dtype=np.longdouble) / CONFIG.rotary_dim
    angle = np.arange(START, START + SEQ, dtype=np.longdouble)[:, None] * np.longdouble(BASE) ** exponent
    return max(float(np.abs(mine.double().numpy() - exact).max())
               for mine, exact in zip(table, (np.cos(angle), np.sin(angle)), strict=True))  # fmt: skip


def relative(mine: Tensor, exact: Tensor) -> float:
    return ((mine.double() - exact).norm() / exact.norm()).item()


def test_routers_and_rope_tables_are_fp32_under_bf16(pool: Pool) -> None:
    for rank in pool.run(seen_inside, ParallelConfig(), world=2):
        assert len(rank) == CONFIG.num_layers
        for logits, table, dtype in rank:
            assert dtype == "torch.bfloat16"  # so it is bf16 that trains
            assert logits < EXACT and table < 1e-6


def gradients_of(parallel: ParallelConfig, labelled: float, groups: list[list[int]]) -> list[dict[str, Tensor]]:
    """Whole gradients of steps over these micro-batches of one row, of which each rank runs its share."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, CONFIG, [SEQ]))
    try:
        model, found = build(context, parallel), []
        for rows in groups:
            batches = [model_inputs(micro_batch(row, 1), BASE, context.device)
                       for row in rows[context.dp_rank :: context.dp_size]]  # fmt: skip
            list(model.forward_backward(batches, len(batches), torch.tensor([labelled])))
            found.append(whole(model.module, gradient=True))
            for parameter in model.module.parameters():
                parameter.grad = None
        return found
    finally:
        mesh.stop()


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"ep": 2}, marks=pytest.mark.slow), {"sync_every_micro_batch": True}, {"pp": 2}],
    ids=str,
)
def test_gradients_are_summed_and_reduced_in_fp32(pool: Pool, options: dict[str, object]) -> None:
    """Over micro-batches and ranks: their own bf16 gradients, added up in float64, tell every sum in fewer digits."""
    parallel = ParallelConfig(**options)
    many = {}
    for (found,) in pool.run(gradients_of, parallel, LABELLED, [[0, 1, 2, 3]], world=2):
        many |= found
    replicas = 2 // parallel.pp  # scale the loss by their number, and take the mean
    apart = pool.run(gradients_of, ParallelConfig(), LABELLED / replicas, [[0], [1], [2], [3]], world=1)[0]
    assert many.keys() == apart[0].keys()
    exchanged = bool(options.get("ep"))  # rows of both ranks are in one product there, and rounded together
    for each in apart:  # a process by itself does not round the gradient of the head
        each["lm_head.weight"] = each["lm_head.weight"].bfloat16()
    for name, gradient in many.items():
        exact = sum(each[name].double() for each in apart) / replicas
        if exchanged and "experts" in name:
            assert relative(gradient, exact) < 0.05, name
        elif name == "embed_tokens.weight":  # nor sums of a token's rows, which these do not round once but each time
            assert relative(gradient, exact) < 1e-3
        else:
            assert relative(gradient, exact) < EXACT, name
        if gradient.dim() > 1:
            assert relative(exact.bfloat16(), exact) > 10 * EXACT  # the bound tells bf16 from fp32
