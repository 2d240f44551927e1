"""Corpora as a run opens them: prepared folders, foreign Megatron files, mixtures, and what is refused."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdata.corpus import documents, kept_split, token_range
from mmdata.corpus import open as registry
from mmdata.corpus.array_cache import FOLDER
from mmdata.corpus.indexed import IndexedCorpus
from mmdata.errors import DataError
from mmdata.rows import orders
from mmtrain.config import DataConfig, PhaseConfig, SourceConfig
from mmtrain.config.schema import Count
from mmtrain.errors import ConfigError
from mmtrain.train.inputs import RunInputs
from tests.data.corpus.toy import ToyCorpus, ToyFormat, write_toy
from tests.dist.runs import make_corpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("prepared"), documents=30)


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of bytes 'a' to 'h', written by megatron-core itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    prefix = tmp_path_factory.mktemp("megatron") / "foreign"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    rng = np.random.default_rng(0)
    for _ in range(40):
        tokens = torch.from_numpy(np.append(rng.integers(97, 105, 20), 256))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def phase(name: str = "p", seq_len: int = 16, sources: list[SourceConfig] | None = None) -> PhaseConfig:
    return PhaseConfig(name, Count(seq_len), 1e4, Count(1000), [], [], sources)


def test_a_prepared_folder_gives_its_tokenizer_and_held_out_rows(prepared: Path) -> None:
    inputs = RunInputs(DataConfig(path=str(prepared)), [phase()], 257)
    assert inputs.tokenizer.vocab_size == 257 and inputs.token_bytes.tolist() == [1] * 256 + [0]
    wider = RunInputs(DataConfig(path=str(prepared)), [phase()], 260)  # a vocabulary padded beyond the tokenizer's
    assert wider.token_bytes.tolist() == [1] * 256 + [0] * 4
    valid = inputs.valid_stream(16)
    assert valid is not None and valid.corpus.prefix == prepared / "valid"
    assert inputs.valid_stream(100_000)[0].tokens.shape == (100_000,)  # less than a row of text: padded
    assert RunInputs(DataConfig(path=str(prepared), valid_rows=0), [phase()], 257).valid_stream(16) is None


def test_a_megatron_corpus_is_split_by_hash(megatron: Path) -> None:
    data = DataConfig(path=str(megatron), tokenizer="bytes", valid_fraction=0.2)
    inputs = RunInputs(data, [phase()], 257)
    train, valid = inputs.train_stream(0), inputs.valid_stream(16)
    assert valid is not None
    assert train.num_documents + valid.num_documents == 40 and 1 <= valid.num_documents <= 20
    assert RunInputs(DataConfig(path=f"{megatron}.bin", tokenizer="bytes"), [phase()], 257).train_stream(0)


def test_both_parts_of_a_corpus_have_a_fingerprint(prepared: Path, megatron: Path) -> None:
    """A held-out part that is chosen from the corpus has none of its own."""
    sources = [SourceConfig(str(prepared), 1.0), SourceConfig(str(megatron), 1.0)]
    inputs = RunInputs(DataConfig(sources=sources, tokenizer="bytes", valid_fraction=0.2), [phase()], 257)
    own, chosen = inputs.fingerprints()["sources"]
    parts = {side: IndexedCorpus(prepared / side).fingerprint()["files"]["bin"] for side in ("train", "valid")}
    assert {side: own[side]["files"]["bin"] for side in parts} == parts and parts["train"] != parts["valid"]
    assert chosen["train"]["documents"] == 40 and chosen["valid"] is None


def test_every_corpus_has_a_cache_of_its_own(
    prepared: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((kept_split, "LARGE_DOCUMENTS"), (orders, "LARGE"), (documents, "LARGE")):
        monkeypatch.setattr(module, name, 1)
    sources = [SourceConfig(str(prepared), 1.0), SourceConfig(str(megatron), 1.0)]

    def entries(folder: Path, cache_dir: Path | None) -> list[str]:
        data = DataConfig(sources=sources, tokenizer="bytes", cache_dir=cache_dir and str(cache_dir))
        stream = RunInputs(data, [phase()], 257).train_stream(0)
        for i in range(8):
            stream[i]
        return sorted(path.name.split("-")[0] for path in folder.iterdir())

    assert entries(prepared / FOLDER, None) == ["bounds", "order"]
    assert entries(megatron.parent / FOLDER, None) == ["bounds", "order", "split"]
    for folder in (prepared / FOLDER, megatron.parent / FOLDER):
        shutil.rmtree(folder)
    assert entries(tmp_path / "told", tmp_path / "told") == ["bounds", "bounds", "order", "order", "split"]
    assert not (prepared / FOLDER).exists() and not (megatron.parent / FOLDER).exists()


def test_phases_have_orders_and_mixtures_of_their_own(prepared: Path, megatron: Path) -> None:
    mixed = [SourceConfig(str(prepared), 3.0), SourceConfig(str(megatron), 1.0)]
    data = DataConfig(path=str(prepared), tokenizer="bytes")
    inputs = RunInputs(data, [phase("a"), phase("b"), phase("c", sources=mixed)], 257)
    first, second, third = (inputs.train_stream(i) for i in range(3))
    assert [first[i].tokens.tolist() for i in range(5)] != [second[i].tokens.tolist() for i in range(5)]
    foreign = sum(set(third[i].tokens[:-1].tolist()) <= {*range(97, 105), 256} for i in range(40))
    assert foreign == pytest.approx(10, abs=2)


def test_a_format_that_is_registered_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FORMATS", (ToyFormat(), *registry.FORMATS))
    path = write_toy(tmp_path / "some.toy", [[*range(97, 97 + i % 9), 256] for i in range(50)])
    inputs = RunInputs(DataConfig(path=str(path), tokenizer="bytes", valid_fraction=0.2), [phase()], 257)
    train, valid = inputs.train_stream(0), inputs.valid_stream(16)
    assert isinstance(train.corpus, ToyCorpus) and valid is not None
    assert train.num_documents + valid.num_documents == 50 and valid.num_documents > 0
    assert set(train[0].tokens.tolist()) <= {*range(97, 106), 256}
    with pytest.raises(DataError, match="toy_tokenizer"):  # the format says where its tokenizer would be
        RunInputs(DataConfig(path=str(path)), [phase()], 257)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(path="nowhere"), DataError, "prepare"),
        (dict(tokenizer="nowhere.json"), DataError, "nowhere.json"),
    ],
)
def test_missing_files_are_named(prepared: Path, change: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        RunInputs(DataConfig(**({"path": str(prepared)} | change)), [phase()], 257)


def test_what_does_not_fit_the_model_is_refused(prepared: Path, megatron: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size=256: the tokenizer has 257 tokens"):
        RunInputs(DataConfig(path=str(prepared)), [phase()], 256)
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        RunInputs(DataConfig(path=str(megatron)), [phase()], 257)
    with pytest.raises(DataError, match="seq_len"):
        RunInputs(DataConfig(path=str(prepared)), [phase(seq_len=10**6)], 257)


def test_a_corpus_with_ids_beyond_the_model_is_refused(
    megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"wrong{suffix}").write_bytes(Path(f"{megatron}{suffix}").read_bytes())
    tokens = np.fromfile(tmp_path / "wrong.bin", dtype=np.int32)
    tokens[30] = 5000
    tokens.tofile(tmp_path / "wrong.bin")
    with pytest.raises(DataError, match="5000"):
        RunInputs(DataConfig(path=str(tmp_path / "wrong"), tokenizer="bytes"), [phase()], 257)
    monkeypatch.setattr(token_range, "SCAN_TOKENS", 30)  # the id lies beyond what is read before training starts
    data = DataConfig(path=str(tmp_path / "wrong"), tokenizer="bytes", valid_fraction=0.0)
    stream = RunInputs(data, [phase()], 257).train_stream(0)
    with pytest.raises(DataError, match="5000"):
        for i in range(stream.rows_per_epoch(0)):
            stream[i]
