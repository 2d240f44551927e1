"""Preference training under every axis against one process, and one process against documents run alone in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mmtrain.build import build_model
from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.model.packed_seq import Packing
from mmtrain.train.step import model_inputs
from tests.dist.layouts import MODEL, SEQ
from tests.dist.pair_steps import BETA, PAIRS, PairJob, PairOutcome, pair_batch, pair_row, references, train_pairs
from tests.dist.pool import Pool

SMALL = replace(MODEL, num_layers=2, layer_pattern="LS", capacity_factor=None)
DENSE = replace(SMALL, num_experts=0)
ALONE: dict[str, PairOutcome] = {}


def alone(pool: Pool, job: PairJob) -> PairOutcome:
    one = replace(job, parallel=ParallelConfig(micro_batch_rows=job.parallel.micro_batch_rows))
    if repr(one) not in ALONE:
        ALONE[repr(one)] = pool.run(train_pairs, one, world=1)[0]
    return ALONE[repr(one)]


def plain_loss(model: torch.nn.Module, rows: list[int]) -> torch.Tensor:
    """Mean over pairs of equation 7 of Rafailov et al., of documents that are run alone; labels are the answers'."""
    known, losses = references(), []
    for row in rows:
        batch = pair_row(row)
        for i, (first, second, end) in enumerate(PAIRS):
            sums = []
            for a, b in ((first, second), (second, end)):
                tokens = batch.tokens_BS[0, a:b]
                log_probs = F.log_softmax(model(tokens, Packing.from_lengths([b - a])), -1)
                labels, learned = batch.labels_BS[0, a:b], batch.loss_mask_BS[0, a:b]
                sums.append(log_probs[torch.arange(b - a), labels][learned].sum())
            q_chosen, q_rejected = known._log_probs[f"row/{2 * row + i}"]
            losses.append(-F.logsigmoid(BETA * ((sums[0] - sums[1]) - (q_chosen - q_rejected))))
    return torch.stack(losses).mean()


def test_a_packed_batch_has_the_loss_and_gradients_of_documents_run_alone() -> None:
    packed, separate = (build_model(DENSE, seed=3).double() for _ in range(2))
    inputs = model_inputs(pair_batch(0, 3, bare=(1,)), DENSE.rope_base, torch.device("cpu"), None, references())
    out = packed(*inputs)
    assert out.preference[0] == 4
    (out.ce_sum / 4).backward()
    expected = plain_loss(separate, [0, 2])
    expected.backward()
    assert (out.ce_sum / 4).item() == pytest.approx(expected.item(), rel=1e-12)
    theirs = dict(separate.named_parameters())
    for name, parameter in packed.named_parameters():
        off = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm().clamp(min=1e-12)
        assert off < 1e-9, f"{name}: {off}"


def test_a_step_is_the_mean_over_the_pairs_of_all_rows(pool: Pool) -> None:
    outcome = alone(pool, PairJob(DENSE))
    model = build_model(DENSE, seed=7)
    assert outcome.results[0].loss == pytest.approx(plain_loss(model, [0, 2]).item(), rel=1e-5)
    assert outcome.results[0].preference.pairs == 4
    assert outcome.valid.figures.pairs == 6


@pytest.mark.parametrize(
    ("model", "options", "world"),
    [
        (DENSE, {}, 2),
        (DENSE, {"reshard_after_forward": False}, 2),
        (DENSE, {"tp": 2}, 2),
        (DENSE, {"cp": 2}, 2),
        (DENSE, {"cp": 2, "cp_chunks": 2, "micro_batch_rows": 2}, 2),
        (DENSE, {"pp": 2}, 2),
        (SMALL, {"ep": 2}, 2),
        (DENSE, {"tp": 2, "cp": 2}, 4),
        (SMALL, {"pp": 2, "ep": 2}, 4),
    ],
    ids=lambda one: one.num_experts if isinstance(one, ModelConfig) else str(one),
)
def test_a_layout_gives_the_steps_of_one_process(pool: Pool, model: ModelConfig, options: dict, world: int) -> None:
    """Rows 1 and 3 have no pair: with two data-parallel ranks, one of them has none in the first step."""
    job = PairJob(model, ParallelConfig(**options))
    one, outcomes = alone(pool, job), pool.run(train_pairs, job, world=world)
    for many in outcomes:
        for ours, theirs in zip(many.results, one.results, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=2e-5)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-4)
            assert ours.preference.record() == pytest.approx(theirs.preference.record(), rel=1e-4, abs=1e-5)
        assert many.valid.record() == pytest.approx(one.valid.record(), rel=1e-4, abs=1e-5)
        for name, gradient in many.gradients.items():
            theirs = one.gradients[name]
            assert (gradient - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6, name
    assert {name for many in outcomes for name in many.gradients} == one.gradients.keys()


def test_the_rows_are_long_enough_for_documents_that_ranks_share() -> None:
    assert SEQ // 2 not in {place for pair in PAIRS for place in pair}
