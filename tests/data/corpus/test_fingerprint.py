"""Fingerprints of corpora: equal for a copy elsewhere, and a few words on what changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus import fingerprint
from mmdata.corpus.fingerprint import difference, digest_of, file_facts
from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.manifest import read_manifest
from mmdata.prepare.pipeline import PrepareOptions, prepare

DOCUMENTS = [[[1, 2, 3]], [[4, 5], [6]], [[7]]]


def of(prefix: Path) -> dict:
    return json.loads(json.dumps(IndexedCorpus(prefix).fingerprint()))  # as it is recorded


def test_a_moved_corpus_is_the_same(tmp_path: Path, megatron_corpus: Callable[..., Path]) -> None:
    here = megatron_corpus(DOCUMENTS)
    (tmp_path / "there").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{here}{suffix}", tmp_path / f"there/other.v2{suffix}")
    there = of(tmp_path / "there/other.v2")
    assert difference(of(here), there) is None and digest_of(of(here)) == digest_of(there)
    assert there["documents"] == 3 and there["tokens"] == 7


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([*DOCUMENTS, [[8, 9]]], "documents 3 -> 4, tokens 7 -> 9, bin bytes 14 -> 18"),
        ([[[1, 2, 3]], [[4], [5, 6]], [[7]]], "idx hash of samples "),  # the same tokens, cut elsewhere
        ([[[1, 2, 3]], [[4, 5], [6]], [[8]]], "bin hash of samples "),
    ],
)
def test_what_changed_is_said(
    megatron_corpus: Callable[..., Path], documents: list[list[list[int]]], says: str
) -> None:
    before, now = of(megatron_corpus(DOCUMENTS)), of(megatron_corpus(documents))
    assert difference(before, now).startswith(says) and digest_of(before) != digest_of(now)


def test_large_files_are_sampled_at_both_ends_and_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "_BLOCK_BYTES", 10)
    content = np.arange(64_000, dtype=np.uint8)
    content.tofile(path := tmp_path / "x.bin")
    before = file_facts(path)
    for place, seen in ((0, True), (63_999, True), (1015, True), (1012, False)):  # blocks start every 1015.7 bytes
        changed = content.copy()
        changed[place] ^= 1
        changed.tofile(path)
        assert (file_facts(path) != before) == seen, place
    content[:1000].tofile(path)
    before = file_facts(path)
    content[1:1001].tofile(path)
    assert file_facts(path) != before


def test_a_manifest_s_hashes_count_as_long_as_it_is_of_these_files(tmp_path: Path, text_folder: Path) -> None:
    prepare(PrepareOptions(inputs=[text_folder], output=tmp_path / "out", tokenizer="bytes", workers=1))
    prefix = tmp_path / "out/train"
    before = of(prefix)
    recorded = read_manifest(tmp_path / "out").splits["train"].files["train.bin"]["sha256"]
    assert before["files"]["bin"]["sha256"] == recorded
    manifest = tmp_path / "out/manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(recorded, "0" * 64))
    assert difference(before, of(prefix)) == f"bin sha256 {recorded[:12]} -> {'0' * 12}"
    manifest.unlink()
    assert "sha256" not in of(prefix)["files"]["bin"] and difference(before, of(prefix)) is None
    manifest.write_text(text)
    with open(f"{prefix}.bin", "ab") as stream:
        stream.write(b"\0\0")
    size = Path(f"{prefix}.bin").stat().st_size
    assert file_facts(Path(f"{prefix}.bin"))["bytes"] == size != before["files"]["bin"]["bytes"]


def test_a_part_that_comes_or_goes_is_a_change() -> None:
    assert difference(None, None) is None
    assert difference({"documents": 1}, None) == "it is gone"
    assert difference(None, {"documents": 1}) == "it was not there before"
