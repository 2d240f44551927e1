"""A step and a validation through the one door: what of the phase reaches the model, and in which mode it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.build import build_model, meta_model
from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.model.model import ModelInputs
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel import mesh
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.evaluate import evaluate
from mmtrain.train.statistics import NamedSums, StepStatistics
from mmtrain.train.step import model_inputs
from tests.dist.layouts import micro_batch
from tests.model.small import small_config

BASES = (1e4, 5e6)
CONFIG = small_config(layer_pattern="LS", num_layers=2)


@pytest.fixture
def model() -> Iterator[ParallelModel]:
    context = mesh.start(ClusterConfig(device="cpu"))
    made = apply_parallel(meta_model(CONFIG), context, ParallelConfig(), torch.float32)
    made.initialise(1234)
    yield made
    mesh.stop()


def inputs(rope_base: float) -> ModelInputs:
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(0, CONFIG.vocab_size, (48,), generator=generator)
    return ModelInputs(tokens_T, Packing.from_lengths([40, 8]), tokens_T.roll(-1), rope_base)


def expected(rope_base: float, training: bool) -> Tensor:
    """Summed loss of a plain model of the same weights."""
    plain = build_model(CONFIG).train(training)
    return plain(*inputs(1e4)._replace(rope_base=rope_base)).ce_sum


def test_the_phase_s_rope_base_reaches_training_and_validation(model: ParallelModel) -> None:
    losses = []
    for base in BASES:
        (result,) = model.forward_backward([inputs(base)], 1, torch.tensor([48]))
        losses.append(result.out.ce_sum)
        assert torch.equal(result.out.ce_sum, expected(base, training=True))
        with model.evaluating():
            assert torch.equal(model.evaluate(inputs(base)), expected(base, training=False))
    assert not torch.equal(*losses)


def test_validation_is_in_evaluation_mode_and_training_goes_on_in_its_own(model: ParallelModel) -> None:
    with pytest.raises(KeyError), model.evaluating():
        assert not any(module.training for module in model.module.modules())
        raise KeyError
    assert all(module.training for module in model.module.modules())


def test_rows_that_only_keep_step_with_other_ranks_do_not_count(model: ParallelModel) -> None:
    """A validation of two rows and a surplus one: nats a labelled token, bits a byte of their labels."""
    batches = [micro_batch(row, 1) for row in range(3)]
    bytes_V = np.arange(CONFIG.vocab_size)
    plain, nats, labels = build_model(CONFIG).eval(), 0.0, []
    for batch in batches[:2]:
        with torch.no_grad():
            nats += plain(*model_inputs(batch, 1e4, torch.device("cpu"))).ce_sum.item()
        labels += batch.labels_BS[batch.loss_mask_BS].tolist()
    found = evaluate(model, zip(batches, (True, True, False), strict=True), bytes_V, 1e4)
    assert found.loss == pytest.approx(nats / len(labels), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats * math.log2(math.e) / sum(labels), rel=1e-6)


def test_the_loss_is_the_mean_over_labelled_tokens_and_micro_batches(model: ParallelModel) -> None:
    """Three micro-batches, of which each has a third of the auxiliary loss."""
    batch = inputs(1e4)
    list(model.forward_backward([batch] * 3, 3, torch.tensor([3 * 48])))
    found = {name: p.grad.full_tensor() for name, p in model.module.named_parameters()}
    plain = build_model(CONFIG).train()
    out = plain(*batch)
    (out.ce_sum / 48 + out.aux_loss).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["ce_sum", "aux_loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_either_loss_that_is_not_finite_is_seen(model: ParallelModel, name: str, value: float) -> None:
    statistics = StepStatistics(CONFIG, model)
    assert statistics.loss_is_finite
    statistics.sums[name].add_(value)
    assert not statistics.loss_is_finite


def test_named_sums_are_views_that_one_copy_reads() -> None:
    sums = NamedSums({"a": (), "table": (2, 3), "none": (0, 0), "b": (2,)}, torch.device("cpu"))
    sums["a"].add_(2.0)
    sums["table"][1:].add_(torch.tensor([[1, 2, 3]]))
    sums["b"].copy_(torch.tensor([5.0, 7.0]))
    assert sums.flat.tolist() == [2, 0, 0, 0, 1, 2, 3, 5, 7]
    host = sums.on_host()
    assert host["a"].item() == 2 and host["table"].tolist() == [[0, 0, 0], [1, 2, 3]]
    assert host["none"].shape == (0, 0) and host["b"].tolist() == [5, 7]
