"""The tokenizer of a run is found from any folder, and no other one is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmdata.tokenizer import ByteTokenizer
from mmdata.tokenizer_identity import identity_of_path
from mmtrain.errors import ConfigError, UserError
from mmtrain.infer.run_tokenizer import identity_of_checkpoint, tokenizer_of_run
from tests.infer.chain import byte_tokenizer, file_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkpoint at project/runs/first/checkpoints/step-00000004; the current folder is another one."""
    path = tmp_path / "project/runs/first/checkpoints/step-00000004"
    path.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return path


def record(known: Path | str | None = None, /, **data: object) -> dict:
    """A checkpoint's record, with the hash of a tokenizer where one is given."""
    corpora = {} if known is None else {"corpora": {"tokenizer": identity_of_path(known).as_dict()}}
    return {"config": {"data": data}, **corpora}


def size(checkpoint: Path, meta: dict, given: str | None = None, vocab_size: int = 1000) -> int:
    """Vocabulary of the tokenizer that is taken; those of these tests differ in it."""
    return tokenizer_of_run(checkpoint, meta, given, vocab_size).vocab_size


def test_it_is_found_in_checkpoint_run_and_corpus_in_this_order(checkpoint: Path, tmp_path: Path) -> None:
    run = checkpoint.parents[1]
    file_tokenizer(checkpoint / "tokenizer", 1)
    file_tokenizer(run / "tokenizer", 2)
    file_tokenizer(tmp_path / "project/data/corpus", 3)
    file_tokenizer(tmp_path / "elsewhere/data/corpus", 4)
    file_tokenizer(tmp_path / "project/other", 5)
    meta = record(path="data/corpus")
    assert size(checkpoint, meta) == 258
    shutil.rmtree(checkpoint / "tokenizer")
    assert size(checkpoint, meta) == 259
    shutil.rmtree(run / "tokenizer")
    assert size(checkpoint, meta) == 260  # below a folder above the run, not below the current one
    assert size(checkpoint, record(path="data/corpus", tokenizer="other/tokenizer.json")) == 262
    assert size(checkpoint, record(sources=[{"path": "other"}, {"path": "data/corpus"}])) == 262
    assert size(checkpoint, record(path="data/corpus", tokenizer="bytes")) == ByteTokenizer.vocab_size
    moved = tmp_path / "elsewhere/run/checkpoints/step-00000004"
    shutil.move(tmp_path / "project/data", tmp_path / "data-gone")
    moved.mkdir(parents=True)
    assert size(moved, meta) == 261
    resolved = {"sources": [{"path": "data/corpus", "resolved": str(tmp_path / "data-gone/corpus")}]}
    assert size(checkpoint, {**meta, "corpora": resolved}) == 260  # the absolute path on record


def test_the_byte_tokenizer_is_kept_in_a_folder_too(checkpoint: Path) -> None:
    byte_tokenizer(checkpoint / "tokenizer")
    assert isinstance(tokenizer_of_run(checkpoint, record(), None, 257), ByteTokenizer)


def test_one_that_is_not_on_record_is_passed_over(checkpoint: Path) -> None:
    ours = file_tokenizer(checkpoint.parents[1] / "tokenizer", 1)
    meta = record(ours, path="gone")
    file_tokenizer(checkpoint / "tokenizer", 2)
    assert size(checkpoint, meta) == 258
    (ours / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError) as caught:
        size(checkpoint, meta)
    message = str(caught.value)
    for part in ("not a usable tokenizer.json", "259 tokens", "none at gone", "--tokenizer"):
        assert part in message
    assert "\n" not in message


def test_where_none_is_found_one_line_names_the_places(checkpoint: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        size(checkpoint, record(path="data/corpus"))
    message = str(caught.value)
    for place in (checkpoint / "tokenizer", checkpoint.parents[1] / "tokenizer", "data/corpus", "--tokenizer"):
        assert str(place) in message
    assert "\n" not in message and message.count("data/corpus") == 1


@pytest.mark.parametrize("known", ["record", "checkpoint", "corpus", "nowhere"])
def test_another_tokenizer_than_the_run_s_is_refused(checkpoint: Path, tmp_path: Path, known: str) -> None:
    ours, other = file_tokenizer(tmp_path / "ours", 1), file_tokenizer(tmp_path / "other", 2)
    again = file_tokenizer(tmp_path / "again", 1) / "tokenizer.json"
    again.write_text(again.read_text() + "\n\n")  # the same tokenizer in other bytes
    meta = record(ours if known == "record" else None, path=str(ours) if known == "corpus" else "gone")
    if known == "checkpoint":
        shutil.copytree(ours, checkpoint / "tokenizer")
    assert size(checkpoint, meta, str(ours)) == size(checkpoint, meta, str(again)) == 258
    if known == "nowhere":  # nothing to compare with
        assert size(checkpoint, meta, str(other)) == 259
        return
    for wrong, named in ((str(other), "259 tokens"), ("bytes", "the byte tokenizer")):
        with pytest.raises(ConfigError, match=f"--tokenizer={wrong}: it is .*{named}.*was trained with .*258 tokens"):
            size(checkpoint, meta, wrong)


def test_more_tokens_than_the_model_has_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    file_tokenizer(checkpoint / "tokenizer", 1)
    with pytest.raises(ConfigError, match="258 tokens, the model only 257"):
        size(checkpoint, record(), vocab_size=257)
    with pytest.raises(ConfigError, match="--tokenizer=bytes: it has 257 tokens, the model only 100"):
        size(checkpoint, record(), "bytes", 100)
    with pytest.raises(ValueError, match="missing") as caught:
        size(checkpoint, record(), str(tmp_path / "gone.json"))
    assert caught.value.is_user_error


@pytest.mark.parametrize("corpora", [None, [], {"tokenizer": 3}, {"tokenizer": {"kind": "json"}}, {"sources": 1}])
def test_a_record_without_a_usable_hash_counts_as_none(checkpoint: Path, corpora: object) -> None:
    file_tokenizer(checkpoint / "tokenizer", 1)
    assert size(checkpoint, {"corpora": corpora, "config": {}}) == 258
    assert size(checkpoint, {"corpora": corpora}) == 258
    with pytest.raises(UserError):
        size(checkpoint, {"corpora": corpora}, "bytes")


def test_what_a_checkpoint_was_trained_with_is_on_its_record_or_lies_with_it(checkpoint: Path) -> None:
    assert identity_of_checkpoint(checkpoint) is None
    file_tokenizer(checkpoint, 1)  # as in a Hugging Face folder
    assert identity_of_checkpoint(checkpoint) == identity_of_path(checkpoint)
    byte_tokenizer(checkpoint / "tokenizer")
    found = identity_of_checkpoint(checkpoint)
    assert found is not None and found.kind == "bytes"
    other = file_tokenizer(checkpoint.parent / "other", 3)
    (checkpoint / "meta.json").write_text(json.dumps(record(other)))
    found = identity_of_checkpoint(checkpoint)
    assert found is not None and found.same_as(identity_of_path(other))
