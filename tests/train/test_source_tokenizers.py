"""Corpora of different tokenizers in one run: refused, naming both."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mmdata.prepare.pipeline import PrepareOptions, prepare
from mmdata.tokenizer import load_tokenizer
from mmtrain.config import DataConfig, SourceConfig
from mmtrain.errors import ConfigError
from mmtrain.train.inputs import RunInputs
from tests.train.test_inputs import megatron, phase

__all__ = ["megatron"]  # a fixture


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora `a`, `b` (tokenizers trained apart, both of 280 tokens), `again` (a's tokenizer) and `bytes`."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, words in (("a", "the cat sat on the mat "), ("b", "colourless green ideas sleep ")):
        (folder / f"{name}.txt").write_text("".join(f"{words}{i}\n" for i in range(300)))
    for name, text, tokenizer in (
        ("a", "a", "train"), ("b", "b", "train"), ("again", "b", str(folder / "a")), ("bytes", "a", "bytes"),
    ):  # fmt: skip
        output, inputs = folder / name, [folder / f"{text}.txt"]
        prepare(PrepareOptions(inputs=inputs, output=output, tokenizer=tokenizer, vocab_size=280, workers=1))
    assert load_tokenizer(folder / "a").vocab_size == load_tokenizer(folder / "b").vocab_size == 280
    return folder


def sources(*paths: Path) -> list[SourceConfig]:
    return [SourceConfig(str(path)) for path in paths]


def test_corpora_of_one_tokenizer_mix(corpora: Path) -> None:
    inputs = RunInputs(DataConfig(sources=sources(corpora / "a", corpora / "again")), [phase()], 280)
    assert not inputs.notes
    given = DataConfig(sources=sources(corpora / "again"), tokenizer=str(corpora / "a/tokenizer.json"))
    assert not RunInputs(given, [phase(sources=sources(corpora / "a/train"))], 280).notes


def test_corpora_of_two_tokenizers_do_not(corpora: Path) -> None:
    names = rf"data\.sources\[1\]\.path={corpora}/b: was made with a tokenizer.json \(280 tokens, sha256 \w{{12}}\), "
    names += rf"but data\.sources\[0\]\.path={corpora}/a with a tokenizer.json \(280 tokens, sha256 \w{{12}}\); prepare"
    with pytest.raises(ConfigError, match=names) as caught:
        RunInputs(DataConfig(sources=sources(corpora / "a", corpora / "b")), [phase()], 280)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"stage\.phases\[1\]\.sources\[0\]\.path=.*/b/train: was made .* data\.path="
    ):
        RunInputs(DataConfig(path=str(corpora / "a")), [phase(), phase(sources=sources(corpora / "b/train"))], 280)
    with pytest.raises(ConfigError, match="was made with the byte tokenizer"):
        RunInputs(DataConfig(sources=sources(corpora / "a", corpora / "bytes")), [phase()], 280)


@pytest.mark.parametrize(
    ("corpus", "given", "says"),
    [("a", "b", r"is a tokenizer.json .* was made with a tokenizer.json"),
     ("a", "bytes", r"is the byte tokenizer, but data\.path=.*/a was made with a tokenizer.json"),
     ("bytes", "a", r"but data\.path=.*/bytes was made with the byte tokenizer")],
)  # fmt: skip
def test_a_tokenizer_that_is_not_the_corpus_s_is_refused(corpora: Path, corpus: str, given: str, says: str) -> None:
    tokenizer = given if given == "bytes" else str(corpora / given / "tokenizer.json")
    with pytest.raises(ConfigError, match=rf"data\.tokenizer=.*{says}.*leave it out"):
        RunInputs(DataConfig(path=str(corpora / corpus), tokenizer=tokenizer), [phase()], 280)


def test_what_cannot_be_checked_is_told_once(corpora: Path, megatron: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{megatron}{suffix}", tmp_path / f"plain.v2{suffix}")
    mixed = sources(corpora / "a", megatron, tmp_path / "plain.v2")
    inputs = RunInputs(DataConfig(sources=mixed), [phase(sources=sources(megatron))], 280)
    (line,) = inputs.notes
    assert line.startswith(
        f"no tokenizer on record for data.sources[1].path={megatron}, data.sources[2].path={tmp_path}"
    )
    assert line.endswith("cannot be checked")
    shutil.copy(corpora / "b/tokenizer.json", tmp_path / "tokenizer.json")  # beside a pair, it is the pair's own
    with pytest.raises(ConfigError, match=r"data\.sources\[2\]\.path=.*plain\.v2: was made with"):
        RunInputs(DataConfig(sources=mixed), [phase()], 280)


def test_a_run_s_tokenizer_is_saved(corpora: Path, tmp_path: Path) -> None:
    inputs = RunInputs(DataConfig(path=str(corpora / "a")), [phase()], 280)
    inputs.save_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).encode("the cat") == inputs.tokenizer.encode("the cat")
