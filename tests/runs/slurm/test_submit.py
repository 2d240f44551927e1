"""Wrong jobs are refused before anything is written or submitted; good ones reach sbatch in order."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmdata.errors import DataError
from mmtrain.errors import ConfigError
from mmtrain.runs.slurm.partitions import parse_partitions
from mmtrain.runs.slurm.shared_files import check_room, check_shared, file_system
from mmtrain.runs.slurm.submit import SINGLE, Chain, PreparedJob, prepare_job, submit_job
from tests.dist.runs import SMALL, environment, make_corpus

ROOT = Path(__file__).resolve().parents[3]
SINFO = "debug*|1:00:00|n/a|1\ndebug*|1:00:00|n/a|3\nlong|infinite|20:00|2\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture
def slurm(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of Slurm that note how they were called; the third job is refused where REFUSE is set."""
    shutil.copytree(corpus, tmp_path / "corpus")
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sinfo": f"printf '{SINFO}'",
        "sbatch": f'echo "$@" >>{tmp_path}/calls; n=$(wc -l <{tmp_path}/calls)\n'
                  '[ -z "$REFUSE" ] || [ "$n" -lt 3 ] || { echo "sbatch: error: no" >&2; exit 1; }; echo $((n + 40))',
        "scancel": f'echo scancel "$@" >>{tmp_path}/calls',
    }  # fmt: skip
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("REFUSE", raising=False)
    return tmp_path / "calls"


def options(folder: Path, *more: str) -> list[str]:
    return [*SMALL, "cluster=slurm_cpu", f"cluster.shared_roots=[{folder},{ROOT}]", f"data.path={folder}/corpus",
            f"run.dir={folder}/runs", "run.name=r", *more]  # fmt: skip


def prepare(folder: Path, *more: str, chain: Chain = SINGLE) -> PreparedJob:
    return prepare_job(options(folder, *more), ROOT / "launch", ROOT / "configs", chain)


def test_a_chain_is_submitted_in_order(slurm: Path, tmp_path: Path) -> None:
    prepared = prepare(tmp_path, chain=Chain(3, after="7"))
    assert not (tmp_path / "runs").exists()
    assert submit_job(prepared) == ["41", "42", "43"]
    folder = tmp_path / "runs/r/slurm"
    behind = ["7", "41", "42"]
    assert slurm.read_text().splitlines() == [
        f"--parsable --dependency=afterok:{job} --kill-on-invalid-dep=yes {folder}/job-{i + 1}.sbatch"
        for i, job in enumerate(behind)
    ]
    assert "\nLINK=2\nLINKS=3\n" in (folder / "job-2.sbatch").read_text()


def test_an_array_is_one_submission(slurm: Path, tmp_path: Path) -> None:
    prepared = prepare(tmp_path, chain=Chain(3, as_array=True))
    assert submit_job(prepared) == ["41"]
    assert "#SBATCH --array=1-3%1\n" in (tmp_path / "runs/r/slurm/job.sbatch").read_text()


