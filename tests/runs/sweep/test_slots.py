"""Slots: GPUs as nvidia-smi and CUDA_VISIBLE_DEVICES have them, shared out; cores where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtrain.config.sweep import SweepConfig
from mmtrain.errors import ConfigError
from mmtrain.runs.sweep.slots import local_slots, visible_gpus

GIB = 2**30


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '0, GPU-aa, 81920'\necho '1, GPU-bb, 40960'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_runs_are_spread_over_the_gpus_first(two_gpus: None) -> None:
    slots = local_slots(SweepConfig(name="x", runs_at_once=2), [])
    assert [slot.gpus for slot in slots] == [("0",), ("1",), ("0",), ("1",)]
    assert [slot.device_bytes / GIB for slot in slots] == [40, 20, 40, 20]
    assert slots[1].environment()["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_run_of_two_processes_takes_two_gpus(two_gpus: None) -> None:
    (slot,) = local_slots(SweepConfig(name="x", processes=2), [])
    assert slot.gpus == ("0", "1") and slot.device_bytes == 40 * GIB
    with pytest.raises(ConfigError, match=r"sweep.processes=4: a run wants more GPUs than the 2 here"):
        local_slots(SweepConfig(name="x", processes=4), [])
    with pytest.raises(ConfigError, match=r"sweep.runs_at_once=2: runs of several GPUs"):
        local_slots(SweepConfig(name="x", processes=2, runs_at_once=2), [])


def test_visible_devices_are_respected(two_gpus: None) -> None:
    assert [gpu.name for gpu in visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-bb"})] == ["GPU-bb"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1"})[0].bytes == 40 * GIB
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_a_cpu_shares_out_its_cores(two_gpus: None) -> None:
    slots = local_slots(SweepConfig(name="x", runs_at_once=3, threads=1), ["cluster.device=cpu"])
    assert len(slots) == 3 and slots[0].gpus == () and slots[0].threads == 1 and slots[0].device_bytes is None
