import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mmdata.errors import DataError
from mmdata.prepare.collect import MIN_SHARD, Source, collect, plan_shards
from mmdata.prepare.skips import Skip
from mmdata.prepare.sources import Document, Piece, read_piece

TEXTS = ["one", "two\nlines", "日本 😀", "four"]
LINES = b"".join(json.dumps({"text": text, "n": 1}).encode() + b"\n" for text in TEXTS)


def read(path: Path, field: str = "text") -> tuple[list[str], list[Skip]]:
    """All of a file, through the same planning as `prepare`."""
    sources, skips = collect([path])
    items = [item for shard in plan_shards(sources) for piece in shard for item in read_piece(piece, field)]
    for item in items:
        assert isinstance(item, Skip) or item.data == item.text.encode()
    return [i.text for i in items if isinstance(i, Document)], skips + [i for i in items if isinstance(i, Skip)]


def reasons(skips: list[Skip]) -> list[str]:
    return [skip.reason for skip in skips]


def test_every_format(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[2])
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(LINES[:30]) + zstandard.compress(LINES[30:]))
    pq.write_table(pa.table({"n": range(4), "text": TEXTS}), tmp_path / "e.parquet", row_group_size=2)
    (tmp_path / "f.md").write_bytes(b"\xef\xbb\xbf# title\r\n")
    (tmp_path / "g.py").write_text("x = 1\n")
    texts, skips = read(tmp_path)
    assert texts == [TEXTS[2], *TEXTS * 4, "# title\r\n", "x = 1\n"] and not skips


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert read(tmp_path / "a.jsonl", "body")[0] == ["x"]
    assert reasons(read(tmp_path / "a.jsonl")[1]) == ['no text in field "text"']


def test_broken_files_are_named_and_the_rest_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b" \n\t ")
    bad = (
        b'{"text": "ok"}\n{"text": \n\n["text"]\n{"text": 5}\n{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": ""}\nend'
    )
    (tmp_path / "d.jsonl").write_bytes(bad)
    texts, skips = read(tmp_path)
    assert texts == ["ok"]
    field = 'no text in field "text"'
    assert reasons(skips) == [
        "not UTF-8", "empty", "empty", "bad JSON line", field, field, "not UTF-8", "not UTF-8", "empty", "bad JSON line"
    ]  # fmt: skip
    assert skips[3].where == f"{tmp_path / 'd.jsonl'} line 2" and skips[5].where.endswith("d.jsonl line 5")


@pytest.mark.parametrize("packer", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_broken_streams(tmp_path, packer):
    suffix = "gz" if packer is gzip.compress else "zst"
    lines = b"".join(json.dumps({"text": f"{i * 7919 % 1000003}" * 5}).encode() + b"\n" for i in range(100_000))
    packed = packer(lines)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed[: len(packed) // 2])
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(b"not packed at all")
    (tmp_path / f"c.jsonl.{suffix}").write_bytes(packer(b""))
    texts, skips = read(tmp_path)
    assert 1000 < len(texts) < 100_000 and texts[0] == "0" * 5
    assert reasons(skips) == [f"broken {suffix}", f"broken {suffix}", "empty"]
    assert str(len(texts)) in skips[0].where


def test_broken_parquet(tmp_path):
    pq.write_table(pa.table({"other": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense PAR1")
    pq.write_table(pa.table({"text": ["x", None, ""]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"")
    texts, skips = read(tmp_path)
    field = 'no text in field "text"'
    assert texts == ["x"]
    assert reasons(skips) == [field, "broken parquet", field, "empty", "broken parquet"]


def test_unreadable_and_foreign_files(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x00")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.txt").write_text("x")
    assert read(tmp_path) == (
        [],
        [
            Skip("broken link", f"{tmp_path}/gone.txt (No such file or directory)"),
            Skip("hidden or cache", f"{tmp_path}/.hidden.txt"),
            Skip("hidden or cache", f"{tmp_path}/__pycache__"),
            Skip("other suffix", f"{tmp_path}/a.bin"),
        ],
    )
    [gone] = read_piece(Piece(str(tmp_path / "nowhere"), "text"), "text")
    assert gone.reason == "unreadable"
    with pytest.raises(DataError, match="does not exist"):
        collect([tmp_path / "nowhere"])


def test_suffixes_and_order(tmp_path):
    for name in ("b.py", "a.cfg", "c.txt", "sub/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    sources, skips = collect([tmp_path / "sub", tmp_path], [".py", ".cfg"])
    assert [Path(source.path).name for source in sources] == ["a.cfg", "b.py", "a.py"]
    assert reasons(skips) == ["other suffix"]
    sources, _ = collect([tmp_path / "a.cfg"])
    assert sources[0].kind == "text"


def test_cut_jsonl_gives_every_line_once(tmp_path):
    lines = [json.dumps({"text": f"{i}:" + "x" * (i % 300)}) for i in range(20_000)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    shards = plan_shards(collect([path])[0])
    assert len(shards) > 3 and sum(map(len, shards)) > 6
    texts = [item.text for shard in shards for piece in shard for item in read_piece(piece, "text")]
    assert [int(text.split(":")[0]) for text in texts] == list(range(20_000))
    for cut in range(200, 320):  # every way to meet a line's end
        halves = [Piece(str(path), "jsonl", 0, cut), Piece(str(path), "jsonl", cut, 1000)]
        both = [item for half in halves for item in read_piece(half, "text")]
        assert both == list(read_piece(Piece(str(path), "jsonl", 0, 1000), "text"))


def test_cut_parquet_gives_every_row_once(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i}" + "é" * 99 for i in range(999)]}), path, row_group_size=100)
    size = MIN_SHARD  # pretend that it is large
    shards = plan_shards([Source(str(path), "parquet", size, 0)])
    pieces = [piece for shard in shards for piece in shard]
    assert len(pieces) > 2
    texts = [item.text for piece in pieces for item in read_piece(piece, "text")]
    assert [int(text.rstrip("é")) for text in texts] == list(range(999))
