"""JSON of every layout, packings, encodings and fields: each read right, or named with its reason."""

import bz2
import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mmdata.prepare import json_values as module
from mmdata.prepare import streams
from mmdata.prepare.collect import collect, plan_shards
from mmdata.prepare.json_values import json_values
from mmdata.prepare.skips import SkipLog
from mmdata.prepare.sources import Piece, read_piece
from tests.data.prepare.test_sources import read, reasons

TEXTS = ["one", 'two "quoted" \\ {[', "日本 😀\nline", "four ]}"]
RECORDS = [{"id": i, "text": text, "more": {"list": [1, [2, {"x": "]"}]]}} for i, text in enumerate(TEXTS)]
PRETTY = [json.dumps(record, indent=2, ensure_ascii=False) for record in RECORDS]
LAYOUTS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "windows_lines": "\r\n".join(map(json.dumps, RECORDS)) + "\r\n",
    "mac_lines": "\r".join(map(json.dumps, RECORDS)),
    "array": json.dumps(RECORDS),
    "pretty_array": json.dumps(RECORDS, indent=4),
    "array_of_lines": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "concatenated": "".join(map(json.dumps, RECORDS)),
    "pretty_objects": "\n".join(PRETTY),
    "sequence": "".join(f"\x1e{json.dumps(record)}\n" for record in RECORDS),
    "two_arrays": json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:]),
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["json", "ndjson", "JSONL", "json.gz", "jsonl.zst", "json.bz2", "ndjson.xz"])
def test_every_layout_under_every_name(tmp_path, layout, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(PACKERS["." + suffix.partition(".")[2] if "." in suffix else ""](LAYOUTS[layout].encode()))
    assert read(path) == (TEXTS, []) and read(tmp_path) == (TEXTS, [])


def test_one_object_and_what_is_not_json(tmp_path):
    (tmp_path / "a.json").write_text(PRETTY[1])
    (tmp_path / "b.json").write_text(" \n")
    (tmp_path / "c.json").write_text("plain text, no JSON")
    (tmp_path / "d.json").write_text('[{"text": "x"}, {"text": }, 5, {"text": "y"}, {"text": "cut')
    (tmp_path / "e.json").write_text('{"name": "settings", "data": [1, 2]}')
    texts, skips = read(tmp_path)
    assert texts == [TEXTS[1], "x", "y"]
    assert "empty" in reasons(skips) and 'no text in field "text"' in reasons(skips)
    assert [skip.where[-7:] for skip in skips if "d.json" in skip.where] == ["value 2", "value 3", "value 5"]
    assert not any("plain" in text for text in texts)
    (tmp_path / "f.ndjson").write_text('{"text": broken}\n{"text": "whole"}\n')  # still a file of lines
    assert collect([tmp_path / "f.ndjson"])[0][0].kind == "jsonl" and read(tmp_path / "f.ndjson")[0] == ["whole"]


def test_values_however_the_text_is_cut():
    for text in LAYOUTS.values():
        data = text.encode()
        whole = [json.loads(value) for value in json_values([data])]
        assert whole == RECORDS
        for size in (1, 2, 3, 7):
            pieces = [data[i : i + size] for i in range(0, len(data), size)]
            assert [json.loads(value) for value in json_values(pieces)] == RECORDS


def test_large_arrays_are_streamed(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    with open(path, "w") as stream:
        stream.write("[" + ",\n".join(json.dumps({"text": f"{i} " + "x" * 1000}) for i in range(30_000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_piece(Piece(str(path), "json"), "text")) == 30_000
    assert tracemalloc.get_traced_memory()[1] < 8 << 20 < path.stat().st_size / 3
    tracemalloc.stop()


def test_records_have_a_limit(tmp_path, monkeypatch):
    for place in (streams, module, __import__("mmdata.prepare.sources", fromlist=["x"])):
        monkeypatch.setattr(place, "RECORD_LIMIT", 1000)
    monkeypatch.setattr(streams, "CHUNK", 500)
    lines = [json.dumps({"text": text}) for text in ("a", "b" * 5000, "c")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        texts, [skip] = read(tmp_path / name)
        assert texts == ["a", "c"] and skip.reason.startswith("record over") and skip.where.endswith("line 2")
    assert list(json_values([lines[1].encode()[:2000], b"b"])) == [None]


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-32"])
def test_marked_encodings(tmp_path, coding):
    (tmp_path / "a.txt").write_bytes("naïve 日本\r\n".encode(coding))
    (tmp_path / "b.jsonl").write_bytes(LAYOUTS["lines"].encode(coding))
    (tmp_path / "c.json").write_bytes(LAYOUTS["pretty_array"].encode(coding))
    assert read(tmp_path) == (["naïve 日本\r\n", *TEXTS, *TEXTS], [])
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "c.json").unlink()
    (tmp_path / "a.txt").write_bytes("half".encode("utf-16")[:-1])
    assert reasons(read(tmp_path)[1]) == ["not UTF-8"]


def test_packed_text_and_content_against_name(tmp_path):
    for suffix, pack in PACKERS.items():
        (tmp_path / f"a.TXT{suffix}").write_bytes(pack(b"some text"))
    (tmp_path / "b.json").write_bytes(gzip.compress(LAYOUTS["array"].encode()))  # packed without a name for it
    assert read(tmp_path) == (["some text"] * 5 + TEXTS, [])
    (tmp_path / "dump").write_text(LAYOUTS["lines"])
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "table")
    assert read(tmp_path / "dump")[0] == TEXTS == read(tmp_path / "table")[0]
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x" * 100000)[:-10])
    assert reasons(read(tmp_path / "c.txt.gz")[1]) == ["broken gz"]


def test_the_fields_seen_are_told(tmp_path):
    lines = [json.dumps({"id": "7", "body": "long text " * 99, "meta": {"title": "tt"}, "n": 1})] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"content": ["x" * 99], "n": [1]}), tmp_path / "b.parquet")
    log = SkipLog(read(tmp_path)[1])
    facts = log.facts()['no text in field "text"']
    assert facts["count"] == 4 and facts["fields"] == ["body", "content", "meta.title", "id"]
    assert "try --text-field body" in log.reasons()
    assert read(tmp_path / "a.jsonl", "meta.title")[0] == ["tt"] * 3
    (tmp_path / "c.jsonl").write_text('{"a.b": "by name", "a": {"b": "by path"}}')
    assert read(tmp_path / "c.jsonl", "a.b")[0] == ["by name"]


