"""The prediction of peak memory: figures measured on GPUs, sums, and how it moves with each option."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.config.cli import compose
from mmtrain.model.flops import count_parameters
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.memory.communication import lasting_buffers
from mmtrain.parallel.memory.predict import GIB, PARTS, margin_bytes, predict
from mmtrain.parallel.memory.workload import Workload, layer_parameters, root_parameters

CONFIGS = Path(__file__).parents[3] / "configs"


def workload(*overrides: str, world: int = 1, seq_len: int = 8192, micro_batches: int = 1) -> Workload:
    config = compose(["run.name=r", "data.path=d", *overrides], CONFIGS)
    layout = plan_layout(world, config.parallel, config.model, [seq_len])
    host = config.optim.name == "cpu_offload"
    return Workload(config.model, config.parallel, layout, seq_len, micro_batches, 2, host)


# mmtrain/bench/results/2026-11-29-step-h200/step.json: `peak_gib` of steps on one H200, with CUDA graphs. Those with
# recomputation are of 2026-11-29-step-2h200, measured when graphs began to recompute what follows softmax attention.
RECOMPUTED, SOFTMAX_ONLY = "parallel.activation_checkpoint=block", "model.layer_pattern=S"
MEASURED = [
    (23.61, 8192, 4, ["model=hybrid_410m"]),
    (51.99, 8192, 2, ["model=hybrid_410m", "parallel.micro_batch_rows=4"]),
    (15.44, 8192, 4, ["model=hybrid_410m", RECOMPUTED]),
    (18.94, 32768, 1, ["model=hybrid_410m", RECOMPUTED]),
    (43.08, 8192, 4, ["model=hybrid_1b"]),
    (37.79, 8192, 4, ["model=hybrid_1b", SOFTMAX_ONLY]),
    (58.11, 8192, 4, ["model=hybrid_1b", "model.num_experts=8", "model.ffn_hidden_size=1408",
                      "parallel.micro_batch_rows=2"]),
    (12.2, 8192, 4, []),
    (25.48, 8192, 2, ["parallel.micro_batch_rows=4"]),
    (9.57, 16384, 4, [RECOMPUTED]),
    # mmtrain/bench/results/2026-11-30-context-2h200
    (70.05, 2**19, 1, ["model=hybrid_410m", RECOMPUTED]),
    (126.13, 2**20, 1, ["model=hybrid_410m", RECOMPUTED]),
    (93.26, 2**18, 1, ["model=hybrid_1b", "model.num_experts=8", "model.ffn_hidden_size=2048", "model.num_layers=24",
                       RECOMPUTED, "parallel.offload_block_inputs=true"]),
    (18.73, 65536, 1, ["model=hybrid_7b", "model.num_layers=4", "model.layer_pattern=L", "model.ffn_hidden_size=512",
                       "model.vocab_size=4096", RECOMPUTED]),
]  # fmt: skip


# mmtrain/bench/results/2026-11-28-context-2h200, and below of -30: `peak GiB` of steps of a row that two H200s share.
SHARED = ["parallel.cp=2", "parallel.activation_checkpoint=block"]
MIXTURE = ["model=hybrid_1b", "model.num_experts=8", "model.ffn_hidden_size=2048", "model.num_layers=24"]
SEVEN_B = ["model=hybrid_7b", "parallel.ffn_chunk_tokens=16384", "parallel.lightning_head_groups=4"]
STEPS = [
    (36.95, 131072, MIXTURE),
    (76.01, 524288, MIXTURE),
    (59.77, 524288, [*MIXTURE, "parallel.offload_block_inputs=true"]),
    # mmtrain/bench/results/2026-11-30-context-2h200
    (107.56, 2**20, [*SEVEN_B, "parallel.offload_block_inputs=28"]),
    (86.96, 2**19, [*SEVEN_B, "parallel.offload_block_inputs=true"]),
    (44.21, 2**18, [*MIXTURE, "parallel.offload_block_inputs=true"]),
    (90.87, 2**20, [*MIXTURE, "parallel.offload_block_inputs=true"]),
    (9.5, 65536, ["model=hybrid_410m"]),
    (20.02, 262144, ["model=hybrid_410m"]),
]


@pytest.mark.parametrize(("measured", "tokens", "overrides"), STEPS)
def test_the_prediction_is_within_5_percent_of_shared_rows_on_gpus(
    measured: float, tokens: int, overrides: list[str]
) -> None:
    found = predict(workload(*SHARED, *overrides, world=2, seq_len=tokens))
    assert found.gib == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("measured", "seq_len", "micro_batches", "overrides"), MEASURED)
def test_the_prediction_is_within_5_percent_of_runs_on_a_gpu(
    measured: float, seq_len: int, micro_batches: int, overrides: list[str]
) -> None:
    overrides = ["model=proxy_100m", *overrides] if not any("model=" in one for one in overrides) else overrides
    found = predict(workload(*overrides, seq_len=seq_len, micro_batches=micro_batches)).gib
    assert found == pytest.approx(measured, rel=0.05)


# mmtrain/bench/results/2026-11-29-step-2h200: each of two H200s has whole weights, and a half of masters and moments.
SIXTEEN = ["model=hybrid_1b", "model.num_experts=16", "model.ffn_hidden_size=1408", "model.top_k=2", SOFTMAX_ONLY]
REPLICATED = [
    (20.99, ["model=hybrid_410m"]),
    (20.78, ["model=hybrid_410m", "parallel.cuda_graphs=false"]),
    (36.61, ["model=hybrid_1b"]),
    (36.26, ["model=hybrid_1b", "parallel.cuda_graphs=false"]),
    (50.0, SIXTEEN),
]


@pytest.mark.parametrize(("measured", "overrides"), REPLICATED)
def test_the_prediction_is_within_5_percent_of_replicas(measured: float, overrides: list[str]) -> None:
    found = predict(workload("parallel.reshard_after_forward=false", *overrides, world=2, micro_batches=4))
    assert found.gib == pytest.approx(measured, rel=0.05)


def test_parts_are_all_named_and_sum_to_the_peak() -> None:
    found = predict(
        workload("model=moe_28b", "parallel.tp=2", "parallel.ep=4", "parallel.cp=2", world=8, seq_len=2**17)
    )
    assert tuple(found.parts) == PARTS
    assert sum(found.parts.values()) == pytest.approx(found.peak) and found.gib == pytest.approx(found.peak / GIB)
    assert all(value >= 0 for value in found.parts.values())


@pytest.mark.parametrize("model", ["tiny", "hybrid_410m", "moe_28b", "minimax_text_01"])
def test_parameters_of_all_layers_are_those_of_the_model(model: str) -> None:
    work = workload(f"model={model}")
    layers = sum(layer_parameters(work.model, work.layout, letter).whole for letter in work.model.layer_types)
    root = root_parameters(work.model, work.layout, embedding=True, head=True).whole
    assert layers + root == count_parameters(work.model).total


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({}, {"parallel.micro_batch_rows": 2}),
        ({"parallel.activation_checkpoint": "block"}, {"parallel.activation_checkpoint": "selective"}),
        ({"parallel.activation_checkpoint": "selective"}, {"parallel.activation_checkpoint": "none"}),
        ({"parallel.activation_checkpoint": "block", "parallel.offload_block_inputs": "true"},
         {"parallel.activation_checkpoint": "block"}),
        ({"parallel.activation_checkpoint": "block", "parallel.offload_block_inputs": "true"},
         {"parallel.activation_checkpoint": "block", "parallel.offload_block_inputs": 4}),
        ({"parallel.activation_checkpoint": "block", "parallel.offload_block_inputs": 4},
         {"parallel.activation_checkpoint": "block"}),
        ({"parallel.lightning_head_groups": 2}, {}),
        ({"parallel.ffn_chunk_tokens": 1024}, {}),
        ({"parallel.ffn_chunk_tokens": 1024}, {"parallel.ffn_chunk_tokens": 4096}),
        ({"parallel.ffn_chunk_tokens": 1024, "model.num_experts": 0}, {"model.num_experts": 0}),
        ({"parallel.cp": 2}, {}),
        ({"parallel.cp": 4}, {"parallel.cp": 2}),
        ({"parallel.tp": 2}, {}),
        ({"parallel.ep": 4}, {"parallel.micro_batch_rows": 2, "parallel.ep": 4}),
        ({"parallel.sync_every_micro_batch": "true"}, {}),
        ({}, {"parallel.reshard_after_forward": "false"}),
        ({"optim": "cpu_offload"}, {}),
        ({"model.capacity_factor": 0.5}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_it_moves_the_right_way_with_each_option(less: dict, more: dict) -> None:
    def gib(options: dict) -> float:
        written = [f"{name}={value}" for name, value in options.items()]
        return predict(workload("model=proxy_100m", "model.num_kv_heads=4", *written, world=8, micro_batches=4)).gib

    assert gib(less) < gib(more)


def test_it_grows_with_length_and_with_micro_batches_that_wait() -> None:
    one, two = (predict(workload("model=proxy_100m", seq_len=length)).gib for length in (8192, 16384))
    assert 1.5 * one < two + 5 < 3 * one
    work = workload("model=proxy_100m", world=8)
    waiting = predict(replace(work, micro_batches=2)).parts["gradients"] - predict(work).parts["gradients"]
    assert waiting > 0.9 * 4 * count_parameters(work.model).total * (1 - 1 / 8)  # whole ones in place of an eighth


def test_a_pipeline_is_as_large_as_its_worst_rank() -> None:
    """The first rank of 1f1b holds as many micro-batches as there are stages: more stages save no activations."""
    two, four = (
        predict(workload("model=proxy_100m", f"parallel.pp={pp}", "parallel.micro_batch_rows=2", world=pp,
                         micro_batches=8)) for pp in (2, 4)
    )  # fmt: skip
    assert four.parts["mixers"] > 0.8 * two.parts["mixers"]
    assert four.parts["parameters"] < 0.7 * two.parts["parameters"]


def test_an_optimizer_in_host_memory_leaves_nothing_of_it_on_the_device() -> None:
    parts = predict(workload("model=proxy_100m", "optim=cpu_offload")).parts
    assert parts["parameters"] == parts["optimizer"] == 0 and parts["gathered"] > 0


def test_the_margin_has_room_for_nccl_only_with_other_processes() -> None:
    assert margin_bytes(0, 2) - margin_bytes(0, 1) > GIB and margin_bytes(100 * GIB, 1) > margin_bytes(0, 1)


def test_in_chunks_the_feed_forward_is_not_the_peak_of_a_million_tokens_on_4_gpus() -> None:
    given = ["model=hybrid_7b", "parallel.cp=4", "parallel.activation_checkpoint=block",
             "parallel.offload_block_inputs=true", "parallel.sync_every_micro_batch=true",
             "parallel.lightning_head_groups=4"]  # fmt: skip
    whole, chunks = (predict(workload(*given, *more, world=4, seq_len=2**20, micro_batches=32))
                     for more in ([], ["parallel.ffn_chunk_tokens=16384"]))  # fmt: skip
    assert "feed-forward" in whole.moment and whole.parts["feed-forward"] == 3 * 2**18 * 11264 * 2
    assert "feed-forward" not in chunks.moment and chunks.parts["feed-forward"] == 0
    assert chunks.gib < 0.82 * whole.gib


def test_groups_of_heads_bring_a_million_tokens_on_4_gpus_under_72_gib() -> None:
    given = ["model=hybrid_7b", "parallel.cp=4", "parallel.activation_checkpoint=block",
             "parallel.offload_block_inputs=true", "parallel.ffn_chunk_tokens=16384"]  # fmt: skip
    one, two, four = (predict(workload(*given, f"parallel.lightning_head_groups={groups}", world=4, seq_len=2**20)).gib
                      for groups in (1, 2, 4))  # fmt: skip
    assert one > 72 > 64 > two >= four


def test_buffers_for_states_last_where_gpus_of_one_host_share_rows() -> None:
    """Two of 8 states of 8 chunks' heads; none where a row is not shared, or its ranks are on several hosts."""
    config = workload().model
    states = 2.0 * 8 * config.num_heads * config.head_dim**2 * 4
    for options, world, bytes_held in (
        (["parallel.cp=2"], 2, states),
        (["parallel.cp=4", "parallel.tp=2"], 8, states / 2),  # a rank of tp has half of the heads
        (["parallel.tp=2"], 2, 0.0),
        (["parallel.cp=8", "parallel.tp=2"], 16, 0.0),
        (["parallel.cp=2", "parallel.cp_states=collectives"], 2, 0.0),
    ):
        assert lasting_buffers(workload(*options, world=world)) == bytes_held, options
