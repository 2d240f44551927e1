"""Checksums of real checkpoints: every file of one is damaged in turn, and what a launch then begins with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.dcp import save_checkpoint
from mmtrain.checkpoint.manifest import file_sum, our_files, read_manifest
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.checkpoint.verify import damage_of_tensors, shards_of
from mmtrain.config import ClusterConfig, PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.infer.load import open_checkpoint
from mmtrain.parallel import mesh
from mmtrain.train.resume import verified_start
from tests.checkpoint.fake import CONFIGS
from tests.dist.pool import Pool
from tests.dist.runs import SMALL, pretrain
from tests.dist.test_checkpoint import build

LAYERS = ["model.num_layers=2", "model.layer_pattern=LS"]


@dataclass(frozen=True)
class Run:
    """A run of three steps on two ranks, with a checkpoint of each."""

    folder: Path
    options: list[str]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"runs/r/checkpoints/step-{step:08d}"

    def config(self, *overrides: str) -> PretrainConfig:
        return compose([*self.options, f"run.dir={self.folder}/runs", "run.resume=auto", *overrides], CONFIGS)

    def copy(self, folder: Path) -> Run:
        shutil.copytree(self.folder / "runs", folder / "runs")
        return Run(folder, self.options)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = [*SMALL, *LAYERS, f"data.path={corpus}", "run.name=r", "checkpoint.interval=1", "checkpoint.keep=0"]
    made = Run(tmp_path_factory.mktemp("saved"), options)
    pretrain(*options, f"run.dir={made.folder}/runs", "run.max_steps=3", processes=2)
    return made


FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.json", "tokenizer/tokenizer_bytes.json"]


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a flipped bit": flip,
    "cut short": cut,
    "missing": lambda path, other: path.unlink(),
    "another step's": lambda path, other: shutil.copy(other, path),
}


def test_a_checkpoint_lists_every_file_with_what_it_holds(run: Run) -> None:
    path = run.checkpoint(3)
    manifest = read_manifest(path)
    assert sorted([*manifest.files, "manifest.json"]) == FILES and manifest.step == 3
    assert sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()) == FILES
    assert all(file_sum(path / name) == listed for name, listed in manifest.files.items())
    assert json.loads((path / "meta.json").read_text())["format"] == 2
    assert shards_of(manifest) == ["__0_0.distcp", "__1_0.distcp"] and our_files(path) == sorted(manifest.files)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_named_and_the_checkpoint_before_taken(run: Run, tmp_path: Path, damage: str) -> None:
    copy = run.copy(tmp_path)
    newest, before = copy.checkpoint(3), copy.checkpoint(2)
    for name in FILES:
        if damage == "another step's" and name.startswith("tokenizer/"):
            continue  # it is the same file
        if damage == "another step's":
            assert (newest / name).stat().st_size == (before / name).stat().st_size, name
        DAMAGES[damage](newest / name, before / name)
        start = verified_start(copy.config(), RunFolder(copy.config()))
        (line,) = [note for note in start.notes if note.startswith("passed over")]
        assert start.resume == before and f"passed over a damaged checkpoint: {newest / name} " in line, line
        assert "\n" not in line and open_checkpoint(tmp_path / "runs/r").path == before
        named = copy.config(f"run.resume={newest}")
        with pytest.raises(ConfigError) as refused:
            verified_start(named, RunFolder(named))
        assert f"damaged: {newest / name} " in str(refused.value) and f"one beside it, {before}" in str(refused.value)
        fresh = copy.config("run.name=new", f"run.init_from={tmp_path}/runs/r")
        assert verified_start(fresh, RunFolder(fresh)).weights == before
        shutil.copy(run.checkpoint(3) / name, newest / name)
    assert verified_start(copy.config(), RunFolder(copy.config())).resume == newest


def test_only_damage_within_tensors_is_left_to_the_option(run: Run, tmp_path: Path) -> None:
    copy = run.copy(tmp_path)
    flip(copy.checkpoint(3) / "__1_0.distcp", tmp_path)
    fast = copy.config("checkpoint.verify=false")
    assert verified_start(fast, RunFolder(fast)).resume == copy.checkpoint(3)
    flip(copy.checkpoint(3) / "meta.json", tmp_path)
    assert verified_start(fast, RunFolder(fast)).resume == copy.checkpoint(2)


def test_two_ranks_agree_on_damage_that_one_of_them_read(pool: Pool, tmp_path: Path) -> None:
    (first, second) = pool.run(save_and_verify, tmp_path, world=2)
    whole, flipped = f"{tmp_path}/step-00000001", f"{tmp_path}/step-00000001/__1_0.distcp is not what was saved: "
    assert damage_of(Path(whole)) is None  # what it would be by names and sizes alone
    assert first[0] is None and second[0] is None
    assert first[1] == second[1] and first[1].startswith(flipped)
    sizes = [(Path(whole) / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert [first[2], second[2]] == sizes  # each byte was read by one rank


def save_and_verify(folder: Path) -> tuple[str | None, str | None, int]:
    """Save, verify, flip a bit of what rank 1 wrote, verify again; with the bytes that this rank read for that."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        model, optimizer = build(context, 7)
        path = save_checkpoint(folder, model, optimizer, Progress(1, 64), {"model": {}}, rope_base=5e6)
        whole = damage_of_tensors(path)
        dist.barrier()
        if context.rank == 0:
            flip(path / "__1_0.distcp", path)
        dist.barrier()
        read: list[int] = []
        return whole, damage_of_tensors(path, read.append), sum(read)
    finally:
        mesh.stop()


def test_a_run_goes_on_from_the_last_one_that_is_whole(run: Run, tmp_path: Path) -> None:
    copy = run.copy(tmp_path)
    flip(copy.checkpoint(3) / "__1_0.distcp", tmp_path)
    done = pretrain(*copy.options, f"run.dir={tmp_path}/runs", "run.resume=auto", "run.max_steps=3", processes=2)
    assert "passed over a damaged checkpoint" in done.stderr + done.stdout
    for name in ("__0_0.distcp", "__1_0.distcp"):  # step 3 again, to the last bit
        assert file_sum(copy.checkpoint(3) / name) == file_sum(run.checkpoint(3) / name)
