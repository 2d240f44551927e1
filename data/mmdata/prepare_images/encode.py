"""`SampleEncoder`: a record to tokens, with a placeholder id for each token of an image, and which of them are learned.

Texts that follow one another and are both learned, or both not, are encoded as one text; so a prompt that ends where
the answer begins gives the same tokens here as when a model is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from mmdata.hashing import content_hash
from mmdata.images.grid import TileRules, image_tokens
from mmdata.images.header import BadImage, ImageHeader, read_header, reason_of
from mmdata.images.pixels import decode_tiles
from mmdata.images.place import open_section
from mmdata.prepare.skips import Skip
from mmdata.prepare_images.records import FilePlace, Record
from mmdata.prepare_images.shapes import BadRecord, sample_of
from mmdata.prepare_images.template import ImageRef, Part, Template, Text
from mmdata.tokenizer import SpeltSpecialToken, Tokenizer

_HEAD = 1 << 16  # bytes of an image that it is known by, with its size: a duplicate elsewhere is the same image


@dataclass(frozen=True)
class FoundImage:
    """An image that a record shows, looked at: where it is, its header, tokens, and a hash of its first bytes."""

    place: FilePlace
    header: ImageHeader
    tokens: int
    known_by: int


@dataclass
class EncodedDocument:
    """A document in tokens.

    Attributes:
        tokens: int32[n], an end-of-document token last (of each answer of a preference pair).
        learned: bool[n].
        images: each with the place of its first token.
        half: where the rejected answer's tokens begin; 0 in a document that is no pair.
        text_bytes: UTF-8 bytes of its text.
        known_by: 64-bit hash; documents that begin with the same image have the same, so that the choice of those held
            out keeps them together.
    """

    tokens: np.ndarray
    learned: np.ndarray
    images: list[tuple[FoundImage, int]] = field(default_factory=list)
    half: int = 0
    text_bytes: int = 0
    known_by: int = 0


class SampleEncoder:
    """Encoder of records.

    Args:
        tokenizer: of texts.
        template: of conversations.
        rules: how images become tiles.
        image_id: token of images.
        check_pixels: decode every image, to find the broken ones now.
        caption_tokens: most tokens of a caption's text, which is cut there; None cuts none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        rules: TileRules,
        image_id: int,
        check_pixels: bool = False,
        caption_tokens: int | None = None,
    ) -> None:
        self._tokenizer, self._template, self._rules, self._image_id = tokenizer, template, rules, image_id
        self._check_pixels, self._caption_tokens = check_pixels, caption_tokens
        names = sorted(tokenizer.special_tokens, key=lambda name: (-len(name), name))
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._seen: dict[FilePlace, FoundImage] = {}  # of the last image: records that share one follow one another

    def encode(self, record: Record) -> EncodedDocument | Skip:
        """The document that a record makes, or why it makes none."""
        try:
            sample = sample_of(record.value, self._template)
            document = self._encode_parts(sample.parts, record, self._caption_tokens if sample.is_caption else None)
            if sample.rejected is not None:
                document = _joined(document, self._encode_parts(sample.rejected, record))
        except BadRecord as error:
            return Skip(str(error), record.where)
        except SpeltSpecialToken:
            return Skip("only a special token can say it", record.where)
        except UnicodeEncodeError:
            return Skip("not UTF-8", record.where)
        except BadImageFile as error:
            return Skip(f"image: {error.reason}", f"{record.where} {error.name}")
        if not document.learned.any():
            return Skip("nothing to learn", record.where)
        return document

    def encode_prompt(self, parts: Sequence[Part], record: Record) -> EncodedDocument:
        """The document of parts of which nothing need be learned: what a model is asked, and an end.

        Raises:
            BadRecord, BadImageFile: an image is not in the record, or cannot be used.
            SpeltSpecialToken: only a special token can say a text.
        """
        return self._encode_parts(parts, record)

    def _encode_parts(self, parts: Sequence[Part], record: Record, most: int | None = None) -> EncodedDocument:
        """Document of some parts, with at most so many tokens of text before its end."""
        tokens: list[np.ndarray] = []
        learned: list[np.ndarray] = []
        images: list[tuple[FoundImage, int]] = []
        size, last = 0, False

        def put(ids: np.ndarray, label: bool) -> None:
            nonlocal size
            tokens.append(ids)
            learned.append(np.full(len(ids), label))
            size += len(ids)

        for run in _runs(parts):
            if isinstance(run, ImageRef):
                image = self._find(run.name, record)
                images.append((image, size))
                put(np.full(image.tokens, self._image_id, dtype=np.int32), False)
            else:
                last = run[0].learned
                ids = self._ids(run)[:most]
                most = None if most is None else most - len(ids)
                put(np.array(ids, dtype=np.int32), last)
        put(np.array([self._tokenizer.eod_id], dtype=np.int32), last)
        flat = np.concatenate(tokens)
        text = sum(len(part.text.encode("utf-8")) for part in parts if isinstance(part, Text))
        known_by = images[0][0].known_by if images else content_hash(flat.tobytes())
        return EncodedDocument(flat, np.concatenate(learned), images, 0, text, known_by)

    def _ids(self, run: Sequence[Text]) -> list[int]:
        """Ids of texts that are encoded as one, cut only at special tokens that a template names."""
        ids: list[int] = []
        text = ""
        for part in run:
            at = 0
            for found in self._special.finditer(part.text) if part.template else ():
                ids += self._tokenizer.encode(text + part.text[at : found.start()])
                ids.append(self._tokenizer.special_tokens[found[0]])
                text, at = "", found.end()
            text += part.text[at:]
        return ids + self._tokenizer.encode(text) if text else ids

    def _find(self, name: str, record: Record) -> FoundImage:
        """Look at an image; the last one is remembered."""
        place = place_of(name, record)
        if place not in self._seen:
            try:
                found = self._look(place)
            except (OSError, BadImage) as error:
                raise BadImageFile(name, reason_of(error, "unreadable")) from None
            self._seen = {place: found}
        return self._seen[place]

    def _look(self, place: FilePlace) -> FoundImage:
        with open_section(*place) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            digest = blake2b(size.to_bytes(8, "little") + stream.read(_HEAD), digest_size=8).digest()
            stream.seek(0)
            header = read_header(stream)
            if self._check_pixels:
                stream.seek(0)
                decode_tiles(stream, header.width, header.height, self._rules)
        tokens = image_tokens(header.width, header.height, self._rules)
        return FoundImage(place._replace(size=size), header, tokens, int.from_bytes(digest, "little"))


