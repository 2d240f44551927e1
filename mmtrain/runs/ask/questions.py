"""Questions about images, as launch/prepare_images.py reads them, in the tokens that a model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmdata.errors import DataError
from mmdata.images.grid import ImageLayout, TileRules, lay_image
from mmdata.images.pixels import decode_tiles
from mmdata.images.place import open_section
from mmdata.prepare.skips import Skip
from mmdata.prepare.sources import Piece
from mmdata.prepare_images.encode import EncodedDocument, FoundImage, SampleEncoder
from mmdata.prepare_images.records import Record, read_records
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import Tokenizer

T = TypeVar("T")
ROW_TOKENS = 4096  # of a row of questions or pairs, unless one has more


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
        return tiles_of(self.images, rules)

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
    found = []
    for value, document in read_documents(file, ("question", "answer"), "question", encoder, limit):
        prompt = document.tokens[: int(np.argmax(document.learned))]
        images, layouts = images_of(document, rules)
        found.append(ImageQuestion(value["question"], value["answer"], kind_of(value), images, prompt, layouts))
    return found


def read_documents(
    file: Path, fields: Sequence[str], what: str, encoder: SampleEncoder, limit: int | None
) -> Iterator[tuple[dict[str, Any], EncodedDocument]]:
    """Read records that have some texts, each with the document that it is in a corpus.

    Args:
        file, fields, what, limit: as :func:`read_some` takes them.
        encoder: of the corpus.

    Raises:
        DataError: as :func:`read_some`; or an image of a record cannot be read.
    """
    for record in read_some(file, fields, what, limit):
        document = encoder.encode(record)
        if isinstance(document, Skip):
            raise DataError(f"{document.where}: {document.reason}")
        yield record.value, document


def images_of(document: EncodedDocument, rules: TileRules) -> tuple[tuple[FoundImage, ...], tuple[ImageLayout, ...]]:
    """Return the places of a document's images, in the order of its tokens, and their layouts."""
    images = tuple(image for image, _ in document.images)
    return images, tuple(lay_image(image.header.width, image.header.height, rules) for image in images)


def kind_of(value: dict[str, Any]) -> str:
    """Return the kind that a record is counted by; "all" where it has none."""
    return str(value.get("kind", "all"))


def in_rows(items: Sequence[T], tokens_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Share items out in their order, as many together as a row of ROW_TOKENS takes."""
    row: list[T] = []
    tokens = 0
    for item in items:
        if row and tokens + tokens_of(item) > ROW_TOKENS:
            yield row
            row, tokens = [], 0
        row.append(item)
        tokens += tokens_of(item)
    if row:
        yield row


def read_some(file: Path, fields: Sequence[str], what: str, limit: int | None) -> list[Record]:
    """Read records that have some texts.

    Args:
        file: .jsonl.
        fields: names of the texts.
        what: a record is, for messages.
        limit: how many to keep, spread evenly over the file; None keeps all.

    Raises:
        DataError: the file is not there or has no record, or a record lacks one of the texts.
    """
    needed = " and ".join(filter(None, [", ".join(fields[:-1]), fields[-1]]))
    if not file.is_file():
        raise DataError(f"{file} is not there: give a .jsonl file of {needed}, with images")
    records: list[Record] = []
    for record in read_records(Piece(str(file), "jsonl", 0, file.stat().st_size), None):
        if isinstance(record, Skip):
            raise DataError(f"{record.where}: {record.reason}")
        if not all(isinstance(record.value.get(name), str) for name in fields):
            texts = "all texts" if len(fields) > 1 else "a text"
            raise DataError(f"{record.where} is no {what}: it needs {needed}, {texts}")
        records.append(record)
    if not records:
        raise DataError(f"{file} holds no {what}: give a .jsonl file of {needed}, with images")
    if limit is None or limit >= len(records):
        return records
    return [records[i * len(records) // limit] for i in range(limit)]


def tiles_of(images: Sequence[FoundImage], rules: TileRules) -> np.ndarray:
    """Decode images into their tiles, uint8 [T, 3, S, S]."""
    found = []
    for image in images:
        with open_section(*image.place) as stream:
            found.append(decode_tiles(stream, image.header.width, image.header.height, rules))
    return np.concatenate(found) if found else np.empty((0, 3, rules.tile, rules.tile), np.uint8)
