"""`launch/checkpoint.py` on real checkpoints: what it tells, against what torch reads, and its exit codes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from mmtrain.checkpoint.manifest import write_manifest
from mmtrain.checkpoint.tensors import place_in_model
from tests.dist.saved_run import SavedRun
from tests.dist.test_manifest import flip
from tests.test_readme import after, commands, script

Capture = pytest.CaptureFixture[str]
main = script("checkpoint").main


def plain(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint as the bytes of its files, put together by its index."""
    found = {}
    for name, entry in json.loads((checkpoint / "tensors.json").read_text())["tensors"].items():
        assert entry["dtype"] == "F32"
        found[name] = torch.full(entry["shape"], math.nan)
        for file, begin, offsets, sizes in entry["parts"]:
            part = np.frombuffer((checkpoint / file).read_bytes(), np.float32, math.prod(sizes), begin)
            place = tuple(slice(first, first + count) for first, count in zip(offsets, sizes, strict=True))
            found[name][place] = torch.from_numpy(part.copy()).view(sizes)
    return found


def by_layer(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Norms of tensors by layer and kind, all at once."""
    groups: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name, value in tensors.items():
        if (place := place_in_model(name)) is not None:
            groups.setdefault(place, []).append(value.double().flatten())
    found: dict[str, dict[str, float]] = {}
    for (layer, kind), values in groups.items():
        found.setdefault(layer, {})[kind] = float(torch.cat(values).norm())
    return found


def told(capsys: Capture, *arguments: object) -> object:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore")
def test_what_is_in_a_checkpoint(saved: SavedRun, capsys: Capture, tmp_path: Path) -> None:
    path = saved.checkpoint(3)
    tensors, found = plain(path), told(capsys, saved.folder / "runs/r")
    assert (found["path"], found["step"], found["tokens"], found["phase"]) == (str(path), 3, 1536, "0 (quickstart)")
    assert found["layout"] == "pp=1 dp=2 cp=1 tp=1 edp=2 ep=1 etp=1" and found["integrity"] == "whole"
    assert found["parameters"] == sum(value.numel() for name, value in tensors.items() if name.startswith("model."))
    assert found["files"] == {"count": 6, "shards": 2, "bytes": sum(f.stat().st_size for f in path.rglob("*.*"))}
    expected = by_layer(tensors)
    assert list(expected) == ["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]
    assert set(expected["layers.1"]) == {"weights", "exp_avg", "exp_avg_sq"}
    for layer, kinds in expected.items():
        assert found["norms"][layer] == pytest.approx(kinds, rel=1e-12)
    assert main([str(path), "--quick"]) == 0
    text = capsys.readouterr().out
    assert "step        3, 1,536 tokens, phase 0 (quickstart)" in text and "norm" not in text


@pytest.mark.filterwarnings("ignore")
def test_what_two_checkpoints_differ_in(saved: SavedRun, capsys: Capture, tmp_path: Path) -> None:
    copy = saved.copy(tmp_path)
    paths = copy.checkpoint(1), copy.checkpoint(3)
    meta = json.loads((paths[1] / "meta.json").read_text())
    meta["config"]["optim"]["beta1"] = 0.5
    (paths[1] / "meta.json").write_text(json.dumps(meta))
    assert main([*map(str, paths)]) == 1  # the change is seen, and named
    assert "meta.json has " in capsys.readouterr().err
    write_manifest(paths[1], 3, {})
    found = told(capsys, *paths)
    assert found["position"] == {"step": [1, 3], "tokens": [512, 1536], "phase": [0, 0]}
    assert found["options"] == {"optim.beta1": [0.9, 0.5]}
    assert found["shapes"] == {} and found["only_in_first"] == found["only_in_second"] == []
    first, second = (plain(path) for path in paths)
    size, apart = by_layer(first), by_layer({name: first[name].double() - second[name].double() for name in first})
    for layer, kinds in apart.items():
        assert found["relative_difference"][layer] == pytest.approx(
            {kind: value / size[layer][kind] for kind, value in kinds.items()}, rel=1e-12
        )
    same = told(capsys, paths[0], paths[0])
    assert all(value == 0 for kinds in same["relative_difference"].values() for value in kinds.values())
    assert main([*map(str, paths)]) == 0 and "|a - b| / |a|" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_shapes_are_listed(capsys: Capture, tmp_path: Path) -> None:
    for step, state in (
        (1, {"w": torch.ones(2, 3), "a": torch.ones(1)}),
        (2, {"w": torch.ones(3), "b": torch.zeros(1)}),
    ):
        path = tmp_path / f"step-{step:08d}"
        dcp.save({"model": state}, checkpoint_id=path, no_dist=True)
        (path / "meta.json").write_text(json.dumps({"step": step, "tokens": 1, "config": {"model": {}}}))
    paths = tmp_path / "step-00000001", tmp_path / "step-00000002"
    found = told(capsys, *paths)
    assert found["shapes"] == {"model.w": [[2, 3], [3]]} and found["relative_difference"] == {}
    assert (found["only_in_first"], found["only_in_second"]) == (["model.a"], ["model.b"])
    assert told(capsys, paths[0])["norms"] == {"w": {"weights": pytest.approx(math.sqrt(6))}, "a": {"weights": 1.0}}


def test_every_checkpoint_below_a_folder_gets_a_line(saved: SavedRun, capsys: Capture, tmp_path: Path) -> None:
    copy = saved.copy(tmp_path)
    aside = copy.folder / "runs/r/abandoned/2026-01-01-after-step-1/checkpoints"
    aside.mkdir(parents=True)
    copy.checkpoint(2).rename(aside / "step-00000002")
    assert main(["--verify", f"{tmp_path}/runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [copy.checkpoint(1), copy.checkpoint(3), aside / "step-00000002"]
    assert lines == [f"whole      {path}: every file is what was saved" for path in expected]
    flip(copy.checkpoint(1) / "rank-00001.safetensors", tmp_path)
    named = f"{copy.checkpoint(1)}/rank-00001.safetensors is not what was saved"
    for given in (["--verify", f"{tmp_path}/runs"], ["--verify", *map(str, expected)], [str(copy.checkpoint(1))]):
        assert main(given) == 1 and named in capsys.readouterr().out
    assert main(["--verify", f"{tmp_path}/runs", "--json"]) == 1
    states = [one["integrity"] for one in json.loads(capsys.readouterr().out)]
    assert states == ["damaged", "whole", "whole"]
    assert main(["--verify", "--quick", f"{tmp_path}/runs"]) == 0  # it does not read tensors, and says so
    assert capsys.readouterr().out.startswith("unverified")


def test_the_commands_of_the_pages_work_as_printed(
    saved: SavedRun, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "other"):
        shutil.copytree(saved.folder / "runs/r", tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    lines = commands("launch/checkpoint.py ")
    assert len(lines) >= 3
    for line in lines:
        assert main(after(line, "launch/checkpoint.py")) == 0 and capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_finite_is_json_too(capsys: Capture, tmp_path: Path) -> None:
    state = {"model": {"w": torch.tensor([1.0, math.nan]), "v": torch.tensor([math.inf])}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "meta.json").write_text(json.dumps({"step": 1, "tokens": 1, "config": {"model": {}}}))
    assert main([str(tmp_path), "--json"]) == 0
    text = capsys.readouterr().out
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["norms"] == {"w": {"weights": "nan"}, "v": {"weights": "inf"}}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{}/nowhere"], "no such folder"),
        (["{}"], "holds no complete checkpoint"),
        (["--verify", "{}"], "no checkpoint"),
    ],
)
def test_wrong_input_is_told_in_a_line(tmp_path: Path, capsys: Capture, arguments: list[str], line: str) -> None:
    assert main([one.format(tmp_path) for one in arguments]) == 2
    told = capsys.readouterr().err
    assert line in told and told.count("\n") == 1 and told.startswith("error: path=")


def test_three_paths_are_too_many_to_compare(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["a", "b", "c"])
    assert "one path to sum up, or two to compare" in capsys.readouterr().err
