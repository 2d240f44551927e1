"""Pairs of answers: their documents as in a corpus, margins against one document at a time, scores beside a run's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmdata.errors import DataError
from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.model.packed_seq import Packing
from mmtrain.runs.ask import questions as asking
from mmtrain.runs.ask.ask import AskRequest, ask
from mmtrain.runs.ask.pairs import PreferenceScore, log_prob_margins, preference_scores, read_pairs
from mmtrain.vision.image_inputs import ImageInputs
from mmtrain.vision.images import Images
from tests.data.images.made import SMALL, prepared, write_records
from tests.runs.ask.test_ask import RECORDS, made_of, small_model
from tests.vision.small import small_vl_model

PAIRS = [
    {
        "images": [f"images/{i}.png"],
        "prompt": f"<image>\nwhat is {i}?",
        "chosen": "a c b d"[: 2 * (i % 3) + 3],
        "rejected": "b",
        "kind": ("one", "two")[i > 3],
    }
    for i in range(6)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    return made_of(tmp_path_factory.mktemp("pairs"), PAIRS)


def test_a_pair_is_what_training_has(made: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    file, tokenizer = made
    corpus = prepared(file, tmp_path / "c", tokenizer=str(file.parent / "corpus"))
    for i, pair in enumerate(read_pairs(file, tokenizer, SMALL, corpus.image_id)):
        places = corpus.doc_offsets[i] + np.arange(len(pair.tokens))
        assert np.array_equal(corpus.data[places], pair.tokens) and np.array_equal(
            corpus.is_label(places), pair.learned
        )
        assert corpus.halves[i] == pair.half and pair.kind == PAIRS[i]["kind"]
    with pytest.raises(DataError, match="is no pair: it needs prompt, chosen and rejected"):
        read_pairs(write_records(tmp_path, RECORDS), tokenizer, SMALL, 1)


def test_margins_are_those_of_one_document_at_a_time(
    made: tuple[Path, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tokenizer = made
    model, pairs = small_model(tokenizer), read_pairs(file, tokenizer, SMALL, 1)
    assert all(pair.half > len(pair.tokens) - pair.half for pair in pairs)  # the two are not of one length
    found = log_prob_margins(model, SMALL, pairs, 1)
    for pair, margin in zip(pairs, found, strict=True):
        tiles = asking.tiles_of(pair.images[:1], SMALL)
        log_probs = []
        for part in (slice(0, pair.half), slice(pair.half, None)):
            tokens_T, learned_T = torch.from_numpy(pair.tokens[part]).long(), pair.learned[part]
            given = ImageInputs.whole(
                Images(torch.from_numpy(tiles), pair.layouts[:1]), (tokens_T == 1).nonzero()[:, 0]
            )
            with torch.no_grad():
                logits_TV = model(tokens_T, Packing.from_lengths([len(tokens_T)]), given=given).double()
            chances = logits_TV.softmax(-1)
            log_probs.append(
                sum(chances[t - 1, tokens_T[t]].log().item() for t in range(len(tokens_T)) if learned_T[t])
            )
        assert margin == pytest.approx(log_probs[0] - log_probs[1], abs=1e-4)
    assert len(set(found)) == len(found) == 6
    monkeypatch.setattr(asking, "ROW_TOKENS", 1)
    assert log_prob_margins(model, SMALL, pairs, 1) == pytest.approx(found, abs=1e-4)
    assert preference_scores(pairs, [1, -1, 0, 2, 3, -4]) == [
        PreferenceScore("one", 2, 4),
        PreferenceScore("two", 1, 2),
    ]


def test_figures_stand_beside_those_of_an_earlier_run(made: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    _, tokenizer = made
    folder, page = made[0].parent, tmp_path / "page.html"
    questions = write_records(folder, RECORDS, "questions.jsonl")
    file = write_records(folder, [one | {"chosen": "a", "rejected": "b"} for one in PAIRS], "even.jsonl")
    model, earlier = small_model(tokenizer), small_model(tokenizer)
    with torch.no_grad():
        earlier.lm_head.weight.neg_()  # what was more probable is less
    lines = list(ask(model, tokenizer, AskRequest("m", questions, page, file), earlier))
    assert [line.split()[0] for line in lines[:-1]] == ["one", "two"] * 2
    assert all("(the commonest answer: 50.0%, before: " in line for line in lines[:2])
    pairs = read_pairs(file, tokenizer, SMALL, 1)
    shares = [[one.share for one in preference_scores(pairs, log_prob_margins(which, SMALL, pairs, 1))]
              for which in (model, earlier)]  # fmt: skip
    assert shares[0] != shares[1]
    for line, now, before in zip(lines[2:4], *shares, strict=True):
        assert f"{now:.1%} of" in line and line.endswith(
            f"prefer the right answer (chance: 50.0%, before: {before:.1%})"
        )
    written = page.read_text()
    assert written.count("<th>before</th>") == 2 and "<th>right answer preferred</th>" in written
    other = small_vl_model({"image_token": 1}, vocab_size=tokenizer.vocab_size)
    with pytest.raises(ConfigError, match=r"--before=.* has not the eyes and vocabulary"):
        list(ask(model, tokenizer, AskRequest("m", questions, page, file), other))
