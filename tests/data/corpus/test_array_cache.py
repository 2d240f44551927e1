"""Arrays kept on disk: made once by one process, found by all, never stale, and safe against kills."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus import build_lock
from mmdata.corpus.array_cache import FOLDER, ArrayCache, Entry, cache_beside, read_entry
from mmdata.corpus.build_lock import host_name, read_holder, take_lock, wait_for_lock

KEY = {"corpus": "abc", "seed": 1}
VALUES = np.arange(1000)


def never(tick: Callable[[float], None]) -> Entry:
    raise AssertionError("made again")


def make(tick: Callable[[float], None]) -> Entry:
    return Entry({"values": VALUES, "none": VALUES[:0]}, {"sum": 5})


def get(cache: ArrayCache, builder: Callable = make, key: dict = KEY) -> Entry:
    return cache.get("kind", key, builder, "the index")


def entry_folder(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def test_an_entry_is_made_once_and_mapped_after_that(tmp_path: Path) -> None:
    lines: list[str] = []
    cache = ArrayCache([tmp_path / "deep/cache"], lines.append)
    for entry in (get(cache), get(cache, never), get(pickle.loads(pickle.dumps(cache)), never)):
        assert np.array_equal(entry.arrays["values"], VALUES) and entry.arrays["none"].shape == (0,)
        assert not entry.arrays["values"].flags.writeable and isinstance(entry.arrays["values"].base, np.memmap)
        assert entry.facts == {"sum": 5}
    assert [line.split()[0] for line in lines] == ["building", "built"] and str(tmp_path) in lines[1]
    assert [path.name for path in (tmp_path / "deep/cache").iterdir()] == [entry.folder.name]  # no lock, no scratch
    with pytest.raises(AssertionError, match="made again"):
        get(cache, never, KEY | {"seed": 2})


def test_an_entry_of_another_key_or_a_damaged_one_is_not_taken(tmp_path: Path) -> None:
    cache = ArrayCache([tmp_path])
    for damage in ("key", "cut", "garbage", "shape", "gone"):
        get(cache)
        folder = entry_folder(tmp_path)
        record = json.loads((folder / "entry.json").read_text())
        if damage == "key":
            (folder / "entry.json").write_text(json.dumps(record | {"key": {"corpus": "other"}}))
        elif damage == "cut":
            os.truncate(folder / "values.npy", 500)
        elif damage == "shape":
            np.save(folder / "values.npy", VALUES[:7])
        elif damage == "garbage":
            (folder / "entry.json").write_text("\0\0")
        else:
            (folder / "values.npy").unlink()
        assert cache.find("kind", KEY) is None
        assert np.array_equal(get(cache).arrays["values"], VALUES)
        assert get(cache, never).facts == {"sum": 5} and entry_folder(tmp_path)


def test_the_first_folder_that_can_be_written_is_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    second = ArrayCache([tmp_path / "file/cache", tmp_path / "second"], lines.append)
    assert get(second).folder.parent == tmp_path / "second"
    nowhere = ArrayCache([tmp_path / "file/cache"], lines.append)
    assert get(nowhere).folder is None and np.array_equal(get(nowhere).arrays["values"], VALUES)
    assert "kept in memory" in lines[-1]
    nowhere.put("kind", KEY, make(lambda done: None))  # says nothing, does nothing
    assert get(ArrayCache([tmp_path / "file/cache", tmp_path / "second"]), never).facts == {"sum": 5}


def test_a_cache_lies_beside_its_corpus_or_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_beside(tmp_path, None).folders == (tmp_path / FOLDER, tmp_path / "xdg/mmdata")
    assert cache_beside(tmp_path / "pair.v1", None).folders[0] == tmp_path / FOLDER
    assert cache_beside(tmp_path, str(tmp_path / "own")).folders == (tmp_path / "own",)


def _work(folder: Path, ready: multiprocessing.Barrier) -> None:
    def noted(tick: Callable[[float], None]) -> Entry:
        with open(folder / "made", "a") as stream:
            stream.write("x")
        return make(tick)

    ready.wait()
    assert np.array_equal(get(ArrayCache([folder / "cache"]), noted).arrays["values"], VALUES)


def test_of_many_processes_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(4)
    workers = [context.Process(target=_work, args=(tmp_path, ready)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4 and (tmp_path / "made").read_text() == "x"


def test_a_killed_builder_is_replaced_and_cleaned_up_after(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; import numpy as np\n"
        "from mmdata.corpus import array_cache as a\n"
        "a._rename = lambda *args: os.kill(os.getpid(), 9)\n"  # killed when all is written, before it gets its name
        f"a.ArrayCache([Path(sys.argv[1])]).get('kind', {KEY}, lambda t: a.Entry({{'values': np.arange(9)}}), 'x')\n"
    )
    paths = os.pathsep.join(sys.path)
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": paths})
    left = sorted(path.suffix for path in tmp_path.iterdir())
    assert killed.returncode == -9 and len(left) == 2 and ".lock" in left
    lines: list[str] = []
    assert np.array_equal(get(ArrayCache([tmp_path], lines.append)).arrays["values"], VALUES)
    assert "is gone" in lines[0] and len(list(tmp_path.iterdir())) == 1


def test_the_second_of_two_builders_takes_the_first_one_s(tmp_path: Path) -> None:
    cache = ArrayCache([tmp_path])

    def overtaken(tick: Callable[[float], None]) -> Entry:
        cache.put("kind", KEY, make(tick))
        return Entry({"values": VALUES + 1})

    assert np.array_equal(get(cache, overtaken).arrays["values"], VALUES)
    assert len(list(tmp_path.iterdir())) == 1


class Clock:
    """A clock that sleeping moves; `beat` runs at each sleep."""

    def __init__(self, beat: Callable[[float], None] = lambda now: None) -> None:
        self.now, self.beat = 0.0, beat

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.beat(self.now)


def test_a_holder_elsewhere_is_waited_for_as_long_as_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, lines = tmp_path / "x.lock", []
    holder = {"host": "elsewhere", "pid": 1, "token": "t", "done": 0.25}

    def beat(now: float) -> None:
        if now < 1000:
            lock.write_text(json.dumps(holder | {"beats": int(now // 5)}))

    monkeypatch.setattr(build_lock, "time", clock := Clock(beat))
    beat(0)
    wait_for_lock(lock, lambda: False, "the index", lines.append)
    assert 990 + build_lock.STALE <= clock.now < 1010 + build_lock.STALE and not lock.exists()
    assert lines[0] == "waiting for the index, which process 1 on elsewhere builds: 25% done"
    assert lines[-1].startswith("the index: its builder, process 1 on elsewhere, is gone")
    assert len(lines) > 80


def test_waiting_ends_with_the_entry_or_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_lock, "time", Clock())
    wait_for_lock(tmp_path / "none.lock", lambda: False, "it", pytest.fail)
    (tmp_path / "x.lock").write_text("")
    wait_for_lock(tmp_path / "x.lock", lambda: True, "it", pytest.fail)
    assert (tmp_path / "x.lock").exists()


def test_a_lock_is_one_process_s_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with take_lock(path):
        assert take_lock(path) is None
        assert read_holder(path)["host"] == host_name() and read_holder(path)["pid"] == os.getpid()
    assert not path.exists()
    with take_lock(path):
        path.write_text(json.dumps({"token": "of one that took this process for dead"}))
    assert path.exists()


def test_entries_are_read_by_folder_too(tmp_path: Path) -> None:
    entry = get(ArrayCache([tmp_path]))
    assert read_entry(entry.folder, None).facts == {"sum": 5} and read_entry(tmp_path / "none", None) is None
