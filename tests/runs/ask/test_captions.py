"""Images that are to find their captions: captions as in a corpus, choices, vectors one at a time, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdata.errors import DataError
from mmdata.images.grid import TileRules
from mmdata.tokenizer import Tokenizer
from mmtrain.config import ContrastiveConfig
from mmtrain.errors import ConfigError
from mmtrain.runs.ask import captions as finding
from mmtrain.runs.ask import questions as asking
from mmtrain.runs.ask.captions import CaptionFile, caption_lines, chosen_captions, read_captions
from mmtrain.runs.ask.questions import tiles_of
from mmtrain.vision.contrastive_model import ContrastiveModel
from tests.data.images.made import SMALL, prepared, write_records
from tests.runs.ask.test_ask import made_of
from tests.vision.small import small_vl_model

FIXED = TileRules(SMALL.tile, SMALL.patch, ())
RECORDS = [
    {"image": f"images/{i}.png", "caption": "ab"[i % 2] * (i % 4 + 1), "kind": ("one", "two")[i > 3]} for i in range(6)
]  # of four captions, two twice


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    return made_of(tmp_path_factory.mktemp("captions"), RECORDS)


def contrastive_model(tokenizer: Tokenizer) -> ContrastiveModel:
    vision = dict(tile_size=SMALL.tile, patch_size=SMALL.patch, image_token=1, grids=[list(one) for one in SMALL.grids],
                  contrastive=ContrastiveConfig(size=8))  # fmt: skip
    model = small_vl_model(vision, vocab_size=max(300, tokenizer.vocab_size)).float().eval()
    assert isinstance(model, ContrastiveModel)
    return model


def test_a_caption_is_what_training_has_after_the_image(made: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    file, tokenizer = made
    corpus = prepared(file, tmp_path / "c", tokenizer=str(file.parent / "corpus"), rules=FIXED)
    read = read_captions(file, tokenizer, FIXED, corpus.image_id)
    assert len(read.captions) == 4
    for i, one in enumerate(read.images):
        begin = int(corpus.doc_offsets[i])
        tokens = corpus.data[begin : begin + int(corpus.doc_lengths[i])]
        assert read.captions[one.right] == tokens[tokens != corpus.image_id].tolist()
        assert one.choices == (0, 1, 2, 3) and one.kind == RECORDS[i]["kind"]


def test_choices_are_the_record_s_own(made: tuple[Path, Tokenizer]) -> None:
    file, tokenizer = made
    records = [{**RECORDS[0], "choices": ["x", "a", "x y", "a"]}, *RECORDS[1:]]
    read = read_captions(write_records(file.parent, records, "own.jsonl"), tokenizer, FIXED, 1)
    said = [[tokenizer.decode(read.captions[number][:-1]) for number in one.choices] for one in read.images]
    assert said[0] == ["x", "a", "x y"] and said[1] == ["a", "bb", "aaa", "bbbb"]  # no one else's choices
    some = read_captions(file, tokenizer, FIXED, 1, limit=2)
    assert [one.image.place.path[-5:] for one in some.images] == ["0.png", "3.png"] and len(some.captions) == 4


def test_the_chosen_caption_is_the_nearest_of_vectors_made_one_at_a_time(
    made: tuple[Path, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tokenizer = made
    model, found = contrastive_model(tokenizer), read_captions(file, tokenizer, FIXED, 1)
    some = ((0, 1, 2, 3), (1, 2, 3), (2, 3), (0, 2), (3, 1), (3, 2, 1))  # the pictures are much alike
    images = tuple(replace(one, choices=choices) for one, choices in zip(found.images, some, strict=True))
    read = CaptionFile(images, found.captions)
    together = chosen_captions(model, FIXED, read)
    monkeypatch.setattr(asking, "ROW_TOKENS", 1)
    monkeypatch.setattr(finding, "_TILES", 1)
    assert chosen_captions(model, FIXED, read) == together and len(set(together)) > 1
    with torch.no_grad():
        captions = [model.embed_captions(torch.tensor(one), [len(one)])[0] for one in read.captions]
        for one, chosen in zip(read.images, together, strict=True):
            image = model.embed_images(torch.from_numpy(tiles_of([one.image], FIXED)))[0]
            assert chosen == max(one.choices, key=lambda number: float(image @ captions[number]))


def test_lines_are_by_kind_beside_chance(made: tuple[Path, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    file, tokenizer = made
    records = [{**one, "choices": ["a", "bb"]} if i < 2 else one for i, one in enumerate(RECORDS)]
    file = write_records(file.parent, records, "kinds.jsonl")
    monkeypatch.setattr(finding, "chosen_captions", lambda model, rules, read: [one.choices[0] for one in read.images])
    one, two = caption_lines(contrastive_model(tokenizer), tokenizer, "r", file, None)
    assert (one.kind, one.share, one.asked, one.chance) == ("one", 1 / 4, 4, pytest.approx((2 / 2 + 2 / 4) / 4))
    assert (two.kind, two.share, two.asked, two.chance) == ("two", 1 / 2, 2, 1 / 4)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "x", "image": "images/0.png"}, "is no caption: it needs caption"),
        ({"caption": "x"}, "has 0 images"),
        ({"caption": "x", "images": ["images/0.png", "images/1.png"]}, "has 2 images"),
        ({"caption": "x", "image": "images/0.png"}, "no two captions to choose from"),
        ({"caption": "x", "image": "images/0.png", "choices": ["y", "z"]}, "its own among them"),
        ({"caption": "x", "image": "images/0.png", "choices": "x"}, "choices that are no list of texts"),
        ({"caption": "x", "image": "images/9.png", "choices": ["x", "y"]}, "image: missing"),
    ],
)
def test_what_cannot_be_asked_is_refused(made: tuple[Path, Tokenizer], record: dict, words: str) -> None:
    file, tokenizer = made
    with pytest.raises(DataError, match=words):
        read_captions(write_records(file.parent, [record], "bad.jsonl"), tokenizer, FIXED, 1)


def test_a_model_that_was_not_trained_so_is_refused(made: tuple[Path, Tokenizer]) -> None:
    file, tokenizer = made
    with pytest.raises(ConfigError, match=r"--captions=.*has no contrastive loss"):
        caption_lines(small_vl_model().float(), tokenizer, "r", file, None)
