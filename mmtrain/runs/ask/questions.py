"""Questions about images, as launch/prepare_images.py reads them, in the tokens that a model was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.errors import DataError
from mmdata.images.grid import ImageLayout, TileRules, lay_image
from mmdata.images.pixels import decode_tiles
from mmdata.images.place import open_section
from mmdata.prepare.skips import Skip
from mmdata.prepare.sources import Piece
from mmdata.prepare_images.encode import FoundImage, SampleEncoder
from mmdata.prepare_images.records import read_records
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageQuestion:
    """A question with its images and the right answer.

    Attributes:
        question: text.
        answer: the right one.
        kind: that it is counted by; "all" where the record has none.
        images: the places of their files, in order.
        prompt: int32[n], all tokens before the answer's.
        layouts: of the images.
    """

    question: str
    answer: str
    kind: str
    images: tuple[FoundImage, ...]
    prompt: np.ndarray
    layouts: tuple[ImageLayout, ...]

    def tiles(self, rules: TileRules) -> np.ndarray:
        """Tiles of all images, uint8 [T, 3, S, S]."""
        found = []
        for image in self.images:
            with open_section(*image.place) as stream:
                found.append(decode_tiles(stream, image.header.width, image.header.height, rules))
        return np.concatenate(found) if found else np.empty((0, 3, rules.tile, rules.tile), np.uint8)

    def picture(self) -> bytes:
        """The file of the first image."""
        with open_section(*self.images[0].place) as stream:
            return stream.read()


def read_questions(
    file: Path, tokenizer: Tokenizer, rules: TileRules, image_id: int, limit: int | None = None
) -> list[ImageQuestion]:
    """Read records of `question`, `answer` and `image(s)`, and of `kind` if they have one.

    The prompt is what such a record has before its answer in a corpus made with the default turns.

    Args:
        file: .jsonl, with images beside it.
        tokenizer: of the model.
        rules: how its images become tiles.
        image_id: its token for images.
        limit: how many to keep, spread evenly over the file; None keeps all.

    Raises:
        DataError: the file is not there, a record is no question, or an image cannot be read.
    """
    encoder = SampleEncoder(tokenizer, Template(), rules, image_id)
    records = list(_records(file))
    if not records:
        raise DataError(f"{file} holds no question: give a .jsonl file of question, answer and image")
    chosen = records if limit is None or limit >= len(records) else _spread(records, limit)
    return [_question(record, encoder, rules) for record in chosen]


def _records(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise DataError(f"{file} is not there: give a .jsonl file of question, answer and image")
    for record in read_records(Piece(str(file), "jsonl", 0, file.stat().st_size), None):
        if isinstance(record, Skip):
            raise DataError(f"{record.where}: {record.reason}")
        if not all(isinstance(record.value.get(name), str) for name in ("question", "answer")):
            raise DataError(f"{record.where} is no question: it needs question and answer, both texts")
        yield record


def _spread(records: Sequence[Any], limit: int) -> list[Any]:
    return [records[i * len(records) // limit] for i in range(limit)]


def _question(record: Any, encoder: SampleEncoder, rules: TileRules) -> ImageQuestion:
    document = encoder.encode(record)
    if isinstance(document, Skip):
        raise DataError(f"{document.where}: {document.reason}")
    images = tuple(image for image, _ in document.images)
    layouts = tuple(lay_image(image.header.width, image.header.height, rules) for image in images)
    value, begin = record.value, int(np.argmax(document.learned))
    kind = str(value.get("kind", "all"))
    return ImageQuestion(value["question"], value["answer"], kind, images, document.tokens[:begin], layouts)