class BadImageFile(Exception):
    """An image of a record that cannot be used: its `name` and the `reason`, of few."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


def place_of(name: str, record: Record) -> FilePlace:
    """File that a record's image is in: beside it, or among the members of its sample.

    Raises:
        BadRecord: the sample has no such member.
    """
    if record.folder is not None:
        return FilePlace(os.path.abspath(os.path.join(record.folder, name)))
    fits = [member for member in record.members if name == member or name.endswith(f".{member}")]
    if not fits:
        raise BadRecord("image is not in the sample")
    return record.members[max(fits, key=len)]


def _runs(parts: Sequence[Part]) -> Iterator[ImageRef | list[Text]]:
    """Images, and between them texts that are learned alike, together."""
    run: list[Text] = []
    for part in parts:
        if run and (isinstance(part, ImageRef) or part.learned != run[0].learned):
            yield run
            run = []
        if isinstance(part, ImageRef):
            yield part
        elif part.text:
            run.append(part)
    if run:
        yield run


def _joined(chosen: EncodedDocument, rejected: EncodedDocument) -> EncodedDocument:
    """A preference pair: the chosen answer's document, then the rejected one's."""
    half = len(chosen.tokens)
    return EncodedDocument(
        np.concatenate([chosen.tokens, rejected.tokens]),
        np.concatenate([chosen.learned, rejected.learned]),
        chosen.images + [(image, half + first) for image, first in rejected.images],
        half,
        chosen.text_bytes + rejected.text_bytes,
        chosen.known_by,
    )
