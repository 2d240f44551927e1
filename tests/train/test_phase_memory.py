"""Memory of phases as a run sees it: the header, the refusal with what would fit, and the end of a full device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError, OutOfDeviceMemory
from mmtrain.parallel.memory.options import may_not_fit, savings, what_fits
from mmtrain.parallel.memory.predict import GIB, predict
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.phase_layouts import plan_phase_layouts
from mmtrain.train.phase_memory import PhaseMemory

ROOT = Path(__file__).resolve().parents[2]


def plan_of(*overrides: str, world: int = 1) -> tuple[PretrainConfig, RunPlan]:
    config = compose(["data.path=d", "run.name=r", *overrides], ROOT / "configs")
    phases = scaled_phases(config.stage)
    return config, RunPlan.laid_out(phases, plan_phase_layouts(world, config.parallel, config.model, phases))


def memory(*overrides: str, world: int = 1) -> PhaseMemory:
    return PhaseMemory.of(*plan_of(*overrides, world=world), torch.device("cpu"))


def test_a_phase_too_large_is_refused_with_options_that_make_it_fit() -> None:
    given = ["stage=pretrain", "model=proxy_100m", "parallel.micro_batch_rows=4"]
    found = memory(*given, "cluster.device_memory_gib=16")
    with pytest.raises(ConfigError, match=r"stage.phases\[0\]=pretrain_8k: needs 2\d\.\d GiB") as refused:
        found.check()
    assert "and there are 16.0" in str(refused.value) and "parallel.activation_checkpoint=block" in refused.value.fix
    options = refused.value.fix.removeprefix("give ").partition(" (")[0].split()
    fitting = memory(*given, *options, "cluster.device_memory_gib=16")
    fitting.check()
    assert "may run out" not in fitting.lines()[0]
    memory(*given, "cluster.device_memory_gib=40").check()


def test_all_phases_are_told_at_once_and_each_with_its_own_layout() -> None:
    given = ["stage=long_ctx", "model=hybrid_1b", "parallel.cp=2", "cluster.device_memory_gib=20"]
    with pytest.raises(ConfigError) as refused:
        memory(*given, world=8).check()
    assert "ctx_512k needs " in refused.value.problem and "ctx_1m needs " in refused.value.problem
    found = memory(*given, "stage.phases.1.parallel={cp: 8, activation_checkpoint: true}", world=8)
    assert [work.layout.cp for work in found.works] == [2, 8, 2]
    assert found.predictions[1].peak < found.predictions[0].peak


def test_nothing_is_refused_where_memory_is_not_known() -> None:
    found = memory("stage=long_ctx", "model=minimax_text_01")
    found.check()
    assert found.device_bytes is None and len(found.lines()) == 3
    assert found.lines()[0].startswith("memory  ctx_128k: ") and "predicted of a device" in found.lines()[0]


def test_what_fits_takes_no_option_that_is_not_needed_and_none_that_cannot_run() -> None:
    work = memory("stage=pretrain", "model=proxy_100m", "parallel.micro_batch_rows=4").works[0]
    assert what_fits(work, 100 * GIB).options == ""
    fits = what_fits(work, 12 * GIB)
    assert "cpu_offload" not in fits.options and not may_not_fit(fits.prediction, 12 * GIB, 1)
    assert what_fits(work, 1 * GIB) is None
    options = [one.options for one in savings(work)]
    assert not any(axis in text for text in options for axis in ("cp=", "ep=", "tp="))  # of one process
    peaks = [one.prediction.peak for one in savings(work)]
    assert peaks == sorted(peaks) and all(peak < predict(work).peak for peak in peaks)


def test_chunks_of_the_feed_forward_are_proposed_before_what_takes_more_time() -> None:
    given = ["+stage=long_ctx_1m", "model=hybrid_7b", "parallel.cp=4", "parallel.activation_checkpoint=block",
             "parallel.offload_block_inputs=true", "parallel.sync_every_micro_batch=true",
             "optim.precision=bf16"]  # fmt: skip
    work = memory(*given, world=4).works[0]
    assert what_fits(work, 90 * GIB).options == "parallel.ffn_chunk_tokens=16384"
    assert any(one.options == "parallel.ffn_chunk_tokens=16384" for one in savings(work))
    bubbles = ["model=proxy_100m", "parallel.pp=2", "parallel.pp_schedule=zero_bubble"]
    assert not any("ffn_chunk" in one.options for one in savings(memory(*bubbles, world=2).works[0]))


def test_more_processes_are_used_where_they_are_at_hand() -> None:
    work = memory("stage=long_ctx", "model=hybrid_410m", world=8).works[2]
    assert "parallel.cp=" in what_fits(work, 40 * GIB).options


def test_out_of_memory_ends_with_the_table_and_the_options_that_save_most() -> None:
    found = memory("stage=long_ctx", "model=hybrid_410m", world=8)
    found.enter(1)
    with pytest.raises(OutOfDeviceMemory) as ended, found.told():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    said, lines = str(ended.value), ended.value.lines
    assert "phase ctx_512k" in said and "Tried to allocate 2.00 GiB" in said and ended.value.exit_code == 5
    assert any(line.startswith("predicted peak") for line in lines)
    assert "GiB less" in lines[-1] and "what would save most:" in lines


def test_another_error_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="something else"), memory("stage=quickstart").told():
        raise RuntimeError("something else")


def test_the_command_ends_with_code_5_and_no_traceback() -> None:
    """The error on its way through the command line, made up."""
    program = """
import sys
from pathlib import Path
import torch
from mmtrain.config.cli import hydra_entry
from tests.train.test_phase_memory import memory
found = memory("stage=quickstart")
def run(config):
    with found.told():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
sys.argv[1:] = ["stage=quickstart", "data.path=d", "run.name=r"]
hydra_entry(run, Path("configs"))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("error on rank 0: out of device memory in phase quickstart")
    assert "predicted peak" in done.stderr and "Traceback" not in done.stderr


def test_plan_prints_all_phases_and_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "launch/pretrain.py", "--plan", "+stage=long_ctx", "model=hybrid_7b", "parallel.cp=4",
               "run.plan_processes=4", "cluster.device_memory_gib=79.2", f"run.dir={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("8.57B parameters, on 4 processes", "phase ctx_1m: rows of 1,048,576 tokens", "DP1 x CP4",
                 "predicted peak", "block inputs", "of 79.2", "775 steps of 33.6M (32 rows)"):  # fmt: skip
        assert part in done.stdout, part
    assert not list(tmp_path.iterdir())