def test_a_chain_that_is_refused_halfway_is_taken_back(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(ConfigError, match="sbatch refuses the job: sbatch: error: no"):
        submit_job(prepare(tmp_path, chain=Chain(3)))
    assert slurm.read_text().splitlines()[-1] == "scancel 41 42"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["cluster.partition=debgu"], r"cluster\.partition=debgu: .*did you mean 'debug'\?"),
        (["cluster=local"], r"cluster\.scheduler=none: there is nothing .*cluster=slurm_cpu, cluster=slurm_h800"),
        (["cluster=slurm_h80"], r"cluster=slurm_h80: .*did you mean 'slurm_h800'"),
        (["cluster.nodes=4", "cluster.spare_nodes=1"], r"cluster\.nodes=4: partition debug has 4 nodes"),
        (["cluster.time_limit='2:00:00'"], r"cluster\.time_limit=2:00:00: jobs in partition debug end after 60 min"),
        (["cluster.nodes=3"], r"rows|batch"),  # eight rows for three ranks
        (["cluster.nodes=2", "parallel.tp=4"], r"parallel\.tp"),
        (["cluster.gpus_per_node=8"], r"cluster\.device_memory_gib=None"),
        (["data.path=/not/there"], r"data\.path=/not/there: is not there"),
        (["run.dir=/dev/shm/runs"], r"run\.dir=/dev/shm/runs: lies below none of cluster\.shared_roots"),
        (["run.dir=/dev/shm/runs", "cluster.shared_roots=[]"], r"run\.dir=/dev/shm/runs: other nodes do not see it"),
        (["model.top_k=9"], r"model\.top_k=9"),
        (["model.vocab_size=200"], r"model\.vocab_size=200: the tokenizer has 257 tokens"),
        (["stage.phases.0.sources=[{path: /not/there}]"], r"stage\.phases\[0\]\.sources\[0\]\.path=/not/there: is not"),
        (["stage.token_scale=1000", "data.strict_epochs=true"], r"data\.path=.*: is read \d+ times over"),
    ],
)
def test_wrong_jobs_are_refused(slurm: Path, tmp_path: Path, more: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        prepare(tmp_path, *more)
    assert not (tmp_path / "runs").exists() and not slurm.exists()


@pytest.mark.parametrize(
    ("chain", "line"), [(Chain(0), r"--chain=0: must be at least 1"), (Chain(after="x"), r"--after=x: is no number")]
)
def test_wrong_chains_are_refused(slurm: Path, tmp_path: Path, chain: Chain, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        prepare(tmp_path, chain=chain)


def test_what_is_no_corpus_is_refused(slurm: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bin/manifest\.json is missing"):
        prepare(tmp_path, f"data.path={tmp_path}/bin")


def test_missing_weights_may_come_of_the_job_before_alone(slurm: Path, tmp_path: Path) -> None:
    weights = f"run.init_from={tmp_path}/runs/other"
    prepare(tmp_path, weights, chain=Chain(after="7"))
    with pytest.raises(ConfigError, match=r"run\.init_from=.*: holds no complete checkpoint"):
        prepare(tmp_path, weights)
    with pytest.raises(ConfigError, match=r"run\.init_eyes=/dev/shm/eyes: lies below none of cluster\.shared_roots"):
        prepare(tmp_path, "run.init_eyes=/dev/shm/eyes", chain=Chain(after="7"))


def test_a_limit_below_a_checkpoint_interval_is_refused(slurm: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/r"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "step_s": 2.0}) + "\n" for i in range(5)))
    limit = "cluster.time_limit='10:00'"
    assert any("every 33.3 minutes" in line for line in prepare(tmp_path, "cluster.time_limit='50:00'").notes)
    with pytest.raises(ConfigError, match=r"cluster\.time_limit=10:00: is shorter than one checkpoint\.interval"):
        prepare(tmp_path, limit)
    prepare(tmp_path, "cluster.time_limit=null")  # an hour
    with pytest.raises(ConfigError, match=r"time_limit=None: the partition's 20 minutes: is shorter than one"):
        prepare(tmp_path, "cluster.partition=long", "cluster.time_limit=null")


def test_a_run_that_is_there_is_not_begun_again(slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/r/checkpoints/step-00000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds this run"):
        prepare(tmp_path)


MOUNTS = """\
/dev/sda / ext4 rw 0 0
server:/x /shared nfs4 rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
tmpfs /shared/fast\\040disk tmpfs rw 0 0
"""


def test_folders_of_one_host_are_known_by_their_file_system() -> None:
    assert file_system(Path("/shared/a/b"), MOUNTS) == ("/shared", "nfs4")
    assert file_system(Path("/shared/fast disk/b"), MOUNTS) == ("/shared/fast disk", "tmpfs")
    assert file_system(Path("/sharedx"), MOUNTS) == ("/", "ext4")
    assert "nfs4" in check_shared("run.dir", "/shared/runs", [], MOUNTS)
    for path, why in (("/home/me", "ext4"), ("/dev/shm/x", "/dev/shm is each node's own"), ("/tmp/x", "/tmp is each")):
        with pytest.raises(ConfigError, match=why):
            check_shared("run.dir", path, [], MOUNTS)
    assert "below cluster.shared_roots" in check_shared("run.dir", "/home/me/runs", ["/home/me"], MOUNTS)
    with pytest.raises(ConfigError, match="below none"):
        check_shared("run.dir", "/home/metoo", ["/home/me"], MOUNTS)


def test_there_has_to_be_room_for_two_checkpoints(slurm: Path, tmp_path: Path) -> None:
    config = prepare(tmp_path).planned.config
    one = 43_466 * 12  # the parameters of SMALL
    found = check_room(config, 10 * one)
    assert found.startswith("a checkpoint takes 0.00 GiB")
    with pytest.raises(ConfigError, match="has room for 0"):
        check_room(config, one)


def test_partitions_are_read() -> None:
    debug, long = parse_partitions(SINFO)
    assert (debug.name, debug.is_default, debug.limit, debug.usual, debug.nodes) == ("debug", True, 3600, 3600, 4)
    assert (long.name, long.is_default, long.limit, long.usual, long.nodes) == ("long", False, None, 1200, 2)


def test_the_command_shows_and_refuses(slurm: Path, tmp_path: Path) -> None:
    def submit(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/submit.py", *options(tmp_path), *more]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)

    shown = submit("--dry-run", "--chain", "2")
    assert shown.returncode == 0, shown.stderr
    for part in ("on 2 processes", "phase quickstart", "GiB predicted", "below cluster.shared_roots",
                 "#SBATCH --requeue", "sbatch --parsable --dependency=afterok:JOB1"):  # fmt: skip
        assert part in shown.stdout
    assert not (tmp_path / "runs").exists()
    wrong = submit("--dry", "--chain", "2")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
