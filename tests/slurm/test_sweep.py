"""A sweep whose runs are jobs of a real Slurm, through submitit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.scaling.points import read_points
from tests.dist.runs import ROOT
from tests.dist.test_sweep import sweep
from tests.slurm.jobs import slurm, wait

pytestmark = pytest.mark.slurm
pytest.importorskip("submitit")
RUNS = ("softmax-a-4.096K", "lightning-a-4.096K")


def test_runs_are_jobs_and_the_same_command_collects_them(corpus: Path, tmp_path: Path) -> None:
    sizes = "sweep.sizes=[{name: a, layers: 2, hidden: 16, ffn: 16}]"
    given = (sizes, "sweep.architectures=[softmax,lightning]", "sweep.tokens=[4Ki]", "sweep.fit=false",
             "sweep.runner=slurm",
             f"cluster.shared_roots=[{tmp_path},{corpus},{ROOT}]",
             "sweep.slurm={gpus: 0, cpus: 1, minutes: 5, partition: debug}")  # fmt: skip
    begun = sweep(tmp_path, corpus, *given)
    assert begun.returncode == 0, begun.stderr
    jobs = json.loads((tmp_path / "tiny_cpu/jobs.json").read_text())
    assert set(jobs) == set(RUNS)
    assert "partition=debug" in slurm("scontrol", "show", "job", jobs[RUNS[0]]).lower()
    wait("the jobs", lambda: not slurm("squeue", "--noheader"))
    done = sweep(tmp_path, corpus, *given)
    assert done.returncode == 0 and "2 of 2 runs done, 6 points" in done.stdout.splitlines()[-1], done.stderr
    assert json.loads((tmp_path / "tiny_cpu/jobs.json").read_text()) == jobs  # none was submitted again
    assert {point.run for point in read_points(tmp_path / "tiny_cpu")} == set(RUNS)
