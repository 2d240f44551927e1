"""Files to a corpus folder: every reader, what is left out and why, resume, and options that are refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus.manifest import read_manifest, sha256_file
from mmdata.errors import DataError
from mmdata.images.corpus import ImageCorpus
from mmdata.images.grid import RELEASED_GRIDS, TileRules, image_tokens
from mmdata.images.stream import ImageStream
from mmdata.images.stream_batches import image_batches
from mmdata.prepare_images.grids import parse_grids
from mmdata.prepare_images.pipeline import ImageOptions, prepare_images
from mmdata.prepare_images.shard import make_image_shard
from mmdata.prepare_images.summary import image_summary
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import load_tokenizer
from tests.data.images.made import SMALL, encoded, exif, picture, prepared, write_images, write_records

ROOT = Path(__file__).resolve().parents[3]


def run(inputs, output, **options):
    given = {"tokenizer": "train", "vocab_size": 300, "rules": SMALL, "valid_fraction": 0.0, "workers": 1} | options
    return prepare_images(ImageOptions(inputs=inputs if isinstance(inputs, list) else [inputs], output=output, **given))


def spelt(corpus: ImageCorpus) -> list[str]:
    """Documents as text, with `[width x height]` for an image and upper case for what is learned."""
    tokenizer, documents = load_tokenizer(corpus.prefix.parent), []
    learned = corpus.is_label(np.arange(corpus.num_tokens))
    places = {int(place["first"]): place for place in corpus.places}
    for i in range(corpus.num_documents):
        at, stop, text = int(corpus.doc_offsets[i]), int(corpus.doc_offsets[i] + corpus.doc_lengths[i]), ""
        while at < stop:
            if at in places:
                image = corpus.table.images[places[at]["image"]]
                text += f"[{image['width']}x{image['height']}]"
                assert not learned[at : at + places[at]["tokens"]].any()
                at += int(places[at]["tokens"])
            elif corpus.data[at] == tokenizer.eod_id:
                text, at = text + "|", at + 1
            else:
                end = at
                while end < stop and learned[end] == learned[at] and end not in places and corpus.data[end] != 0:
                    end += 1
                part = tokenizer.decode(corpus.data[at:end].tolist())
                text, at = text + (part.upper() if learned[at] else part.lower()), end
        documents.append(text)
    return documents


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_json_lines_arrays_and_packed_files(tmp_path):
    names = write_images(tmp_path, [(16, 16), (40, 16)])
    records = [{"image": name, "caption": f"number {i}"} for i, name in enumerate(names)]
    write_records(tmp_path, records, "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    manifest = run(tmp_path, tmp_path / "out").manifest
    corpus = ImageCorpus(tmp_path / "out/train")
    assert spelt(corpus) == ["[16x16]NUMBER 0|", "[40x16]NUMBER 1|"] * 3
    assert len(corpus.table) == 2 and corpus.table.num_files == 2  # of one shard: each image once
    assert manifest == read_manifest(tmp_path / "out") and manifest.skipped == {}
    assert manifest.images["count"] == 2 and manifest.images["formats"] == {"PNG": 2}
    assert manifest.images["tokens"] == corpus.places["tokens"].sum()
    for split in manifest.splits.values():
        assert split.tokens == corpus.num_tokens and split.bytes == 6 * len("number 0")
        for name, facts in split.files.items():
            assert facts == {
                "bytes": (tmp_path / "out" / name).stat().st_size,
                "sha256": sha256_file(tmp_path / "out" / name),
            }


def test_webdataset_shards(tmp_path):
    png = [encoded(picture(16 + i, 16)) for i in range(5)]
    shard = tar_of(tmp_path / "0.tar", {
        "s/a.jpg": encoded(picture(30, 20), "JPEG"), "s/a.txt": b"a caption\n",
        "s/b.png": png[0], "s/b.json": json.dumps({"question": "what", "answer": "b"}).encode(),
        "s/c.0.png": png[1], "s/c.1.png": png[2],
        "s/c.json": json.dumps({"parts": ["x", {"image": "c.1.png"}, {"image": "0.png"}]}).encode(),
        "s/d.txt": b"alone", "s/e.png": png[3], "s/e.cls": b"7",
        "s/f.json": json.dumps({"parts": [{"image": "9.png"}, "x"]}).encode(), "s/f.0.png": png[4],
    })  # fmt: skip
    result = run(shard, tmp_path / "out")
    corpus = ImageCorpus(tmp_path / "out/train")
    assert spelt(corpus) == ["[30x20]A CAPTION|", "user: [16x16]what\nassistant: B\n|", "X[18x16][17x16]|", "ALONE|"]
    assert {reason: entry["count"] for reason, entry in result.manifest.skipped.items()} == {
        "no shape of record that is known": 1, "image is not in the sample": 1,
    }  # fmt: skip
    assert corpus.table.num_files == 1
    stream = ImageStream(corpus, seq_len=64, seed=0, eod_id=0)
    batches = list(image_batches(stream, [[i] for i in range(stream.rows_per_epoch())]))
    assert sum(len(batch.images) for batch in batches) == 4 and not any(batch.failures for batch in batches)
    whole = shard.read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"s/c.1.png") + 600])
    cut = run(tmp_path / "cut.tar", tmp_path / "cut").manifest
    assert cut.skipped["broken tar"]["count"] == 1 and cut.splits["train"].documents == 2


def test_sizes_are_those_after_exifs_turn(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(60, 16), "JPEG", exif=exif(6)))
    corpus = prepared(write_records(tmp_path, [{"image": "a.jpg", "caption": "a"}]), tmp_path / "out")
    assert corpus.table.images[["width", "height", "turn"]].tolist() == [(16, 60, 6)]
    assert corpus.places["tokens"].tolist() == [image_tokens(16, 60, SMALL)]
    assert corpus.places["tokens"][0] != image_tokens(60, 16, SMALL)
    assert read_manifest(tmp_path / "out").images["turned"] == 1


def test_what_cannot_be_used_is_left_out_by_name(tmp_path):
    png = encoded(picture(40, 40))
    (tmp_path / "ok.png").write_bytes(png)
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "big.bmp").write_bytes(
        encoded(picture(2, 2), "BMP").replace(b"\2\0\0\0\2\0\0\0", b"\0\0\1\0\0\0\1\0", 1)
    )
    named = ["ok.png", "gone.png", "text.png", "big.bmp", "cut.png"]
    records = [{"image": name, "caption": "x"} for name in named]
    records += [{"text": "<image>"}, {"text": "x", "images": ["ok.png"]}, {"parts": [{"text": "x", "learn": False}]}]
    path = write_records(tmp_path, records)
    path.write_text(path.read_text() + "{broken\n[1]\n")
    skipped = run(path, tmp_path / "out").manifest.skipped
    right = {"image: missing": 1, "image: not an image": 1, "image: too many pixels": 1, "bad JSON line": 1,
             "placeholder without an image": 1, "image without a placeholder": 1, "nothing to learn": 1,
             "record is not an object": 1}  # fmt: skip
    assert {reason: entry["count"] for reason, entry in skipped.items()} == right
    assert skipped["image: missing"]["names"] == [f"{path} line 2 gone.png"]
    checked = run(path, tmp_path / "checked", check_pixels=True).manifest
    assert checked.skipped["image: truncated"]["names"] == [f"{path} line 5 cut.png"]
    assert checked.splits["train"].documents == 1
    with pytest.raises(DataError, match=r"--strict: .*image: missing 1 \(.*line 2 gone\.png\)"):
        run(path, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_special_tokens_come_from_templates_only(tmp_path):
    records = write_records(tmp_path, [{"question": "<image> <end_of_document> hi", "answer": "<image>"}])
    template = Template("<end_of_document>{}.", "{}", placeholder="@")
    corpus = prepared(records, tmp_path / "out", template=template)
    assert (corpus.data == corpus.image_id).sum() == 0 and len(corpus.places) == 0
    assert (corpus.data == 0).sum() == 2 and corpus.data[0] == corpus.data[-1] == 0
    assert load_tokenizer(tmp_path / "out").decode(corpus.data[1:-1].tolist()) == "<image> <end_of_document> hi.<image>"


def test_documents_of_one_image_are_held_out_together(tmp_path):
    names = write_images(tmp_path, [(16, 16 + i) for i in range(40)])
    (tmp_path / "twin.png").write_bytes((tmp_path / "0.png").read_bytes())
    records = [{"image": n, "question": f"q{k}", "answer": str(k)} for n in [*names, "twin.png"] for k in range(3)]
    run(write_records(tmp_path, records), tmp_path / "out", valid_fraction=0.3)
    sides = [ImageCorpus(tmp_path / "out" / side) for side in ("train", "valid")]
    files = [[side.table.images[place["image"]]["file"] for place in side.places] for side in sides]
    shown = [{side.table.file(int(f)).read_bytes() for f in own} for side, own in zip(sides, files, strict=True)]
    assert len(shown[0]) + len(shown[1]) == 40 and not shown[0] & shown[1]
    assert 0.2 < sides[1].num_tokens / (sides[0].num_tokens + sides[1].num_tokens) <= 0.3


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    names = write_images(tmp_path, [(16, 16 + i) for i in range(6)])
    for i in range(3):
        pair = [(tmp_path / name).read_bytes() for name in names[2 * i : 2 * i + 2]]
        members = {"0.png": pair[0], "0.txt": b"text", "1.png": pair[1], "1.txt": b"text"}
        tar_of(tmp_path / f"{i}.tar", members)
    shards = [tmp_path / f"{i}.tar" for i in range(3)]
    right = run(shards, tmp_path / "right/out", valid_fraction=0.4).manifest
    made = []

    def failing(task):
        if task.number == 2 and len(made) < 3:
            made.append(-1)
            raise KeyboardInterrupt
        made.append(task.number)
        return make_image_shard(task)

    monkeypatch.setattr("mmdata.prepare_images.pipeline.make_image_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path / "left/out", valid_fraction=0.4)
    assert not (tmp_path / "left/out/manifest.json").exists()
    again = run(shards, tmp_path / "left/out", valid_fraction=0.4)
    assert made == [0, 1, -1, 2] and again.manifest == right and not again.reused
    for name in os.listdir(tmp_path / "right/out"):
        if name != "image_paths.bin":
            assert (tmp_path / "right/out" / name).read_bytes() == (tmp_path / "left/out" / name).read_bytes(), name
    assert run(shards, tmp_path / "left/out", valid_fraction=0.4).reused
    with pytest.raises(DataError, match="made from other inputs or options"):
        run(shards, tmp_path / "left/out", rules=TileRules(tile=16, patch=4))


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    shards = [
        tar_of(tmp_path / f"{i}.tar", {"a.png": encoded(picture(16, 16 + i)), "a.txt": b"text"}) for i in range(3)
    ]
    one, two = (run(shards, tmp_path / f"out{n}", workers=n).manifest for n in (1, 2))
    assert one == two


def test_refusals(tmp_path):
    records = write_records(tmp_path, [{"text": "hello"}])
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    for inputs, options, words in [
        (records, {"tokenizer": "bytes"}, r"--tokenizer bytes has no token for images"),
        (records, {"image_token": "7"}, r"--image-token 7: .*by name"),
        (records, {"images": tmp_path / "none"}, r"--images .*none is not a folder"),
        (records, {"workers": 0}, r"--workers is 0"),
        (records, {"valid_fraction": 1.0}, r"--valid-fraction is 1\.0"),
        (other, {}, r"notes\.txt is no file of records"),
        (tmp_path / "none", {}, r"none does not exist"),
        (write_records(tmp_path / "empty", [{"id": 1}]), {}, r"corpus is empty: .*no shape of record"),
    ]:
        with pytest.raises(DataError, match=words):
            run(inputs, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    run(records, tmp_path / "made")
    for token, words in [("<picture>", "is not there; give a special token, by name or id: <image> \\(1\\)"),
                         ("40", "is a token that text can give"), ("0", "give a special token")]:  # fmt: skip
        with pytest.raises(DataError, match=f"--image-token {token}: .*{words}"):
            run(records, tmp_path / "out", tokenizer=str(tmp_path / "made"), image_token=token)
    for token in ("1", "<image>"):
        result = run(records, tmp_path / f"by{token}", tokenizer=str(tmp_path / "made"), image_token=token)
        assert result.manifest.images["token"] == 1


def test_grids():
    assert parse_grids("released") == RELEASED_GRIDS and parse_grids("fixed") == ()
    assert parse_grids("1x1, 2x3") == ((1, 1), (2, 3))
    for wrong in ("", "1", "0x1", "1x1,", "336x336", "1x1,2x1, 1x1"):
        with pytest.raises(DataError, match="--grids is"):
            parse_grids(wrong)


def test_the_command(tmp_path, capsys, monkeypatch):
    names = write_images(tmp_path, [(16, 16), (40, 16)])
    records = write_records(tmp_path, [{"image": n, "question": "q", "answer": "a"} for n in names])
    arguments = ["--input", str(records), "--output", str(tmp_path / "out"), "--tokenizer", "train", "--vocab-size",
                 "300", "--tile", "16", "--patch", "8", "--grids", "fixed", "--user", r"Q: {}\n", "--workers", "1",
                 "--valid-fraction", "0"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["prepare_images.py"])
    main = runpy.run_path(str(ROOT / "launch/prepare_images.py"))["main"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert told.strip() == image_summary(read_manifest(tmp_path / "out"), str(tmp_path / "out"))
    assert "train 2 documents" in told and "2 images (PNG 2" in told and "skipped nothing" in told
    corpus = ImageCorpus(tmp_path / "out/train")
    assert corpus.rules == TileRules(16, 8, ()) and spelt(corpus)[0] == "q: [16x16]q\nassistant: A\n|"
    assert main(arguments) == 0 and "already done" in capsys.readouterr().err
    assert main([*arguments, "--grids", "1"]) == 2 and "error: --grids is 1" in capsys.readouterr().err


def test_captions_are_cut_and_other_texts_are_not(tmp_path):
    (name,) = write_images(tmp_path / "images", [(20, 20)])
    long = " ".join("word" for _ in range(30))
    records = [{"image": f"images/{name}", "caption": long}, {"image": f"images/{name}", "caption": "word"},
               {"image": f"images/{name}", "question": "?", "answer": long}]  # fmt: skip
    path = write_records(tmp_path, records)
    whole = prepared(path, tmp_path / "whole")
    tokenizer = str(tmp_path / "whole" / "tokenizer.json")
    cut = prepared(path, tmp_path / "cut", tokenizer=tokenizer, caption_tokens=6)
    image = int(whole.places["tokens"][0])
    assert cut.doc_lengths.tolist() == [image + 6 + 1, *whole.doc_lengths[1:].tolist()]
    first = cut.data[: image + 7]
    assert first[image : image + 6].tolist() == whole.data[image : image + 6].tolist()
    assert first[-1] == whole.data[whole.doc_lengths[0] - 1] and cut.is_label(np.array([image, image + 6])).all()
    with pytest.raises(DataError, match="--caption-tokens is 0: it must be at least 1"):
        prepared(path, tmp_path / "none", caption_tokens=0)
