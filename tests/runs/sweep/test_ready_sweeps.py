"""Every sweep of configs/sweep can be planned as it is, and has the paper's numbers where it names them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mmtrain.config.sweep import SizeConfig, SlurmConfig, SweepConfig
from mmtrain.runs.sweep.command import read_request
from mmtrain.runs.sweep.grid import grid_runs
from mmtrain.runs.sweep.run_sweep import SweepOptions, run_sweep
from tests.runs.sweep.stand_in import CONFIGS, ROOT

SWEEPS = sorted(path.stem for path in (CONFIGS / "sweep").glob("*.yaml") if path.stem != "default")


@pytest.mark.parametrize("name", SWEEPS)
def test_a_ready_sweep_is_planned(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [f"sweep={name}", "data.path=unknown", f"sweep.dir={tmp_path}", "cluster.device=cpu"]
    assert run_sweep(ROOT / "launch" / "pretrain.py", CONFIGS, arguments, SweepOptions(plan=True)) == 0
    told = capsys.readouterr().out
    count = int(re.search(r"^(\d+) runs, .* FLOP in all; \1 to start", told, re.M)[1])
    assert count >= 4 and len(re.findall(r"^\S+ .* \d+ x \d+ .* -$", told, re.M)) == count


def test_scaling_law_is_the_paper_s_setting() -> None:
    """Section 2.2: sizes of 70M to 7B, 8,192 of context, batches of 4M, 3e-4 fixed, weight decay 0.1, 300B tokens."""
    request = read_request(["sweep=scaling_law"], True, CONFIGS)
    sweep = request.sweep
    assert [size.parameters for size in sweep.sizes] == [70e6, 160e6, 410e6, 1e9, 3e9, 7e9]
    assert sweep.architectures == ["softmax", "lightning", "hybrid"] and max(sweep.tokens) == 300e9
    assert (sweep.seq_len, sweep.batch_tokens, sweep.lr, sweep.schedule) == (8192, [4 * 2**20], [3e-4], "constant")
    assert "optim.weight_decay=0.1" in request.defaults


def test_tiny_cpu_and_gpu_small_have_enough_points() -> None:
    tiny, small = (
        grid_runs(read_request([f"sweep={name}"], True, CONFIGS), CONFIGS) for name in ("tiny_cpu", "gpu_small")
    )
    assert len(tiny) >= 9 and len({run.architecture for run in tiny}) == len({run.size for run in tiny}) == 3
    assert len([run for run in small if 4.9e6 < run.activated < 51e6]) >= 12
    assert max(run.tokens for run in small) < 4 * 30.9e6  # bytes of Python's library, read four times at most


def test_the_page_names_every_option() -> None:
    page = (ROOT / "docs" / "sweeps.md").read_text()
    for kind, prefix in ((SweepConfig, "sweep."), (SizeConfig, ""), (SlurmConfig, "")):
        for field in dataclasses.fields(kind):
            assert f"`{prefix}{field.name}`" in page, f"{kind.__name__}.{field.name} is not in docs/sweeps.md"
    for name in SWEEPS:
        assert f"`{name}`" in page
