"""Fingerprints of gradients: the same on any layout, close to the true difference, and what they must not miss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.log.gradients import GradientRecord, gradient_differences
from mmtrain.model import elements
from mmtrain.parallel import mesh
from mmtrain.parallel.fingerprint import PROJECTIONS, _local_sums, gradient_fingerprints
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.runs.compare import TOLERANCES
from mmtrain.train.step import model_inputs
from tests.dist.layouts import MODEL, SEQ, micro_batch, whole
from tests.dist.pool import Pool

LIMIT = TOLERANCES["float32"].gradients
SHALLOW = replace(MODEL, num_layers=2, layer_pattern="LS")
SCALED, SCALE = "layers.1.ffn.experts.w2_EDF", 1.003


def reduced(parallel: ParallelConfig) -> tuple[list[dict[str, list[float]]], dict[str, Tensor]]:
    """Fingerprints of one global batch of four rows, the same with one parameter's scaled, and its whole gradients."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, SHALLOW, [SEQ]))
    try:
        model = apply_parallel(meta_model(SHALLOW), context, parallel, torch.float32)
        model.initialise(7)
        batches = [model_inputs(micro_batch(row, 1), 1e4, context.device)
                   for row in range(context.dp_rank, 4, context.dp_size)]  # fmt: skip
        list(model.forward_backward(batches, len(batches), torch.tensor([4 * SEQ])))
        gradients, found = whole(model.module, gradient=True), [gradient_fingerprints(model.module, context.device)]
        for name, parameter in model.module.named_parameters():
            if name == SCALED:
                parameter.grad.mul_(SCALE)
        return [*found, gradient_fingerprints(model.module, context.device)], gradients
    finally:
        mesh.stop()


def differences(first: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, float]:
    return gradient_differences(GradientRecord("float32", first), GradientRecord("float32", other))


@pytest.fixture(scope="module")
def one(pool: Pool) -> tuple[list[dict[str, list[float]]], dict[str, Tensor]]:
    return pool.run(reduced, ParallelConfig(), world=1)[0]


def test_one_process_has_the_norm_of_every_parameter(one: tuple) -> None:
    (found, _), gradients = one
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert len(found[name]) == 1 + PROJECTIONS
        assert found[name][0] == pytest.approx(gradient.double().norm().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "world"),
    [
        ({}, 2),
        ({"pp": 2}, 2),
        ({"tp": 2, "ep": 2, "etp": 2}, 4),
        pytest.param({"tp": 4, "ep": 2}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layouts_agree_and_a_scaled_gradient_is_named(
    pool: Pool, one: tuple, options: dict[str, int], world: int
) -> None:
    """Scaled by 0.3%, an expert's gradient changes the norm of all by less than 1e-5."""
    expected = one[0][0]
    for (found, scaled), _ in pool.run(reduced, ParallelConfig(**options), world=world):
        assert found.keys() == scaled.keys() == expected.keys()
        assert max(differences(expected, found).values()) < LIMIT / 5
        apart = differences(expected, scaled)
        assert apart.pop(SCALED) == pytest.approx(SCALE - 1, rel=0.5)
        assert max(apart.values()) < LIMIT / 5


@pytest.mark.parametrize("chunk", [100, 1 << 22])
def test_projections_tell_the_difference_within_a_factor_of_two(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(elements, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        gradient = torch.randn(7, 4, 12, generator=generator, dtype=torch.float64)
        error = torch.randn(gradient.shape, generator=generator, dtype=torch.float64) if trial % 3 else gradient.clone()
        error[trial % 7 + 1 :] = 0  # some elements alone
        difference = 10.0 ** -(trial % 6) * error
        first, second = (_local_sums(g, f"parameter {trial}") for g in (gradient, gradient + difference))
        assert first[0].sqrt().item() == pytest.approx(gradient.norm().item())
        estimate = (second - first)[1:].square().mean().sqrt()
        assert 0.5 < (estimate / difference.norm()).item() < 2.0


def copies_that_differ() -> tuple[Tensor, Tensor]:
    """Fingerprints of a replicated gradient whose copies are equal, and of one whose copies have the same mean."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        gradient, apart = torch.arange(6.0), torch.ones(6) * (1 if context.rank else -1) * 0.1
        found = []
        for local in (gradient, gradient + apart):
            sums = _local_sums(DTensor.from_local(local, context.replicas, [Replicate()], run_check=False), "name")
            torch.distributed.all_reduce(sums)
            found.append(sums)
        return found[0], found[1]
    finally:
        mesh.stop()


def test_copies_that_differ_show_though_their_mean_is_right(pool: Pool) -> None:
    equal, apart = pool.run(copies_that_differ, world=2)[0]
    torch.testing.assert_close(equal, _local_sums(torch.arange(6.0), "name"))
    assert (equal - apart)[1:].abs().max() > 0.05
