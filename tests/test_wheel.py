"""The wheel: what it holds, and its console entry, run from another folder with nothing but the wheel's files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.dist.runs import SMALL

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("hatchling", reason="the extra `test` is not installed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT,
                   check=True, capture_output=True)  # fmt: skip
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as files:
        files.extractall(folder / "site")
    return folder / "site"


def entry(wheel: Path, folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "mmtrain")) -> str:
    """What ``mmtrain ARGUMENTS`` prints in `folder`, where nothing but the wheel can be imported."""
    done = start(wheel, folder, *arguments, program=program)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def start(
    wheel: Path, folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "mmtrain")
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *program, *arguments], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip


def test_the_wheel_holds_what_runs_need_and_nothing_else(wheel: Path) -> None:
    files = [path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()]
    assert {path.parts[0] for path in files} == {"mmtrain", "mmkernels", "mmdata", "mmtrain-0.1.0.dist-info"}
    assert not [path for path in files if {"bench", "tests", "results", "__pycache__"} & set(path.parts)]
    for here, there in (("launch", "mmtrain/launch"), ("configs", "mmtrain/configs"),
                        ("data/recipes", "mmtrain/data/recipes"), ("kernels/mmkernels", "mmkernels"),
                        ("data/mmdata", "mmdata")):  # fmt: skip
        wanted = {path.relative_to(ROOT / here) for path in (ROOT / here).rglob("*.py")}
        wanted |= {path.relative_to(ROOT / here) for path in (ROOT / here).rglob("*.yaml")}
        assert wanted and all((wheel / there / path).is_file() for path in wanted), there
    page = {path.name for path in (ROOT / "mmtrain/report/page").iterdir()}
    assert "style.css" in page and page == {path.name for path in (wheel / "mmtrain/report/page").iterdir()}
    assert "mmtrain = mmtrain.__main__:main" in (wheel / "mmtrain-0.1.0.dist-info/entry_points.txt").read_text()


@pytest.mark.slow
def test_a_corpus_is_prepared_and_a_model_trained_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"alpha beta {i} " * 40)
    entry(wheel, tmp_path, "prepare", "--input", "text", "--output", "corpus", "--tokenizer", "bytes", "--workers", "1",
          "--valid-fraction", "0.1")  # fmt: skip
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "mmtrain")
    out = entry(wheel, tmp_path, "pretrain", *SMALL, "data.path=corpus", "data.valid_rows=0", "run.name=first",
                "run.max_steps=2", "checkpoint.save_final=false", program=torchrun)  # fmt: skip
    assert "runs/first" in out
    records = [json.loads(line) for line in (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2]


def test_options_are_read_beside_the_wheel_s_launchers(wheel: Path, tmp_path: Path) -> None:
    assert "name: tiny" in entry(wheel, tmp_path, "pretrain", "data.path=x", "run.name=x", "--cfg", "job")
    usage = entry(wheel, tmp_path, "prepare", "--recipe", "stdlib", "--help")
    assert usage.startswith("usage: mmtrain prepare ")
    assert not list(tmp_path.iterdir())


def test_compare_starts_the_wheel_s_own_launcher(wheel: Path, tmp_path: Path) -> None:
    """A marker in the wheel's launcher comes out of a layout that compare started."""
    site = shutil.copytree(wheel, tmp_path / "site")
    (site / "mmtrain/launch/pretrain.py").write_text("import sys; sys.exit('error: the launcher ' + __file__)")
    done = start(site, tmp_path, "compare", "data.path=x", "--layout", "1", "--layout", "1")
    assert done.returncode == 2 and f"the launcher {site}/mmtrain/launch/pretrain.py" in done.stderr


def test_commands_are_listed_and_a_wrong_one_refused(wheel: Path, tmp_path: Path) -> None:
    listed = entry(wheel, tmp_path)
    assert listed == entry(wheel, tmp_path, "--help")
    assert all(f"\n  {path.stem} " in listed for path in (ROOT / "launch").glob("*.py"))
    assert entry(wheel, tmp_path, "--version") == "mmtrain 0.1.0\n"
    done = start(wheel, tmp_path, "pretran")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command=pretran: not a known command; did you mean 'pretrain'?\n"
