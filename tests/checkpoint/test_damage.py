"""Damaged checkpoints: which file is named, what is taken in their place, and what a kill leaves behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtrain.checkpoint import durable, manifest, save
from mmtrain.checkpoint.damage import damage_of
from mmtrain.checkpoint.listing import all_checkpoints, find_checkpoint, newest_checkpoint, remove_leftovers
from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.run_folder import RunFolder
from mmtrain.checkpoint.tensor_index import INDEX, rank_file
from mmtrain.errors import ConfigError
from tests.checkpoint.fake import SHARD, SIZE, checkpoint, config, metadata, said

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda path: (path / "meta.json").unlink(), "meta.json is missing"),
    "empty record": (lambda path: (path / "meta.json").write_text(""), "meta.json is empty"),
    "garbage record": (lambda path: (path / "meta.json").write_bytes(b"\xff\x00"), "meta.json is cut short or garbage"),
    "cut record": (lambda path: (path / "meta.json").write_text('{"step": 1,'), "meta.json is cut short or garbage"),
    "other record": (lambda path: (path / "meta.json").write_text("[1]"), "meta.json is not a checkpoint's record"),
    "record is a folder": (lambda path: [(path / "meta.json").unlink(), (path / "meta.json").mkdir()], "meta.json "),
    "no metadata": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "empty metadata": (lambda path: (path / ".metadata").write_bytes(b""), ".metadata is empty, cut short or garbage"),
    "garbage metadata": (lambda path: (path / ".metadata").write_bytes(b"\x80\x04garbage"), ".metadata is empty, "),
    "cut metadata": (lambda path: (path / ".metadata").write_bytes(pickle.dumps(metadata())[:-20]), ".metadata is"),
    "no shard": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "cut shard": (lambda path: (path / SHARD).write_bytes(bytes(SIZE - 1)), f"{SHARD} is cut short: 99 of 100 bytes"),
    "empty shard": (lambda path: (path / SHARD).write_bytes(b""), f"{SHARD} is cut short: 0 of 100 bytes"),
}  # fmt: skip


SHARD3 = rank_file(0)
DAMAGES_OF_3: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda path: (path / INDEX).unlink(), f"{INDEX} is missing"),
    "empty index": (lambda path: (path / INDEX).write_bytes(b""), f"{INDEX} has 0 of "),
    "no shard": (lambda path: (path / SHARD3).unlink(), f"{SHARD3} is missing"),
    "cut shard": (lambda path: (path / SHARD3).write_bytes(bytes(SIZE - 1)), f"{SHARD3} is cut short: 99 of 100 bytes"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing, so nothing can be"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES_OF_3)
def test_a_damaged_file_of_format_3_is_named(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path / "step-00000008", config(tmp_path), 8, format=3)
    assert damage_of(path) is None
    damage, told = DAMAGES_OF_3[name]
    damage(path)
    assert str(damage_of(path)).startswith(f"{path}/{told}")


@pytest.mark.parametrize("size", [SIZE, SIZE - 1])
def test_an_index_that_reaches_beyond_a_file_is_damage(tmp_path: Path, size: int) -> None:
    """With a manifest that fits: what wrote both was broken, or hostile."""
    path = checkpoint(tmp_path / "step-00000008", config(tmp_path), 8, format=3)
    (path / SHARD3).write_bytes(bytes(size))
    manifest.write_manifest(path, 8, {})
    told = damage_of(path)
    assert told is None if size == SIZE else told == f"{path / SHARD3} is cut short: {size} of {SIZE} bytes"


@pytest.mark.parametrize("name", DAMAGES)
def test_the_file_is_named_and_the_whole_one_beside_it_taken(tmp_path: Path, name: str) -> None:
    whole = checkpoint(tmp_path / "r/checkpoints/step-00000004", config(tmp_path), 4)
    newest = checkpoint(tmp_path / "r/checkpoints/step-00000008", config(tmp_path), 8)
    assert damage_of(newest) is None and newest_checkpoint("o", tmp_path / "r", pytest.fail) == newest
    damage, told = DAMAGES[name]
    damage(newest)
    lines: list[str] = []
    assert RunFolder(config(tmp_path, "run.resume=auto")).resume_from(lines.append) == whole
    assert said(lines).startswith(f"passed over a damaged checkpoint: {newest}/{told}")
    assert "taking step-00000004" in said(lines)
    with pytest.raises(ConfigError) as refused:
        find_checkpoint("run.resume", newest, pytest.fail)
    line = str(refused.value)
    assert f"{newest}/{told}" in line and f"the whole one beside it, {whole}" in line and "\n" not in line
    (whole / SHARD).unlink()
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):  # never from the first step, unasked
        RunFolder(config(tmp_path, "run.resume=auto")).resume_from(pytest.fail)


def test_numbers_order_checkpoints_and_other_folders_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert all_checkpoints(folder) == [] and newest_checkpoint("o", tmp_path, pytest.fail) is None
    for name, step in (("step-00000009", 9), ("step-100000000", 100000000), ("step-00000010", 10)):
        checkpoint(folder / name, {"model": {}}, step)
    checkpoint(folder / "step-00000012.writing", {"model": {}})
    assert [int(path.name[5:]) for path in all_checkpoints(folder)] == [9, 10, 100000000]  # nine digits after eight
    assert newest_checkpoint("o", tmp_path, pytest.fail) == folder / "step-100000000"
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        find_checkpoint("o", tmp_path / "nowhere", pytest.fail)


def test_what_a_kill_within_a_save_left_goes_under_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "r/checkpoints"
    for name in ("step-00000003", "step-00000003.replaced", "step-00000004.writing", "step-00000005.replaced"):
        checkpoint(folder / name, {"model": {}})
    with RunFolder(config(tmp_path)).locked(pytest.fail):
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000005"]
    remove_leftovers(tmp_path / "nowhere")


def test_a_checkpoint_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    old = checkpoint(tmp_path / "step-00000003", {"model": {}}, 3)
    save._name(checkpoint(tmp_path / "step-00000003.writing", {"model": {}}, 4), old, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"] and read_meta(old)["step"] == 4


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, replace, fsync = [], durable.os.replace, durable.os.fsync
    scratch, final = tmp_path / "step-00000003.writing", tmp_path / "step-00000003"
    (scratch / "tokenizer").mkdir(parents=True)
    (scratch / "tokenizer/tokenizer.json").write_text("{}")
    (scratch / "meta.json").write_text("{}")

    def synced(handle: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def named(source: Path, target: Path) -> None:
        done.append(("name", Path(target).name))
        replace(source, target)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", named)

    save._name(scratch, final, {})
    assert done == [
        ("sync", "meta.json"), ("sync", scratch.name), ("sync", "tokenizer.json"), ("sync", "tokenizer"),
        ("sync", "manifest.json.tmp"), ("name", "manifest.json"), ("sync", scratch.name),
        ("name", final.name), ("sync", tmp_path.name),
    ]  # fmt: skip


def test_a_record_that_does_not_fit_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    durable.write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_text(path, "new")
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_that_takes_no_files_is_told_in_a_line(tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "checkpoints").write_text("a file")
    from mmtrain.checkpoint.run_folder import Start

    with pytest.raises(ConfigError, match=r"run\.dir=.*: cannot be written: File exists \(.*checkpoints\)"):
        RunFolder(config(tmp_path)).claim(Start())


def test_what_a_manifest_does_not_list_is_refused_and_a_user_s_notes_are_not(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step-00000003", {"model": {}}, format=2)
    (path / "notes.txt").write_text("the good one")
    assert damage_of(path) is None
    for name in ("__7_0.distcp", "tokenizer/tokenizer.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"x")
        assert damage_of(path) == f"{path / name} is not listed in manifest.json"
        (path / name).unlink()


def test_a_manifest_is_needed_from_its_format_on(tmp_path: Path) -> None:
    old = checkpoint(tmp_path / "step-00000003", {"model": {}})
    assert damage_of(old) is None
    new = checkpoint(tmp_path / "step-00000004", {"model": {}}, 4, format=2)
    (new / "manifest.json").unlink()
    assert damage_of(new) == f"{new}/manifest.json is missing, so nothing can be verified"
    later = checkpoint(tmp_path / "step-00000005", {"model": {}}, 5, format=4)
    assert "is of a later mmtrain: format 4, this one reads 3" in str(damage_of(later))


HOSTILE_MANIFESTS = {
    "garbage": ("{", "is empty, cut short or garbage"),
    "no object": ("[]", "was changed"),
    "deep": ("[" * 100_000, "is empty, cut short or garbage"),
    "a path out": ({"../../etc/passwd": {"bytes": 1, "xxh3_128": "0" * 32}}, "names a file outside the checkpoint"),
    "a path from the root": ({"/etc/passwd": {"bytes": 1, "xxh3_128": "0" * 32}}, "names a file outside"),
    "no checksum": ({SHARD: {"bytes": SIZE}}, f"has no size and xxh3_128 checksum for {SHARD}"),
    "no files": ([], "is not a checkpoint's manifest"),
}


@pytest.mark.parametrize("name", HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_refused(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path / "step-00000003", {"model": {}}, format=2)
    given, told = HOSTILE_MANIFESTS[name]
    if not isinstance(given, str):
        made = {"step": 3, "files": given}
        given = json.dumps({**made, "manifest": manifest._own_sum(made)})
    (path / "manifest.json").write_text(f"{given}\n")
    assert str(damage_of(path)).startswith(f"{path}/manifest.json {told}")


def test_a_manifest_of_absurd_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "step-00000003", {"model": {}}, format=2)
    monkeypatch.setattr(manifest, "_LARGEST", 100)
    assert "manifest.json is larger than a manifest can be" in str(damage_of(path))


@pytest.mark.parametrize(("bytes_", "told"), [(SIZE + 1, "is too long"), (SIZE - 1, "is cut short")])
def test_sizes_are_compared_without_reading_tensors(tmp_path: Path, bytes_: int, told: str) -> None:
    path = checkpoint(tmp_path / "step-00000003", {"model": {}}, format=2)
    (path / SHARD).write_bytes(bytes(bytes_))
    assert damage_of(path) == f"{path / SHARD} {told}: {bytes_} of {SIZE} bytes"


POSITION = {"phase": 0, "row": 3, "phase_tokens": 30}
NO_RECORDS: dict[str, dict] = {
    "steps below zero": {"step": -1},
    "a truth value for steps": {"step": True},
    "absurdly many tokens": {"tokens": 1 << 70},
    "a phase that is none": {**POSITION, "phase": 1},
    "a list for the phase": {**POSITION, "phase": []},
    "rows without tokens of the phase": {"phase_tokens": None},
    "a RoPE base in letters": {"rope_base": "high"},
    "a RoPE base beyond a float": {"rope_base": 10**400},
    "a RoPE base of zero": {"rope_base": 0.0},
    "a text for a group of options": {"config": {"model": {}, "data": "x"}},
    "phases that are no list": {"config": {"model": {}, "stage": {"phases": {}}}},
    "phases of numbers": {"config": {"model": {}, "stage": {"phases": [1]}}},
    "no options": {"config": []},
}


@pytest.mark.parametrize("name", NO_RECORDS)
def test_a_record_that_no_version_wrote_is_damage_even_with_a_manifest_that_fits(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path / "step-00000008", config(tmp_path), 8, format=3, **POSITION)
    assert damage_of(path) is None
    (path / "meta.json").write_text(json.dumps(read_meta(path) | NO_RECORDS[name]))
    manifest.write_manifest(path, 8, {})
    assert damage_of(path) == f"{path}/meta.json is not a checkpoint's record"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", " " * (65 << 20) + "{}"])
def test_a_record_that_costs_memory_or_the_stack_is_garbage(tmp_path: Path, text: str) -> None:
    path = checkpoint(tmp_path / "step-00000008", config(tmp_path), 8, format=3)
    (path / "meta.json").write_text(text)
    assert damage_of(path) == f"{path}/meta.json is cut short or garbage"
