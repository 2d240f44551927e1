"""Identity of tokenizers: one for all spellings of a file, another for every change of what a text becomes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdata.corpus.manifest import read_manifest
from mmdata.corpus.open import tokenizer_identity, tokenizer_path
from mmdata.errors import DataError
from mmdata.prepare.pipeline import PrepareOptions, prepare
from mmdata.save_tokenizer import save_tokenizer
from mmdata.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer
from mmdata.tokenizer_identity import TokenizerIdentity, identity_of_file, identity_of_path


@pytest.fixture
def corpus(tmp_path: Path, text_folder: Path) -> Path:
    """A prepared corpus with a trained tokenizer of 300 tokens."""
    out = tmp_path / "out.v1"
    prepare(PrepareOptions(inputs=[text_folder], output=out, tokenizer="train", vocab_size=300, workers=1))
    return out


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    spec = json.loads(path.read_text())
    change(spec)
    target = path.parent.parent / "changed.json"
    target.write_text(json.dumps(spec))
    return target


def reordered(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"] = dict(reversed(spec["model"]["vocab"].items()))
    spec["model"] = dict(reversed(spec["model"].items()))


def merges_as_text(spec: dict[str, Any]) -> None:
    spec["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]


def merges_as_pairs(spec: dict[str, Any]) -> None:
    spec["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: None,
        reordered,
        merges_as_text,
        merges_as_pairs,
        lambda spec: spec["model"].pop("dropout", None),
        lambda spec: spec.update(truncation={"max_length": 5}, post_processor=None, version="1.1"),
        lambda spec: spec["pre_tokenizer"].update(trim_offsets=False),
    ],
)
def test_a_file_spelt_otherwise_is_the_same_tokenizer(corpus: Path, change: Callable[[dict], Any]) -> None:
    file = corpus / "tokenizer.json"
    other = identity_of_file(changed(file, change))
    assert other.same_as(identity_of_file(file)) and other.sha256 != identity_of_file(file).sha256


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["model"]["merges"].reverse(),
        lambda spec: spec["model"]["merges"].pop(),
        lambda spec: spec["model"]["vocab"].update({"!": 2, '"': 1}),
        lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
        lambda spec: spec.update(normalizer={"type": "NFC"}),
        lambda spec: spec["model"].update(unk_token="!"),
        lambda spec: spec["added_tokens"][0].update(content="<other>"),
    ],
)
def test_what_changes_the_ids_is_another_tokenizer(corpus: Path, change: Callable[[dict], Any]) -> None:
    file = corpus / "tokenizer.json"
    assert not identity_of_file(changed(file, change)).same_as(identity_of_file(file))


def test_an_id_of_zero_is_not_the_absence_of_one(tmp_path: Path) -> None:
    for name, model in (("a", {"unk_id": 0}), ("b", {})):
        (tmp_path / name).write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["a", -1.0]], **model}}))
    assert not identity_of_file(tmp_path / "a").same_as(identity_of_file(tmp_path / "b"))


def test_hashes_are_compared_as_far_as_both_are_known() -> None:
    byte, file = TokenizerIdentity("bytes"), TokenizerIdentity("json", "s", "c")
    assert byte.same_as(TokenizerIdentity("bytes", vocab_size=257)) and not byte.same_as(file)
    assert file.same_as(TokenizerIdentity("json", "other", "c")) and file.same_as(TokenizerIdentity("json", "s"))
    assert not file.same_as(TokenizerIdentity("json", "other")) and not file.same_as(TokenizerIdentity("json"))
    assert not TokenizerIdentity("json").same_as(TokenizerIdentity("json"))
    assert TokenizerIdentity(**json.loads(json.dumps(file.as_dict()))) == file


def test_a_corpus_is_known_by_its_manifest_and_file(corpus: Path) -> None:
    file, manifest = corpus / "tokenizer.json", corpus / "manifest.json"
    own = identity_of_file(file)
    assert read_manifest(corpus).tokenizer["content"] == own.content
    for source in (str(corpus), str(corpus / "train"), f"{corpus}/train.bin"):
        assert tokenizer_identity(source) == own
    file.write_text(changed(file, merges_as_text).read_text())  # spelt otherwise: still its own
    assert tokenizer_identity(str(corpus)).same_as(own)
    saved = file.read_text()
    file.unlink()
    assert tokenizer_identity(str(corpus)).same_as(own)  # by the manifest alone
    file.write_text(changed_text(saved, lambda spec: spec["model"]["merges"].pop()))
    with pytest.raises(DataError, match=r"records a tokenizer.json .* made with another tokenizer; put its own back"):
        tokenizer_identity(str(corpus))
    with open(corpus / "train.bin", "ab") as stream:
        stream.write(b"\0\0")  # the manifest is of other files: it says nothing, and the file beside them counts
    assert not tokenizer_identity(str(corpus)).same_as(own)
    file.unlink()
    assert tokenizer_identity(str(corpus)) is None
    manifest.unlink()
    assert tokenizer_identity(str(corpus)) is None and tokenizer_identity(str(corpus / "nowhere")) is None


def changed_text(text: str, change: Callable[[dict[str, Any]], Any]) -> str:
    spec = json.loads(text)
    change(spec)
    return json.dumps(spec)


def test_a_manifest_of_an_older_version_knows_the_file_by_its_hash(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    del manifest["tokenizer"]["content"]
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    assert tokenizer_identity(str(corpus)) == identity_of_file(corpus / "tokenizer.json")
    (corpus / "tokenizer.json").write_text(changed(corpus / "tokenizer.json", reordered).read_text())
    with pytest.raises(DataError, match="another tokenizer"):  # nothing left to know it by
        tokenizer_identity(str(corpus))


def test_bytes_are_known_beside_a_pair_too(tmp_path: Path, text_folder: Path) -> None:
    out = tmp_path / "out"
    prepare(PrepareOptions(inputs=[text_folder], output=out, tokenizer="bytes", workers=1))
    for source in (out, out / "train", out / "valid.idx"):
        assert tokenizer_identity(str(source)).same_as(identity_of_path("bytes"))
        assert isinstance(load_tokenizer(tokenizer_path(str(source))), ByteTokenizer)


def test_a_corpus_with_a_dot_in_its_name_is_found(tmp_path: Path, megatron_corpus: Callable[..., Path]) -> None:
    pair = megatron_corpus([[[1, 2]]], np.uint16, "prefix.v1")
    for source in (str(pair), f"{pair}.bin", f"{pair}.idx"):
        with pytest.raises(DataError, match=r"has no tokenizer.json beside it"):
            tokenizer_path(source)
    with pytest.raises(DataError, match="there is no such corpus"):
        tokenizer_path(str(tmp_path / "megatron.v2"))
    pair.with_name("megatron.idx").write_bytes(b"")
    with pytest.raises(DataError, match="there is no such corpus"):
        tokenizer_path(str(tmp_path / "megatron.v2"))  # though `megatron` is there


def test_a_saved_tokenizer_reads_back(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    made = load_tokenizer(corpus)
    shutil.rmtree(corpus)
    for tokenizer in (made, ByteTokenizer(), made):
        path = save_tokenizer(tokenizer, run)
        again = load_tokenizer(run)
        assert type(again) is type(tokenizer) and again.encode("alpha beta") == tokenizer.encode("alpha beta")
        assert [p.name for p in run.iterdir()] == [path.name]
        assert identity_of_path(run).kind == ("json" if isinstance(tokenizer, FileTokenizer) else "bytes")
