"""The bench of a resumed run: what it counts as the first step, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mmtrain.bench import resume
from mmtrain.bench.resume import main, until_first_step
from mmtrain.errors import ConfigError

# A run that has its second step only once the first was seen, and saves what it is asked to stop for.
RUN = """
import json, pathlib, signal, sys, time
options = dict(option.split("=") for option in sys.argv[1:] if "=" in option)
folder = pathlib.Path(options["run.dir"]) / options["run.name"]
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
metrics = folder / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0

def stop(*_):
    checkpoint = folder / "checkpoints" / "step-00000001"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    (checkpoint / "rank-00000.safetensors").write_bytes(bytes(1000))
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
if done:
    print("12:00:00 verified somewhere: 0.001 GB in 0.5 s", flush=True)
with metrics.open("a") as file:
    file.write(json.dumps({"event": "resumed" if done else "new"}) + "\\n")
    file.flush()
    time.sleep(0.1)
    file.write(json.dumps({"step": done + 1, "loss": 1.0}) + "\\n")
time.sleep(600)
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    (tmp_path / "run.py").write_text(RUN)
    return tmp_path / "run.py"


def test_a_run_is_resumed_and_timed(launcher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(launcher), "--out", str(tmp_path / "out"), "--repeats", "2", "+stage=quickstart", "data.path=some"])
    found = json.loads((tmp_path / "out" / "resume.json").read_text())
    assert found["bytes"] == 1002 and found["options"] == ["+stage=quickstart", "data.path=some"]
    assert found["verified_s"] == [0.5, 0.5] and len(found["new_s"]) == 1
    assert len(found["resumed_s"]) == len(found["read_s"]) == 2 and min(found["resumed_s"]) >= 0.1
    assert found["beyond_reading_s"][0] == pytest.approx(found["resumed_s"][0] - found["read_s"][0], abs=0.02)
    assert "1e-06 GB" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds a run"):
        main([str(launcher), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(("code", "longest"), [("print('refused: no such corpus'); exit(2)", 60), ("input()", 0.5)])
def test_a_run_without_a_step_is_told_of(tmp_path: Path, code: str, longest: float) -> None:
    with pytest.raises(RuntimeError, match="no such corpus" if "corpus" in code else "no step after"):
        until_first_step([sys.executable, "-c", code], tmp_path / "run", tmp_path / "log", longest)


def test_steps_of_before_do_not_count(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "valid_loss": 2.0}\n{"step": 2, "lo')
    assert resume._steps(run) == 1 and resume._steps(tmp_path / "none") == 0


def test_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--repeats"):
        main(["run.py", "--out", str(tmp_path), "--repeats", "0"])
