"""Answers of a loaded model: log-probabilities against its logits, beginnings that are read once, continuations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmdata.tokenizer import ByteTokenizer
from mmtrain.errors import ConfigError
from mmtrain.infer import answering
from mmtrain.infer.answering import DecodingAnswerer, open_answerer
from mmtrain.model.init import build_model
from mmtrain.model.packed_seq import Packing
from tests.infer.chain import CONFIG, EOD, TEXT, chain_model

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def answerer() -> DecodingAnswerer:
    torch.manual_seed(0)
    return DecodingAnswerer(build_model(CONFIG).eval(), TOKENIZER)


def plain(answerer: DecodingAnswerer, row: np.ndarray) -> np.ndarray:
    tokens_T = torch.from_numpy(row)
    with torch.no_grad():
        logits_TV = answerer._model(tokens_T, Packing.from_lengths([len(row)], tokens_T.device)).double()
    return logits_TV.log_softmax(-1)[torch.arange(len(row) - 1), tokens_T[1:]].numpy()


def rows(*lengths: int, shared: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    begin = rng.integers(0, 256, shared)
    return [np.concatenate([begin, rng.integers(0, 256, length)]) for length in lengths]


@pytest.mark.parametrize("shared", [0, 1, 40, 700])
def test_rows_get_their_log_probabilities(answerer: DecodingAnswerer, shared: int) -> None:
    asked = rows(2, 9, 4, shared=shared)
    for row, found in zip(asked, answerer.score(asked), strict=True):
        assert found.shape == (len(row) - 1,) and found.dtype == np.float32
        assert found == pytest.approx(plain(answerer, row), abs=2e-5)


def test_a_beginning_is_read_once_and_equal_rows_are_fine(
    answerer: DecodingAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = rows(3, 5, 4, shared=600)
    read: list[int] = []
    original = answering.read_prefix
    monkeypatch.setattr(answering, "read_prefix", lambda model, ids: (read.append(len(ids)), original(model, ids))[1])
    answerer.score(asked)
    assert read == [600]
    same = answerer.score([asked[0], asked[0]])
    assert same[0] == pytest.approx(plain(answerer, asked[0]), abs=2e-5) and (same[0] == same[1]).all()
    one = asked[0][:601]
    assert [len(found) for found in answerer.score([one, asked[1]])] == [600, 604]


def test_logits_are_made_in_chunks(answerer: DecodingAnswerer, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = rows(50)
    whole = answerer.score([row])[0]
    monkeypatch.setattr(answerer._model.config, "loss_chunk_tokens", 7)
    assert answerer.score([row])[0] == pytest.approx(whole, abs=1e-6)


def test_prompts_are_continued_to_the_end_of_the_document(run: Path) -> None:
    found, tokenizer = open_answerer(run, "cpu")
    prompts = [np.array(list(b"n")), np.array(list("né€".encode()))]
    made = found.generate(prompts, 50)
    assert [tokenizer.decode(ids) for ids in made] == [TEXT[1:], TEXT[3:]]
    assert all(EOD not in ids for ids in made) and [len(ids) for ids in found.generate(prompts, 3)] == [3, 3]


def test_logits_that_are_no_numbers_and_full_memory_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = chain_model()
    broken.lm_head.weight.data[3, 5] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        DecodingAnswerer(broken, TOKENIZER).score(rows(5))
    model = chain_model()

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(model.embed_tokens, "forward", fail)
    with pytest.raises(ConfigError, match="--lengths=5 tokens: do not fit into the memory of cpu"):
        DecodingAnswerer(model, TOKENIZER).score(rows(5))
