"""Host memory that a run's phases need: predicted, told, and refused with what would fit."""

from __future__ import annotations

import pytest

from mmtrain.errors import ConfigError
from mmtrain.parallel.memory import system
from mmtrain.parallel.memory.host import host_memory
from mmtrain.parallel.memory.predict import GIB
from mmtrain.parallel.memory.workload import stage_layers
from tests.parallel.memory.test_predict import workload
from tests.train.test_phase_memory import memory

OFFLOADED = ["parallel.activation_checkpoint=block", "parallel.offload_block_inputs=true"]
LONG = ["+stage=long_ctx_1m", "model=hybrid_7b", "parallel.cp=4", "optim.precision=bf16", *OFFLOADED]
NODE = ["cluster.processes_per_node=4", "cluster.device_memory_gib=10000"]


def test_block_inputs_of_a_million_tokens_on_two_gpus() -> None:
    """28 of 32 on each of two H200s held 224 GiB, and all processes of the machine 231 to 233 (2026-11-30)."""
    work = workload("model=hybrid_7b", "parallel.cp=2", *OFFLOADED[:1], "parallel.offload_block_inputs=28", world=2,
                    seq_len=2**20)  # fmt: skip
    found = host_memory(work, copies_checkpoints=False)
    assert found.block_inputs == found.whole == 28 * 4 * GIB


def test_torch_pins_powers_of_two() -> None:
    given = ["model=hybrid_410m", *OFFLOADED]
    one, more = (host_memory(workload(*given, seq_len=length), False).block_inputs for length in (8192, 8192 + 256))
    assert more == 2 * one > 0


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_a_pipeline_holds_inputs_of_all_micro_batches_in_flight(pp: int) -> None:
    work = workload("model=hybrid_410m", *OFFLOADED, f"parallel.pp={pp}", world=pp, micro_batches=8)
    layers = [sum(len(part) for part in stage_layers(work, rank)) for rank in range(pp)]
    held = max((pp - rank) * count for rank, count in enumerate(layers))
    assert host_memory(work, False).block_inputs == held * 8192 * 1024 * 2 and sum(layers) == 24


def test_optimizer_and_checkpoint_are_shared_out_over_ranks() -> None:
    one, four = (host_memory(workload("model=proxy_100m", "optim=cpu_offload", world=n), True) for n in (1, 4))
    assert one.optimizer == 4 * four.optimizer and one.checkpoint == 4 * four.checkpoint
    assert one.checkpoint == 0.75 * one.optimizer
    assert host_memory(workload("model=proxy_100m"), False).whole == 0


def test_a_host_too_small_is_refused_with_the_number_of_blocks_that_fit() -> None:
    memory(*LONG, *NODE, "cluster.host_memory_gib=400", world=4).check()
    with pytest.raises(ConfigError, match=r"stage.phases\[0\]=ctx_1m: needs .* GiB of host memory") as refused:
        memory(*LONG, *NODE, "cluster.host_memory_gib=320", world=4).check()
    assert "4 ranks of a host: " in str(refused.value) and "of 320.0" in str(refused.value)
    option, rest = refused.value.fix.removeprefix("give ").split(", or take more hosts")
    assert "checkpoint.asynchronous=false" in rest
    name, number = option.split("=")
    given = [*LONG[:-1], *NODE, "cluster.host_memory_gib=320"]
    memory(*given, option, world=4).check()
    with pytest.raises(ConfigError):
        memory(*given, f"{name}={int(number) + 1}", world=4).check()


def test_runs_that_offload_nothing_are_not_told_of_the_host() -> None:
    found = memory("stage=pretrain", "model=proxy_100m", "cluster.host_memory_gib=4000")
    found.check()
    assert not [line for line in found.lines() if line.startswith("host")]
    (line,) = (line for line in memory(*LONG, *NODE, world=4).lines() if line.startswith("host"))
    assert "ctx_1m: " in line and "block inputs 64.0, checkpoint " in line and "4 ranks of a host: " in line


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "LIMIT", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text("max\n")
    whole = system.host_bytes()
    assert whole is not None and whole > GIB
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    assert system.host_bytes() == GIB
    (tmp_path / "memory.max").unlink()
    assert system.host_bytes() == whole


def test_on_a_cpu_nothing_is_held_against_it() -> None:
    found = memory(*LONG, world=4)
    assert found.host.host_bytes is None
    found.host.check()
