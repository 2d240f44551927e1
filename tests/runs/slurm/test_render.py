"""Job scripts of several clusters, as they are submitted; `python -m tests.runs.slurm.test_render` writes them anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.config import ClusterConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.runs.slurm.render import JobScript

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).with_name("golden")
BASE = ["model=tiny", "data.path=/shared/corpora/c", "run.name=first"]
CASES = {
    "h800": ["cluster=slurm_h800", "cluster.nodes=16", "cluster.spare_nodes=1", "cluster.partition=train",
             "cluster.account=lab", "cluster.qos=high", "cluster.setup=['module load cuda']",
             "cluster.srun=['--container-image=/shared/a b.sqsh']", "cluster.sbatch=['--reservation=x']"],
    "cpu": ["cluster=slurm_cpu", "run.name=it's one", "cluster.preflight=false", "cluster.signal_seconds=0"],
    "array": ["cluster=slurm_cpu"],
}  # fmt: skip


def script(case: str) -> JobScript:
    arguments = [*BASE, *CASES[case]]
    cluster = compose(arguments, ROOT / "configs").cluster
    link, links = (None, 4) if case == "array" else (2, 3) if case == "h800" else (1, 1)
    return JobScript(cluster, "mmtrain-first", ROOT / "launch", ROOT / "configs", Path("/shared/here"),
                     Path("/shared/here/runs/first/slurm"), arguments, link, links,
                     Path("/shared/mmtrain/.venv/bin"))  # fmt: skip


def rendered(case: str) -> str:
    return script(case).render().replace(str(ROOT), "/shared/mmtrain")


@pytest.mark.parametrize("case", CASES)
def test_scripts_are_the_golden_ones(case: str) -> None:
    assert rendered(case) == (GOLDEN / f"{case}.sbatch").read_text()


def test_sbatch_reads_names_and_folders_with_spaces() -> None:
    text = replace(script("cpu"), name="mmtrain-my run", folder=Path("/shared/my runs/slurm")).render()
    assert "\n#SBATCH '--job-name=mmtrain-my run'\n" in text
    assert "\n#SBATCH '--output=/shared/my runs/slurm/job-%j.out'\n" in text


def test_a_template_without_a_block_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    one = replace(script("cpu"), launch=tmp_path)
    with pytest.raises(ConfigError, match=r"pretrain\.sbatch cannot be read"):
        one.render()
    (tmp_path / "slurm/pretrain.sbatch").write_text("#!/bin/bash\n# >>> settings\n# <<< settings\n")
    with pytest.raises(ConfigError, match="has no block '# >>> options of sbatch'"):
        one.render()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sbatch": ["reservation=x"]}, r"cluster\.sbatch\[0\]"),
        ({"srun": ["--a\n--b"]}, r"cluster\.srun\[0\]"),
        ({"partition": "two words"}, r"cluster\.partition"),
        ({"shared_roots": ["here"]}, r"cluster\.shared_roots\[0\]"),
        ({"time_limit": "soon"}, r"cluster\.time_limit=soon: is no time"),
        ({"time_limit": "0"}, r"is no time at all"),
        ({"time_limit": "5", "signal_seconds": 300}, r"told to end 300 s before it, at its start"),
        ({"signal_seconds": 70_000}, r"cluster\.signal_seconds"),
    ],
)
def test_options_that_slurm_could_not_read_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ClusterConfig(**options).validate()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("8:00:00", 28800), ("2-0", 172800), ("1-02:03", 93780), ("1-02:03:04", 93784)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert ClusterConfig(time_limit=text).limit_seconds == seconds


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / f"{name}.sbatch").write_text(rendered(name))
