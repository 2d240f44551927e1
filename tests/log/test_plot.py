"""The plot is drawn from metrics.jsonl alone, whatever a run recorded."""

import math
import subprocess
import sys

import pytest

from mmtrain.log.metrics import MetricsWriter
from mmtrain.log.plot import _loss_range, _relative, _smoothed, main, plot_run


def write_run(path, steps, layers=0, phases=1):
    with MetricsWriter(path / "metrics.jsonl") as writer:
        for step in range(1, steps + 1):
            record = {"step": step, "tokens": 64 * step, "loss": math.nan if step == 3 else 5 / step, "seq_len": 8}
            record["phase"] = f"phase {step * phases // (steps + 1)}"
            if layers:
                record |= {"drop_rate": 0.1, "router_load": [[0.5, 1.5, math.nan]] * layers}
                record |= {"drop_rate_per_layer": [0.1] * layers}
                record |= {"drop_rate_alone": 0.2} if layers > 2 else {}
            writer.write(record)
        writer.write({"step": steps, "tokens": 64 * steps, "val_loss": 1.0, "val_bits_per_byte": 2.0})
    return path


@pytest.mark.parametrize(("steps", "layers", "phases"), [(1, 0, 1), (1, 2, 1), (30, 3, 3), (150, 0, 2)])
def test_draws_every_kind_of_run(tmp_path, steps, layers, phases):
    out = plot_run(write_run(tmp_path, steps, layers, phases))
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 5000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "plot.png"]


def test_command_line(tmp_path, capsys):
    assert main([str(write_run(tmp_path, 5))]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "plot.png")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert main([str(tmp_path / "empty")]) == 2


def test_smoothing_ignores_a_spike_and_keeps_the_start():
    values = [10.0 - 0.01 * i for i in range(500)]
    values[250] = 1000.0
    xs, smooth = _smoothed(list(range(500)), values)
    assert smooth[0] == 10.0 and max(smooth) == 10.0 and len(xs) == len(smooth) <= 401
    assert smooth == sorted(smooth, reverse=True)


def test_loss_range_leaves_a_spike_out_but_not_the_start():
    low, high = _loss_range([9.0] + [3.0] * 999 + [50.0], [])
    assert 9.0 < high < 10.0 and low < 3.0


def test_relative_load():
    assert _relative([0.1, 0.3, 0.2]) == pytest.approx([0.5, 1.0, 1.5])
    assert _relative([0.0, 0.0]) == [0.0, 0.0]


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, mmtrain.log.plot; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
