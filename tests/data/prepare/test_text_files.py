"""Large text files: separators, fragments that make the same documents, and bounded memory."""

import itertools
import random
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mmdata import text_parts
from mmdata.errors import DataError
from mmdata.hashing import content_hash
from mmdata.prepare import collect as collecting
from mmdata.prepare import text_files
from mmdata.prepare.bpe import Sample, train_bpe
from mmdata.prepare.collect import collect, plan_shards
from mmdata.prepare.encoder import Encoder
from mmdata.prepare.progress import Meter, progress_line
from mmdata.prepare.shards import ShardTask, make_shard, open_shard
from mmdata.prepare.skips import Skip
from mmdata.prepare.sources import Document, Piece, read_piece
from mmdata.prepare.text_files import Separator, fragments, parse_separator, section
from mmdata.tokenizer import load_tokenizer
from tests.data.prepare.test_prepare import environment, run, texts_in


def documents(pieces, separator: Separator | None) -> list[bytes]:
    made, held = [], b""
    for data, more in fragments(pieces, separator):
        held += data
        if not more:
            made.append(held)
            held = b""
    return made


def pieces_of(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


@pytest.mark.parametrize(
    ("typed", "text", "want"),
    [
        ("<|endoftext|>", "one\n<|endoftext|>\ntwo<|endoftext|>", ["one", "two", ""]),
        (r"\n\n", "one\nmore\n\n\n\ntwo\n\nthree\n", ["one\nmore", "", "two", "three"]),
        (r"\n\n", "one\r\n\r\ntwo\r\n", ["one", "two"]),
        (r"\x1e", "a\x1eb", ["a", "b"]),
        (r"\u241e\t", "a\u241e\tb", ["a", "b"]),
        (r"\\n", "a\\nb", ["a", "b"]),
        (".*", "a.*b", ["a", "b"]),
    ],
)
def test_separators(typed, text, want):
    assert documents([text.encode()], parse_separator(typed)) == [part.encode() for part in want]


def test_an_empty_separator_is_refused(tmp_path):
    with pytest.raises(DataError, match="--separator is empty"):
        run(tmp_path, tmp_path / "out", separator="")


def test_fragments_make_the_same_documents(monkeypatch):
    generator = random.Random(0)
    separator = parse_separator(r"\n==\n")
    for trial in range(300):
        data = "".join(generator.choices(["ab", "日本", "😀", "\n", "\r\n", "=", "\n==\n", " "], k=40)).encode()
        monkeypatch.setattr(text_files, "FRAGMENT", 1 << 30)
        whole, single = documents([data], separator), documents([data], None)
        assert single == [data]
        monkeypatch.setattr(text_files, "FRAGMENT", 5 + trial % 20)
        for size in (1, 4, 9):
            assert documents(pieces_of(data, size), separator) == whole
            assert documents(pieces_of(data, size), None) == single
            for part, _ in fragments(pieces_of(data, size), separator if trial % 2 else None):
                part.decode()  # never cut inside a character


def test_sections_share_the_documents(tmp_path):
    generator = random.Random(1)
    separator = parse_separator("<sep>")
    for trial in range(60):
        data = "<sep>".join(f"{i}" + "é" * generator.randint(0, 9) for i in range(12)).encode()
        path = tmp_path / "a.txt"
        path.write_bytes(b"\xef\xbb\xbf" * (trial % 2) + data)
        size = path.stat().st_size
        cuts = sorted({0, size, *(generator.randrange(size) for _ in range(4))})
        made = []
        for a, b in itertools.pairwise(cuts):
            made += [d for d in documents(section(str(path), a, b, separator), separator) if d]
        assert made == data.split(b"<sep>")


def test_one_file_for_many_shards_and_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "MIN_SHARD", 1000)
    texts = [f"document {i} " + "word " * (i % 50) for i in range(300)]
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(texts))
    pieces = [piece for shard in plan_shards(collect([path])[0], separated=True) for piece in shard]
    assert len(pieces) > 20 and len([p for s in plan_shards(collect([path])[0]) for p in s]) == 1
    items = [item for piece in pieces for item in read_piece(piece, "text", parse_separator("<|endoftext|>"))]
    assert [item.text for item in items] == texts
    manifest = run(path, tmp_path / "out", separator="<|endoftext|>", valid_fraction=0.1).manifest
    both = texts_in(tmp_path / "out", "train") + texts_in(tmp_path / "out", "valid")
    assert sorted(both) == sorted(texts) and manifest.inputs["separator"] == "<|endoftext|>"
    with pytest.raises(DataError, match="other inputs or options"):
        run(path, tmp_path / "out", valid_fraction=0.1)


