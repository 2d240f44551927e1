"""Checksums of real checkpoints: every file of one is damaged in turn, and what a launch then begins with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.manifest import file_sum, our_files, read_manifest
from mmtrain.checkpoint.progress import Progress
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.checkpoint.save import begin_save
from mmtrain.checkpoint.verify import damage_of_tensors, shards_of
from mmtrain.config import ClusterConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.load import open_checkpoint
from mmtrain.optim.host_kernel import load_host_adam
from mmtrain.parallel import mesh
from mmtrain.train.resume import verified_start
from tests.dist.pool import Pool
from tests.dist.runs import pretrain
from tests.dist.saved_run import SavedRun, save_run
from tests.dist.test_checkpoint import build

SHARDS = ["rank-00000.safetensors", "rank-00001.safetensors"]
FILES = ["manifest.json", "meta.json", *SHARDS, "tensors.json", "tokenizer/tokenizer_bytes.json"]


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


def test_a_checkpoint_lists_every_file_with_what_it_holds(saved: SavedRun) -> None:
    path = saved.checkpoint(3)
    manifest = read_manifest(path)
    assert sorted([*manifest.files, "manifest.json"]) == FILES and manifest.step == 3
    assert sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()) == FILES
    assert all(file_sum(path / name) == listed for name, listed in manifest.files.items())
    assert json.loads((path / "meta.json").read_text())["format"] == 3
    assert shards_of(manifest) == SHARDS and our_files(path) == sorted(manifest.files)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_named_and_the_checkpoint_before_taken(
    saved: SavedRun, tmp_path: Path, damage: str
) -> None:
    copy = saved.copy(tmp_path)
    newest, before, config = copy.checkpoint(3), copy.checkpoint(2), copy.config()
    named = replace(config, run=replace(config.run, resume=str(newest)))
    fresh = replace(config, run=replace(config.run, name="new", init_from=f"{tmp_path}/runs/r"))
    for name in FILES:
        if damage == "another step's" and name.startswith("tokenizer/"):
            continue  # it is the same file
        if damage == "another step's" and name != "meta.json":  # as long, so that bytes alone tell
            assert (newest / name).stat().st_size == (before / name).stat().st_size, name
        DAMAGES[damage](newest / name, before / name)
        start = verified_start(config, RunFolder(config))
        (line,) = [note for note in start.notes if note.startswith("passed over")]
        assert start.resume == before and f"passed over a damaged checkpoint: {newest / name} " in line, line
        assert "\n" not in line and open_checkpoint(tmp_path / "runs/r").path == before
        with pytest.raises(ConfigError) as refused:
            verified_start(named, RunFolder(named))
        assert f"damaged: {newest / name} " in str(refused.value) and f"one beside it, {before}" in str(refused.value)
        assert verified_start(fresh, RunFolder(fresh)).weights == before
        shutil.copy(saved.checkpoint(3) / name, newest / name)
    assert verified_start(config, RunFolder(config)).resume == newest


def test_only_damage_within_tensors_is_left_to_the_option(saved: SavedRun, tmp_path: Path) -> None:
    copy = saved.copy(tmp_path)
    flip(copy.checkpoint(3) / SHARDS[1], tmp_path)
    fast = copy.config("checkpoint.verify=false")
    assert verified_start(fast, RunFolder(fast)).resume == copy.checkpoint(3)
    flip(copy.checkpoint(3) / "meta.json", tmp_path)
    assert verified_start(fast, RunFolder(fast)).resume == copy.checkpoint(2)


def test_two_ranks_agree_on_damage_that_one_of_them_read(pool: Pool, tmp_path: Path) -> None:
    (first, second) = pool.run(save_and_verify, tmp_path, world=2)
    whole, flipped = f"{tmp_path}/step-00000001", f"{tmp_path}/step-00000001/{SHARDS[1]} is not what was saved: "
    assert damage_of(Path(whole)) is None  # what it would be by names and sizes alone
    assert first[0] is None and second[0] is None
    assert first[1] == second[1] and first[1].startswith(flipped)
    sizes = [(Path(whole) / name).stat().st_size for name in SHARDS]
    assert [first[2], second[2]] == sizes  # each byte was read by one rank


def save_and_verify(folder: Path) -> tuple[str | None, str | None, int]:
    """Save, verify, flip a bit of what rank 1 wrote, verify again; with the bytes that this rank read for that."""
    context = mesh.start(ClusterConfig(device="cpu"))
    try:
        model, optimizer = build(context, 7)
        path = begin_save(folder, model, optimizer, Progress(1, 64), {"model": {}}, rope_base=5e6).finish()
        whole = damage_of_tensors(path)
        dist.barrier()
        if context.rank == 0:
            flip(path / SHARDS[1], path)
        dist.barrier()
        read: list[int] = []
        return whole, damage_of_tensors(path, read.append), sum(read)
    finally:
        mesh.stop()


def test_a_run_goes_on_from_the_last_one_that_is_whole(saved: SavedRun, tmp_path: Path) -> None:
    copy = saved.copy(tmp_path)
    flip(copy.checkpoint(3) / SHARDS[1], tmp_path)
    done = pretrain(*copy.options, f"run.dir={tmp_path}/runs", "run.resume=auto", "run.max_steps=3", processes=2)
    assert "passed over a damaged checkpoint" in done.stderr + done.stdout
    for name in SHARDS:  # step 3 again, to the last bit
        assert file_sum(copy.checkpoint(3) / name) == file_sum(saved.checkpoint(3) / name)


@pytest.mark.slow
def test_damaged_moments_of_an_optimizer_in_host_memory_are_seen_too(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the extra `offload` is not installed")
    load_host_adam()  # compiles the kernel, if it has to, without a limit of time
    saved = save_run(corpus, tmp_path / "saved", "optim=cpu_offload", "optim.precision=fp32")
    copy = saved.copy(tmp_path)
    newest, before, config = copy.checkpoint(3), copy.checkpoint(2), copy.config()
    places = json.loads((newest / "tensors.json").read_text())["tensors"]
    for rank, name in enumerate(SHARDS):
        moments = [part for tensor, one in places.items() if tensor.endswith(".exp_avg_sq") for part in one["parts"]]
        assert any(part[0] == name for part in moments), rank
        for damage in DAMAGES.values():
            damage(newest / name, before / name)
            start = verified_start(config, RunFolder(config))
            (line,) = [note for note in start.notes if note.startswith("passed over")]
            assert start.resume == before and f"passed over a damaged checkpoint: {newest / name} " in line, line
            shutil.copy(saved.checkpoint(3) / name, newest / name)
    flip(newest / SHARDS[0], tmp_path)
    pretrain(*copy.options, f"run.dir={tmp_path}/runs", "run.resume=auto", "run.max_steps=3", processes=2)
    for name in SHARDS:
        assert file_sum(newest / name) == file_sum(saved.checkpoint(3) / name)
