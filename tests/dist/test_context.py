"""Whole models whose rows are shared by ranks, beside all other axes, against one process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, ParallelConfig
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.evaluate import Validation, evaluate
from mmtrain.train.step import model_inputs
from tests.dist.layouts import MODEL, SEQ, Job, alone, micro_batch
from tests.dist.pool import Pool
from tests.dist.test_layouts import SHALLOW, check

RING = {"cp_softmax": "ring"}
LAYOUTS = {
    "CP2 zigzag, ring": (2, {"cp": 2, "cp_chunks": 2, "cp_table": "zigzag", **RING}),
    "CP2 x EP2": (2, {"cp": 2, "ep": 2}),
    "CP2 x TP2 x EP2 x ETP2": (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2, "activation_checkpoint": True}),
    "CP2 x PP2": (4, {"cp": 2, "pp": 2}),
}
WIDE = {
    "CP2": (2, {"cp": 2}),
    "CP4 contiguous, one chunk": (4, {"cp": 4, "cp_chunks": 1, "cp_table": "contiguous"}),
    "CP4 ring": (4, {"cp": 4, "cp_chunks": 3, **RING}),
    "CP2 x DP2 by sequence": (4, {"cp": 2, "micro_batch_rows": 2, "aux_loss_over": "sequence"}),
    "CP2 x EP4": (4, {"cp": 2, "ep": 4}),
    "CP2 x EP2 of two micro-batches": (4, {"cp": 2, "ep": 2, "token_groups": 2}),
    "CP2 x TP2": (4, {"cp": 2, "tp": 2, "micro_batch_rows": 4}),
    "CP2 x ETP2": (2, {"cp": 2, "etp": 2}),
    "CP2 x TP2 x PP2 x EP4": (8, {"cp": 2, "tp": 2, "pp": 2, "ep": 4}),
    "CP2 x PP2 interleaved": (4, {"cp": 2, "pp": 2, "pp_schedule": "interleaved", "pp_chunks": 2}),
    "CP2 x PP2 zero bubble": (4, {"cp": 2, "pp": 2, "pp_schedule": "zero_bubble"}),
    "CP8": (8, {"cp": 8, "cp_chunks": 2}),
    "CP2 x TP4, more ranks than key/value heads": (8, {"cp": 2, "tp": 4, "cp_chunks": 4}),
}


def job_of(options: dict[str, object], **more: object) -> Job:
    deep = options.get("pp_schedule") == "interleaved"
    model = MODEL if deep else replace(SHALLOW, num_kv_heads=2) if options.get("tp") == 4 else SHALLOW
    return Job(model, ParallelConfig(**options), **more)


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in WIDE)])
def test_ranks_that_share_rows_train_as_one_process(pool: Pool, name: str) -> None:
    world, options = {**LAYOUTS, **WIDE}[name]
    check(pool, job_of(options, rows=8), world)


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_padding_is_left_out_of_shared_rows(pool: Pool, tp: int) -> None:
    options = {"cp": 2, "tp": tp, "ep": 2, "cp_chunks": 4}
    check(pool, job_of(options, rows=8, real=(48, 20, 0, 33)), 2 * tp)


@pytest.mark.slow
def test_capacity_is_pooled_over_micro_batches_that_ranks_share(pool: Pool) -> None:
    """Two micro-batches on four ranks pool as two do on two ranks, each with rows of its own."""
    pooled = ParallelConfig(cp=2, ep=4, global_router=True)
    shared, own = (
        pool.run(train_pooled, parallel, world=world)
        for parallel, world in ((pooled, 4), (ParallelConfig(ep=2, global_router=True), 2))
    )
    assert list(shared) == [pytest.approx(own[0])] * 4


def train_pooled(parallel: ParallelConfig) -> list[float]:
    from tests.dist.layouts import train

    outcome = train(Job(SHALLOW, parallel, rows=4))
    result = outcome.results[0]
    return [result.loss, result.aux_loss, result.grad_norm, *result.drop_rate, *result.drop_rate_alone]


def test_the_balance_of_a_step_is_told(pool: Pool) -> None:
    from tests.dist.layouts import train

    job = job_of({"cp": 2, "cp_chunks": 1, "cp_table": "contiguous"}, rows=2)
    balance = [outcome.results[0].cp_balance for outcome in pool.run(train, job, world=2)]
    assert balance[0] == balance[1] > 1.05
    even = pool.run(train, job_of({"cp": 2}, rows=2), world=2)[0].results[0].cp_balance
    assert even < balance[0]


def validate(parallel: ParallelConfig) -> Validation:
    """Held-out figures of four rows, of which the last is surplus on some ranks."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, SHALLOW, [SEQ]))
    try:
        model = apply_parallel(meta_model(SHALLOW), context, parallel, torch.float32)
        model.initialise(7)
        rows = [(micro_batch(row, 1), row < 3) for row in range(4)][context.dp_rank :: context.dp_size]
        return evaluate(model, rows, np.arange(SHALLOW.vocab_size) + 1, SHALLOW.rope_base)
    finally:
        mesh.stop()