def test_parquet_columns_of_text(tmp_path):
    nested = pa.array([{"b": {"c": text}} for text in TEXTS] + [None, {"b": None}])
    columns = {
        "binary": pa.array([text.encode() for text in TEXTS] + [b"\xff", None], pa.binary()),
        "large": pa.array([*TEXTS, None, None], pa.large_string()),
        "large_binary": pa.array([text.encode() for text in TEXTS] + [None, None], pa.large_binary()),
        "words": pa.array([*TEXTS, None, None]).dictionary_encode(),
        "view": pa.array([*TEXTS, None, None], pa.string_view()),
        "a": nested,
    }
    table = pa.table({name: column for name, column in columns.items() if name != "view"})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    for name in ("binary", "large", "large_binary", "words", "a.b.c"):
        texts, skips = read(tmp_path / "a.parquet", name)
        assert texts == TEXTS and len(skips) == 2, name
    assert reasons(read(tmp_path / "a.parquet", "binary")[1])[0] == "not UTF-8"
    _, [skip] = read(tmp_path / "a.parquet", "a.b")  # once a file, however many row groups
    assert {name for name, _ in skip.fields} == {"binary", "large", "large_binary", "words", "a.b.c"}


def test_skips_are_counted_in_bounded_memory():
    log, other = SkipLog(), SkipLog()
    for i in range(10_000):
        (log if i % 2 else other).add(read_skip(i))
    log.merge(SkipLog.load(other.dump()))
    [entry] = log.facts().values()
    assert entry["count"] == 10_000 and entry["names"] == [f"{i:05d}" for i in range(1000)]
    assert len(log.dump()) < 50_000


def read_skip(i):
    from mmdata.prepare.skips import Skip

    return Skip("empty", f"{i:05d}")


def test_plan_keeps_what_cannot_be_cut_whole(tmp_path):
    for name in ("a.json", "b.json.gz"):
        (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(LAYOUTS["array"].encode()))
    pieces = [piece for shard in plan_shards(collect([tmp_path])[0]) for piece in shard]
    assert [(piece.kind, piece.packed, piece.start, piece.stop) for piece in pieces] == [
        ("json", "", 0, 0),
        ("json", "gz", 0, 0),
    ]
