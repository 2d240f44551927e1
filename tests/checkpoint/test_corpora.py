"""Corpora of a checkpoint and of a launch: the same, moved, changed, or never recorded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mmtrain.checkpoint.corpora import FILE_NAME, check_same_corpora, check_same_tokenizer, write_corpora
from mmtrain.errors import ConfigError

STEP = Path("runs/a/checkpoints/step-00000008")
BYTES, OTHER = ({"kind": kind, "sha256": sha, "content": None, "vocab_size": 257} for kind, sha in
                (("bytes", None), ("json", "0123456789abcdef")))  # fmt: skip


def files(digest: str) -> dict[str, Any]:
    return {"bin": {"bytes": 100, "sample": digest}, "idx": {"bytes": 10, "sample": "i"}}


def record(*sources: str, option: str = "data.sources[{}].path", tokenizer: dict = BYTES) -> dict[str, Any]:
    """A record of sources, each the name of its content."""
    return {
        "tokenizer": tokenizer,
        "tokenizer_given": None,
        "sources": [
            {
                "option": option.format(i), "path": f"corpora/{name}", "resolved": f"/srv/corpora/{name}",
                "train": {"documents": 60, "tokens": 50, "files": files(name)}, "valid": None,
            }
            for i, name in enumerate(sources)
        ],
    }  # fmt: skip


def check(before: Any, now: dict, allow: bool = False) -> list[str]:
    return check_same_corpora(STEP, before if "config" in before else {"corpora": before}, now, allow)


def test_the_same_corpora_pass_without_a_word() -> None:
    assert check(record("a", "b"), record("a", "b")) == []
    one = record("a", option="data.path")
    assert check(one, record("a")) == [] == check(record("a"), one)  # data.path is short for data.sources[0]


def test_a_moved_corpus_is_told() -> None:
    now = record("a", "b")
    now["sources"][1] |= {"path": "elsewhere/b", "resolved": "/mnt/elsewhere/b"}
    assert check(record("a", "b"), now) == [
        "data.sources[1].path=elsewhere/b: the corpus that was at /srv/corpora/b"
    ]  # fmt: skip


def change(name: str, value: Any) -> dict:
    now = record("a", "b")
    now["sources"][1]["train"][name] = value
    return now


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (change("documents", 61), r"data\.sources\[1\]\.path=corpora/b: it has changed since \S+step-00000008: "
                                  r"documents 60 -> 61; restore it, or give data\.allow_changed=true"),
        (change("tokens", 51), r"tokens 50 -> 51"),
        (change("files", files("c")), r"data\.sources\[1\].*bin hash of samples b -> c"),
        (record("a", "c"), r"data\.sources\[1\].*bin hash of samples b -> c"),
        (record("b", "a"), r"data\.sources\[0\].*bin hash of samples a -> b"),
        (record("a", "b", "c"), r"data\.sources\[2\]\.path=corpora/c: \S+ was trained without this corpus"),
        (record("a", "b", option="stage.phases[{}].sources[0].path"), "was trained without this corpus"),
        (record("a", "b", tokenizer=OTHER), r"was trained with the byte tokenizer, this launch's is a tokenizer\.json"),
    ],
)  # fmt: skip
def test_a_changed_corpus_is_refused_unless_it_is_allowed(now: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        check(record("a", "b"), now)
    assert "\n" not in str(caught.value)
    lines = check(record("a", "b"), now, allow=True)
    assert lines and all("going on all the same" in line for line in lines)


def test_a_held_out_part_that_changed_is_refused() -> None:
    before, now = record("a"), record("a")
    now["sources"][0]["valid"] = copy.deepcopy(now["sources"][0]["train"])
    with pytest.raises(ConfigError, match=r"its held-out part has changed since .*: it was not there before"):
        check(before, now)


def test_a_checkpoint_without_a_record_vouches_for_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    phases = [{"sources": None}, {"sources": [{"path": "corpora/b"}]}]
    old = {"config": {"data": {"path": "corpora/a", "sources": [], "tokenizer": None}, "stage": {"phases": phases}}}
    now = record("a", option="data.path")
    now["sources"] += record("b", option="stage.phases[1].sources[{}].path")["sources"]
    assert check(old, now) == []
    now["sources"][0]["path"] = str(tmp_path / "corpora/a")  # the same place, typed otherwise
    assert check(old, now) == []
    for i, option in ((0, r"data\.path"), (1, r"stage\.phases\[1\]\.sources\[0\]\.path")):
        other = copy.deepcopy(now)
        other["sources"][i]["path"] = "corpora/other"
        with pytest.raises(
            ConfigError, match=rf"{option}=corpora/other: .* was trained on corpora/[ab], and it has no"
        ):
            check(old, other)
        assert len(check(old, other, allow=True)) == 1
    with pytest.raises(ConfigError, match=r"data\.tokenizer=bytes: .* was trained with None"):
        check(old, now | {"tokenizer_given": "bytes"})
    assert check({"config": {}}, now) == []


def test_weights_of_another_tokenizer_are_refused() -> None:
    def start(before: dict, now: dict, allow: bool = False) -> list[str]:
        return check_same_tokenizer("run.init_from", STEP, before, now, allow)

    assert start({"corpora": record("a")}, record("b")) == [] == start({}, record("b"))  # other text is what it is for
    with pytest.raises(ConfigError, match=r"run\.init_from=\S+: \S+ was trained with the byte tokenizer, this"):
        start({"corpora": record("a")}, record("a", tokenizer=OTHER))
    assert len(start({"corpora": record("a")}, record("a", tokenizer=OTHER), allow=True)) == 1


def test_the_record_reads_back(tmp_path: Path) -> None:
    write_corpora(tmp_path, record("a"))
    assert json.loads((tmp_path / FILE_NAME).read_text()) == record("a") and len(list(tmp_path.iterdir())) == 1