def test_blank_and_bad_documents_between_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one|\n\n|caf\xe9|two|")
    items = list(read_piece(Piece(str(path), "text"), "text", parse_separator("|")))
    assert [item.text for item in items if isinstance(item, Document)] == ["one", "two"]
    assert [item for item in items if isinstance(item, Skip)] == [Skip("not UTF-8", f"{path} document 3")]
    path.write_bytes(b"\n|\n|")
    assert list(read_piece(Piece(str(path), "text"), "text", parse_separator("|"))) == [Skip("empty", str(path))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.py").write_text(Path(subprocess.__file__).read_text())
    train_bpe(Sample(plan_shards(collect([folder])[0]), "text"), 400, folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_long_documents_give_the_tokens_of_short_ones(tmp_path, monkeypatch, trained, kind):
    """Whole files against the same files in fragments and parts of a few bytes."""
    tokenizer = "bytes" if kind == "bytes" else str(trained)
    source = Path(subprocess.__file__).read_text()
    texts = {"a": source[:5000], "b": "short", "c": source[5000:9000].replace("\n", " "), "e": " \n" * 400, "f": "end"}
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "d.txt").write_bytes(source[:2000].encode() + b"\xff" + source[:2000].encode())

    def shard(name: str):
        pieces = [piece for shard in plan_shards(collect([folder])[0]) for piece in shard]
        (tmp_path / name).mkdir()
        task = ShardTask(0, tuple(pieces), str(tmp_path / name), tokenizer, "", "text", "uint16")
        make_shard(task)
        return open_shard(task)

    whole = shard("whole")
    for module, name, value in ((text_files, "FRAGMENT", 300), (text_files, "CHUNK", 100), (text_parts, "PART", 70)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("mmdata.prepare.streams.CHUNK", 128)
    monkeypatch.setattr("mmdata.tokenizer.PART", 70)
    parts = shard("parts")
    assert np.array_equal(parts.tokens, whole.tokens) and np.array_equal(parts.facts, whole.facts)
    assert parts.skips.facts() == whole.skips.facts() and set(whole.skips.facts()) == {"not UTF-8", "empty"}
    assert whole.facts[:, 1].tolist() == [content_hash(texts[name].encode()) for name in "abcf"]
    sizes = [len(document.data) for document in read_piece(Piece(str(folder / "a.txt"), "text"), "text")]
    assert len(sizes) > 5  # it did come in fragments


def test_parts_are_bounded_without_an_exact_cut(monkeypatch):
    monkeypatch.setattr(text_parts, "PART", 50)
    monkeypatch.setattr(text_parts, "LARGEST_PART", 100)
    text = "0123456789 " * 40 + "x" * 500
    made = list(text_parts.parts(text, lambda text, start: -1))
    assert "".join(made) == text and max(map(len, made)) == 100
    assert all(part.startswith(" ") for part in made[1:4])
    assert list(text_parts.parts("", lambda text, start: -1)) == []


def test_sample_of_long_documents_is_that_of_whole_ones(tmp_path, monkeypatch):
    source = Path(subprocess.__file__).read_text()
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(source[i * 3000 :][:20_000])
    shards = plan_shards(collect([tmp_path])[0])
    for limit in (1 << 30, 10_000):
        whole = Sample(shards, "text", limit=limit)
        texts = list(whole)
        with monkeypatch.context() as patch:
            patch.setattr(text_files, "FRAGMENT", 500)
            patch.setattr("mmdata.prepare.streams.CHUNK", 200)
            patch.setattr(text_parts, "PART", 300)
            parted = Sample(shards, "text", limit=limit)
            parts = list(parted)
        assert "".join(parts) == "".join(texts) and len(parts) > len(texts)
        assert (parted.documents, parted.bytes) == (whole.documents, whole.bytes)
        assert limit * 0.9 < whole.bytes < limit * 1.1 or (whole.bytes < limit and whole.documents == 3)


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one line of text without an end " * (1 << 20))
    tracemalloc.start()
    assert sum(len(item.data) for item in read_piece(Piece(str(path), "text"), "text")) == 32 << 20
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.slow
def test_a_worker_is_bounded(tmp_path, trained):
    """A line of 24 MB took forty times its size in one go."""
    path = tmp_path / "a.txt"
    path.write_text("the line goes on without an end, " * (24 << 20 >> 5))
    task = f"ShardTask(0, (Piece({str(path)!r}, 'text'),), {str(tmp_path)!r}, {str(trained)!r}, '', 'text', 'uint16')"
    code = (
        "import resource\nfrom mmdata.prepare.shards import ShardTask, make_shard\n"
        "from mmdata.prepare.sources import Piece\nfrom mmdata.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(trained)!r}).encode('x')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"make_shard({task})\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300 << 10  # kB
    assert resource.RUSAGE_SELF == 0


def test_progress_counts_bytes_inside_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "FRAGMENT", 1000)
    monkeypatch.setattr("mmdata.prepare.streams.CHUNK", 1000)
    (tmp_path / "a.txt").write_text("x" * 10_000)
    pieces = (Piece(str(tmp_path / "a.txt"), "text", weight=10_000),)
    tasks = [ShardTask(i, pieces, str(tmp_path), "bytes", "", "text", "uint16") for i in range(2)]
    make_shard(tasks[0])
    meter = Meter(tasks, tasks[1:])
    seen, add = [], Encoder.add

    def watched(encoder, item):
        add(encoder, item)
        seen.append(meter.read())

    monkeypatch.setattr(Encoder, "add", watched)
    make_shard(tasks[1])
    assert meter.before == 10_000 and len(seen) > 5 and seen == sorted(seen) and 11_000 < seen[2] < 15_000
    assert meter.read() == meter.total == 20_000
    assert progress_line(0, 50_000_000, 200_000_000, 10) == "tokenizing: 50.0 MB of 200.0 MB, 5.0 MB/s, about 30 s left"


def test_encoding_goes_on_behind_a_dropped_document(tmp_path):
    with open(tmp_path / "x.bin", "w+b") as stream:
        encoder = Encoder(load_tokenizer("bytes"), np.dtype(np.uint16), stream)
        for item in (
            Document("a", b"a"), Document("b" * 9, b"b" * 9, True), Skip("not UTF-8", "here"), Document("c", b"c"),
            Document("d", b"d", True), Document("e", b"e"),
        ):  # fmt: skip
            encoder.add(item)
        facts = encoder.finish()
    tokens = np.fromfile(tmp_path / "x.bin", np.uint16)
    assert tokens.tolist() == [97, 256, 99, 256, 100, 101, 256] and facts[:, 0].tolist() == [2, 2, 3]
    assert facts[2, 1] == content_hash(b"de")
