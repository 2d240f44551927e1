"""The drawn data set: its pictures, what is said of them, its splits, and that the readers take it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdata.draw.__main__ import main
from mmdata.draw.font import GLYPHS, LETTERS, word_mask
from mmdata.draw.scene import COLOURS, NUMBERS, PLACES, SHAPES, WORD_LIST, pixels_of, scene_of, shape_mask
from mmdata.draw.write import KINDS, SPLITS, DrawOptions, draw, scenes
from mmdata.errors import DataError
from mmdata.images.corpus import ImageCorpus
from tests.data.images.made import prepared


def records(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "set"
    draw(DrawOptions(folder, images=300, seed=5, tar=True))
    return folder


def test_pictures_are_as_their_questions_say():
    asked = set()
    for name, scene in scenes(DrawOptions(Path("x"), images=400, seed=1)):
        pixels, answers = pixels_of(scene), {one.kind: one.answer for one in scene.questions()}
        inked = (pixels != np.array(scene.paper, dtype=np.uint8)).any(-1)
        assert pixels.shape == (scene.height, scene.width, 3) and inked.any(), name
        assert {tuple(colour) for colour in pixels[inked].tolist()} == {COLOURS[answers["colour"]]}
        if "word" in answers:
            word = answers["word"].replace(" ", "")
            assert np.array_equal(inked, word_mask(word, scene.width, scene.height)) and word in WORD_LIST
        else:
            assert len(scene.places) == NUMBERS.index(answers["count"]) + 1
            rows, columns = np.nonzero(inked)
            found = {(y * 3 // scene.height, x * 3 // scene.width) for y, x in zip(rows, columns, strict=True)}
            assert {divmod(place, 3) for place in scene.places} <= found
            if "position" in answers:
                middle = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
                at = int(middle[0] * 3 // scene.height) * 3 + int(middle[1] * 3 // scene.width)
                assert PLACES[at] == answers["position"]
        assert all(one.wrong != one.answer for one in scene.questions())
        asked |= {(one.kind, one.answer) for one in scene.questions()}
    assert {answer for kind, answer in asked if kind == "colour"} == set(COLOURS)
    assert {answer for kind, answer in asked if kind == "shape"} == set(SHAPES)
    assert {answer for kind, answer in asked if kind == "count"} == set(NUMBERS)
    assert {answer for kind, answer in asked if kind == "position"} == set(PLACES)
    assert len({answer for kind, answer in asked if kind == "word"}) > 15


def test_shapes_and_letters_differ():
    masks = [shape_mask(shape, 17) for shape in SHAPES]
    assert all((a != b).mean() > 0.05 for i, a in enumerate(masks) for b in masks[:i])
    assert len({glyph.tobytes() for glyph in GLYPHS.values()}) == len(GLYPHS) == 26
    assert all(set(word) <= set(GLYPHS) and len(word) == LETTERS for word in WORD_LIST)


def test_a_letter_takes_a_third_of_every_picture():
    for width, height in ((56, 56), (112, 56), (56, 112), (84, 56)):
        mask = word_mask("CAT", width, height)
        for i, letter in enumerate("CAT"):
            third = mask[:, i * width // 3 : (i + 1) * width // 3]
            rows, columns = np.nonzero(third)
            drawn = third[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            high, wide = height // 24, width // 24
            assert np.array_equal(drawn, np.kron(GLYPHS[letter], np.ones((high, wide), dtype=np.bool_))), letter
            assert rows.min() >= height // 3 and rows.max() < height - height // 3


def test_pairs_alone_ask_for_what_is_not_there(drawn):
    scenes_of = {name: scene for name, scene in scenes(DrawOptions(drawn, images=300, seed=5))}
    for split in SPLITS:
        pairs = records(drawn, f"{split}_pairs")
        assert {one["kind"] for one in pairs} == {"absent", "colour", "count", "position", "shape", "word"}
        assert all(one["chosen"] != one["rejected"] for one in pairs)
        for one in pairs:
            scene = scenes_of[one["images"][0]]
            asked = {q.question: q.answer for q in scene.questions()}
            question = one["prompt"].removeprefix("<image>\n")
            assert one["chosen"] == asked.get(question, "none") and (question in asked) == (one["kind"] != "absent")
        denied = {one["kind"] for one in pairs if one["rejected"] == "none"}
        assert denied == {"count", "word"}  # it is not the better answer everywhere
        assert not any(one["answer"] == "none" for one in records(drawn, f"{split}_questions"))


def test_splits_show_different_things_and_cover_the_same_answers(drawn):
    shown = {name: scene.key for name, scene in scenes(DrawOptions(drawn, images=300, seed=5))}
    for kind in KINDS:
        used = [[one.get("images") or [one["image"]] for one in records(drawn, f"{split}_{kind}")] for split in SPLITS]
        keys = [{shown[name] for names in own for name in names} for own in used]
        assert all(keys) and not keys[0] & keys[1], kind  # nothing that is asked of the held-out split was seen
    train, valid = records(drawn, "train_questions"), records(drawn, "valid_questions")
    assert not {one["image"] for one in train} & {one["image"] for one in valid}
    assert {one["kind"] for one in valid} == {one["kind"] for one in train}
    assert {one["answer"] for one in valid if one["kind"] == "colour"} <= {one["answer"] for one in train}


def test_a_seed_gives_the_same_bytes_and_another_one_others(drawn, tmp_path):
    draw(DrawOptions(tmp_path / "again", images=300, seed=5, tar=True))
    for path in sorted(drawn.rglob("*.jsonl")) + sorted(drawn.rglob("*.png"))[:20]:
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(drawn)).read_bytes()
    assert scene_of(5, 0, [(9, 9)]) != scene_of(6, 0, [(9, 9)])


def test_the_readers_take_it(drawn, tmp_path):
    for kind in ("captions", "conversations", "pairs", "interleaved", "questions"):
        corpus = prepared(drawn / f"train_{kind}.jsonl", tmp_path / kind, strict=True)
        assert corpus.num_documents == len(records(drawn, f"train_{kind}"))
        assert (corpus.halves > 0).all() == (kind == "pairs")
    tar = prepared(drawn / "train_captions.tar", tmp_path / "tar", strict=True)
    lines = ImageCorpus(tmp_path / "captions/train")
    assert np.array_equal(tar.data, lines.data)
    with Image.open(drawn / "images/000000.png") as image:
        assert image.size in {(56, 56), (112, 56), (56, 112), (112, 112), (84, 56)}


def test_the_command(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "set"), "--images", "5"]) == 0
    assert "5 pictures" in capsys.readouterr().out
    assert main(["--output", str(tmp_path / "set")]) == 2
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(DataError, match="--tile is 10"):
        draw(DrawOptions(tmp_path / "other", tile=10))