@pytest.mark.parametrize("parallel", [ParallelConfig(cp=2), ParallelConfig(cp=2, pp=2)], ids=["CP2", "CP2 x PP2"])
def test_validation_counts_each_row_once(pool: Pool, parallel: ParallelConfig) -> None:
    one = pool.run(validate, ParallelConfig(), world=1)[0]
    for found in pool.run(validate, parallel, world=2 * parallel.pp):
        assert found.loss == pytest.approx(one.loss, rel=1e-6)
        assert found.bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-6)


def hidden_states(model: ModelConfig, parallel: ParallelConfig, token: int | None) -> tuple[Tensor, Tensor]:
    """Final logits of this rank's tokens, and their places; `token` is changed first."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, model, [SEQ]))
    try:
        laid = apply_parallel(meta_model(model), context, parallel, torch.float32)
        laid.initialise(7)
        inputs = model_inputs(micro_batch(3, 1), model.rope_base, context.device)
        if token is not None:
            inputs.tokens_T[token] = (inputs.tokens_T[token] + 1) % model.vocab_size
        mine = laid.cut(inputs)
        with torch.no_grad():
            return laid.module(mine.tokens_T, mine.packing, None, mine.rope_base), mine.packing.index_S
    finally:
        mesh.stop()


@pytest.mark.parametrize("kind", ["experts without a capacity", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_token_is_seen_by_later_tokens_of_its_document_alone(pool: Pool, kind: str) -> None:
    """Under CP4; to the bit in a dense model. With a capacity, drops couple the tokens of a micro-batch.

    Experts without one multiply other rows together when a token changes its expert, which rounds differently.
    """
    noise = 1e-6 if "experts" in kind else 0.0
    model = replace(SHALLOW, capacity_factor=None) if "experts" in kind else replace(SHALLOW, num_experts=0)
    parallel = ParallelConfig(cp=4, cp_chunks=3)
    whole = whole_row(pool.run(hidden_states, model, parallel, None, world=4))
    cuts = micro_batch(3, 1).cu_seqlens.tolist()
    for token in (0, 10, 30, SEQ - 1):
        other = whole_row(pool.run(hidden_states, model, parallel, token, world=4))
        end = next(cut for cut in cuts if cut > token)
        changed = ((whole - other).abs() > noise).any(-1).nonzero().flatten().tolist()
        assert changed == list(range(token, end)), f"token {token} of documents {cuts}"


def whole_row(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    order = torch.cat([index_S for _, index_S in parts]).argsort()
    return torch.cat([logits for logits, _ in parts])[order]


def test_one_process_is_what_it_is_compared_with() -> None:
    assert alone(job_of({"cp": 2, "tp": 2})).parallel == ParallelConfig()
