"""Folders: links followed once, and nothing that vanishes without a word."""

import os
from pathlib import Path

import pytest

from mmdata.errors import DataError
from mmdata.prepare import folders
from mmdata.prepare.collect import collect
from mmdata.prepare.pipeline import PrepareOptions, prepare
from tests.data.prepare.test_sources import read


def names(sources) -> list[str]:
    return [Path(source.path).name for source in sources]


def told(skips) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for skip in skips:
        found.setdefault(skip.reason, []).append(Path(skip.where.partition(" (")[0]).name)
    return found


@pytest.fixture
def few_folders_are_read(monkeypatch):
    """A walk that goes round in circles ends in an error."""
    real, read = os.scandir, []

    def counted(path):
        read.append(path)
        assert len(read) < 1000, "the same folders over and over"
        return real(path)

    monkeypatch.setattr(os, "scandir", counted)


@pytest.mark.usefixtures("few_folders_are_read")
def test_links_are_followed_once(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "in"
    for folder in (outside / "deep", inside / "real"):
        folder.mkdir(parents=True)
    (outside / "deep" / "o.txt").write_text("outside")
    (inside / "real" / "r.txt").write_text("real")
    (inside / "link").symlink_to(outside)
    (inside / "again").symlink_to(outside / "deep")
    (inside / "loop").symlink_to(inside)
    (outside / "up").symlink_to(inside)
    (inside / "self").symlink_to(inside / "self")
    (inside / "file.txt").symlink_to(inside / "real" / "r.txt")
    (inside / "z.txt").symlink_to(outside / "deep" / "o.txt")
    sources, skips = collect([inside])
    assert sorted(names(sources)) == ["o.txt", "r.txt"]
    assert told(skips) == {
        "another name of a file that is read": ["file.txt", "z.txt"],
        "broken link": ["self"],
        "link to a folder that is read": ["up", "loop"],
    }
    assert (sources, skips) == collect([inside])
    assert names(collect([inside, inside / "real", outside])[0]) == ["r.txt", "o.txt"]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ("a/x.txt", "b/y.txt", ".git/config.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("t.tar", "t.tar.gz", "t.zip", "n.csv", "n.TSV", "n.csv.gz", "e.TXT", "u.bin"):
        (tmp_path / name).write_text("e,f\n" if name != "e.TXT" else "upper")
    real = os.scandir

    def refusing(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(folders.os, "scandir", refusing)
    sources, skips = collect([tmp_path])
    assert names(sources) == ["x.txt", "e.TXT"]
    assert told(skips) == {
        "archive": ["t.tar", "t.tar.gz", "t.zip"],
        "table": ["n.TSV", "n.csv", "n.csv.gz"],
        "folder that cannot be read": ["b"],
        "hidden or cache": [".git"],
        "not a regular file": ["pipe.txt"],
        "other suffix": ["u.bin"],
    }
    monkeypatch.undo()
    assert read(tmp_path / "b")[0] == ["x"]
    assert names(collect([tmp_path], [".csv", ".bin"])[0]) == ["n.csv", "u.bin"]
    assert collect([tmp_path / "n.csv"])[0] == [] and names(collect([tmp_path / "n.csv"], [".csv"])[0]) == ["n.csv"]


def test_the_error_of_an_empty_corpus_names_what_was_passed_over(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.zip").write_text("x")
    with pytest.raises(DataError, match=r"no file to read in --input \(archive: 1\)"):
        prepare(PrepareOptions([tmp_path / "in"], tmp_path / "out"))
    (tmp_path / "in" / "a.jsonl").write_text('{"body": "text"}\n' * 5)
    said = []
    for tokenizer in ("bytes", "train"):
        with pytest.raises(DataError, match=r'no text in field "text": 5; .*there: body; try --text-field body'):
            prepare(PrepareOptions([tmp_path / "in"], tmp_path / "out", tokenizer, workers=1), said.append)
    assert said[0].startswith("warning: no text in the first records of") and "--text-field body" in said[0]


def test_permission_denied_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def refused(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refused)
    [skip] = read(tmp_path / "a.txt")[1]
    assert skip.reason == "unreadable" and skip.where.endswith("a.txt (Permission denied)")
