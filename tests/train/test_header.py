"""The lines that open a run: each figure is where a reader looks for it."""

from __future__ import annotations

from pathlib import Path

import torch

from mmtrain.checkpoint.progress import Progress
from mmtrain.config.cli import compose
from mmtrain.parallel.layout import Layout
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.header import header_lines

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_header_says_where_what_how_far_and_from_what() -> None:
    config = compose(["stage=quickstart", "data.path=x", "run.name=r", "parallel.tp=2"], CONFIGS)
    layout = Layout(pp=1, dp=2, cp=1, tp=2, edp=4, ep=1, etp=1)
    context = ParallelContext(torch.device("cpu"), layout, None, None, None, None)
    plan = RunPlan(scaled_phases(config.stage), 2, 1)
    at = Progress(20, 20 * 8192, 0, 320, 20 * 8192)
    lines = header_lines(config, context, torch.bfloat16, plan, at, "resumed from c after step 20")
    text = "\n".join(lines)
    assert lines[0] == "run     r: resumed from c after step 20"
    for part in ("4 processes: PP1 x DP2 x CP1 x TP2", "tiny: 17.2M parameters, 5.66M activated", "bfloat16 products",
                 "adamw; nothing recomputed", "quickstart: rows of 512 tokens", "983K tokens in 120 steps of 8,192",
                 "ahead   100 steps, 819K tokens"):  # fmt: skip
        assert part in text, part
    config.run.max_steps = 30
    assert header_lines(config, context, torch.float32, plan, at, "")[-1] == "ahead   10 steps, 81.9K tokens"
