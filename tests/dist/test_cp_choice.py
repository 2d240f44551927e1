"""A run of two processes that chooses its own context parallelism, beside the same run told to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmtrain.config.cli import compose
from mmtrain.parallel.memory.predict import GIB, margin_bytes
from mmtrain.train.plan_run import plan_run
from tests.dist.runs import ROOT, SMALL, pretrain, steps

PHASE = "{name: %s, seq_len: %d, rope_base: 1e4, tokens: 8192, batch: [{at: 0, tokens: 4096}], " \
        "lr: [{kind: constant, tokens: 8192, end: 0.01}]}"  # fmt: skip
STAGE = f"stage.phases=[{PHASE % ('short', 512)},{PHASE % ('long', 2048)}]"
OPTIONS = [*(one for one in SMALL if not one.startswith("stage.")), STAGE, "run.name=run", "data.valid_rows=0",
           "checkpoint.save_final=false"]  # fmt: skip


def between() -> float:
    """GiB of a device on which the long phase fits with two ranks a row, and not with one."""
    needs = []
    for cp in (1, 2):
        options = [*OPTIONS, "data.path=d", f"parallel.cp={cp}"]
        peak = plan_run(compose(options, ROOT / "configs"), 2, torch.device("cpu")).memory.predictions[1].peak
        needs.append((peak + margin_bytes(peak, 2)) / GIB)
    assert needs[1] < needs[0]
    return sum(needs) / 2


@pytest.mark.slow
def test_a_phase_that_does_not_fit_shares_its_rows_and_learns_the_same(corpus: Path, tmp_path: Path) -> None:
    given = [*OPTIONS, f"data.path={corpus}"]
    done = pretrain(*given, f"run.dir={tmp_path}/chosen", f"cluster.device_memory_gib={between()}", processes=2)
    printed = done.stdout + done.stderr
    assert printed.count("cp      long: cp=2, the least that fits") == 1, printed
    pretrain(*given, f"run.dir={tmp_path}/told", "stage.phases.1.parallel={cp: 2}", processes=2)
    chosen, told = (steps(tmp_path / one / "run") for one in ("chosen", "told"))
    assert [one["phase"] for one in chosen] == ["short"] * 2 + ["long"] * 2
    assert [one["loss"] for one in chosen] == pytest.approx([one["loss"] for one in told], rel=1e-6)
    assert "cp_balance" in chosen[2] and "cp_balance" not in chosen[0]
    recorded = json.loads((tmp_path / "chosen/run/config.json").read_text())
    assert recorded["stage"]["phases"][1]["parallel"]["cp"] == 2 and recorded["parallel"]["cp"] == 1
