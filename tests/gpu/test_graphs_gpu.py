"""CUDA graphs of training passes: the same bits as without, for any documents, lengths and layers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdata.rows.loader import PackedBatch
from mmtrain.bench.context_step import packed_row
from mmtrain.build import meta_model
from mmtrain.config import ClusterConfig, ModelConfig, OptimConfig, ParallelConfig
from mmtrain.optim.optimizer import build_optimizer
from mmtrain.parallel import mesh
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.parallelize import apply_parallel
from mmtrain.train.step import train_step
from tests.dist.pool import free_port

pytestmark = pytest.mark.gpu
DENSE = ModelConfig("graphs", vocab_size=512, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64,
                    ffn_hidden_size=384, layer_pattern="LSLL", rotary_dim=32, num_experts=0)  # fmt: skip
EXPERTS = replace(DENSE, num_experts=4, ffn_hidden_size=256, capacity_factor=1.25)
MODELS = {
    "dense": DENSE,
    "experts": EXPERTS,
    "softmax only, pre-norm": replace(DENSE, layer_pattern="S", post_norm=False, deepnorm_alpha=None),
    "lightning only": replace(DENSE, layer_pattern="L"),
    "experts, a shared one, no capacity": replace(EXPERTS, capacity_factor=None, shared_ffn_hidden_size=256),
}
DOCUMENTS = ([[8192], [800] * 10 + [192], [16] * 500 + [192]], [[300, 7868, 24], [1] * 92 + [8100], [4096, 4096]])
"""Lengths of each micro-batch of each step: 1, 11 and 501 documents, and others."""


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    yield mesh.start(ClusterConfig())
    mesh.stop()


@pytest.fixture(autouse=True)
def sums_in_one_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention's backward, as libraries have it by default, adds in any order: two runs without graphs differ too."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train(
    context: ParallelContext,
    model: ModelConfig,
    steps: list[list[PackedBatch]],
    graphs: bool,
    dtype: torch.dtype = torch.bfloat16,
    **options: object,
) -> tuple[list[tuple], dict[str, torch.Tensor], list[str]]:
    """Losses, norms and drops of steps, the weights after them, and what was told of micro-batches without graphs."""
    parallel = ParallelConfig(cuda_graphs=graphs, **options)
    laid = apply_parallel(meta_model(model), context, parallel, dtype)
    laid.initialise(0)
    optimizer = build_optimizer(laid.module, OptimConfig())
    found = []
    for batches in steps:
        result = train_step(laid, optimizer, batches, 1e-3, 1e4, clip_grad=1.0)
        found.append((result.loss, result.grad_norm, result.aux_loss, result.drop_rate, result.router_load))
    weights = {name: p.to_local().clone() for name, p in laid.module.named_parameters()}
    notes = [line for line in laid.take_notes() if "without" in line]
    laid.close()
    return found, weights, notes


def rows(documents: object = DOCUMENTS, model: ModelConfig = DENSE) -> list[list[PackedBatch]]:
    return [[packed_row(lengths, model.vocab_size, i) for i, lengths in enumerate(step)] for step in documents]


def reserved() -> int:
    """Bytes that torch holds when it has given back what it can."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def assert_same(one: tuple, other: tuple) -> None:
    assert one[0] == other[0]
    for name, weight in one[1].items():
        assert torch.equal(weight, other[1][name]), name


@pytest.mark.parametrize("name", MODELS)
def test_graphs_give_the_same_bits(context: ParallelContext, name: str) -> None:
    graphed = train(context, MODELS[name], rows(DOCUMENTS * 2), True)
    assert not graphed[2]
    assert_same(graphed, train(context, MODELS[name], rows(DOCUMENTS * 2), False))


def test_recomputed_blocks_give_the_same_bits(context: ParallelContext) -> None:
    options = {"activation_checkpoint": "block"}
    graphed = train(context, EXPERTS, rows(), True, **options)
    assert_same(graphed, train(context, EXPERTS, rows(), False, **options))


def test_two_lengths_in_one_run_and_memory_is_back(context: ParallelContext) -> None:
    steps = [*rows(DOCUMENTS), *rows([[[2048], [2000, 48]], [[17] * 120 + [8], [1024, 1024]]]), *rows(DOCUMENTS)]
    train(context, DENSE, steps[:1], False)  # caches of kernels and of cuBLAS stay
    before = reserved()
    graphed = train(context, DENSE, steps, True)
    plain = train(context, DENSE, steps, False)
    assert_same(graphed, plain)
    del graphed, plain
    assert reserved() <= before + (32 << 20)


def test_more_documents_than_there_is_room_for_fall_back_and_say_so_once(context: ParallelContext) -> None:
    crowded = [[1024], [1] * 1024, [512, 512], [2] * 512, [1] * 1024]
    graphed = train(context, DENSE, rows([crowded] * 2), True)
    assert len(graphed[2]) == 1 and "more documents than the 64" in graphed[2][0]
    assert_same(graphed, train(context, DENSE, rows([crowded] * 2), False))


def test_a_step_that_is_not_finite_is_seen(context: ParallelContext) -> None:
    steps = rows(DOCUMENTS)
    laid = apply_parallel(meta_model(DENSE), context, ParallelConfig(cuda_graphs=True), torch.bfloat16)
    laid.initialise(0)
    optimizer = build_optimizer(laid.module, OptimConfig())
    assert not train_step(laid, optimizer, steps[0], 1e-3, 1e4, clip_grad=1.0).skipped
    with torch.no_grad():
        laid.module.layers[1].mixer.o_proj.weight.to_local()[0, 0] = torch.inf
    assert train_step(laid, optimizer, steps[1], 1e-3, 1e4, clip_grad=1.0).skipped
    laid.close()


def test_float32(context: ParallelContext) -> None:
    """Dense layers are recorded; experts' products wait for the host there, and say so once."""
    dense = train(context, DENSE, rows(DOCUMENTS * 2), True, torch.float32)
    assert not dense[2]
    assert_same(dense, train(context, DENSE, rows(DOCUMENTS * 2), False, torch.float32))
    experts = train(context, EXPERTS, rows(), True, torch.float32)
    assert len(experts[2]) == 1 and "not in bfloat16" in experts[2][0]
    assert_same(experts, train(context, EXPERTS, rows(), False, torch.float32))


def as_rank(rank: int, port: int, out: str) -> None:
    """A rank's part of steps of data parallelism that gathers and reduces once a step, with graphs and without."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUBLAS_WORKSPACE_CONFIG=":4096:8")  # fmt: skip
    context = mesh.start(ClusterConfig())
    torch.use_deterministic_algorithms(True)
    steps = [step[rank : rank + 2] for step in rows(DOCUMENTS * 2)]  # of three micro-batches
    graphed, plain = (train(context, EXPERTS, steps, on, reshard_after_forward=False) for on in (True, False))
    assert not graphed[2]
    assert_same(graphed, plain)
    Path(out, str(rank)).write_text(str(graphed[0]))
    mesh.stop()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_of_several_gpus_records_its_own(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(as_rank, (free_port(), str(tmp_path)), 2)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()  # figures of the global batch
