"""The programs on docs/vision.md run as printed, and its figures are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mmtrain.config.cli import compose
from mmtrain.model.flops import count_parameters
from mmtrain.vision.flops import count_vision_parameters
from tests.dist.runs import environment

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/vision.md").read_text()


def test_programs_of_the_page_run_and_print_what_it_says() -> None:
    programs = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(programs) == 2
    run = subprocess.run([sys.executable, "-c", "\n".join(programs)], cwd=ROOT, env=environment(), capture_output=True,
                         text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == re.findall(r"print\(.*# (\d+)", PAGE) == ["2340", "5"]


def test_counts_of_the_page_are_the_code_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.M)
    assert [row[0] for row in rows] == ["minimax_vl_01", "vl_3b", "tiny_vl"]
    for name, *counts in rows:
        model = compose([f"model={name}", "run.name=x", "data.path=x"], ROOT / "configs").model
        eyes = count_vision_parameters(model)
        text = count_parameters(model).total
        assert counts == [f"{n:,}" for n in (text, sum(eyes.values()), eyes["vision_tower"])]
