"""Whether a contrastive model finds the caption of an image among others: zero-shot classification, as CLIP's.

Legend: N images, P captions, E width of the space that they share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdata.errors import DataError
from mmdata.images.grid import TileRules
from mmdata.prepare.skips import Skip
from mmdata.prepare_images.encode import EncodedDocument, FoundImage, SampleEncoder
from mmdata.prepare_images.records import Record
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import Tokenizer
from mmtrain.errors import ConfigError
from mmtrain.model.model import HybridLM
from mmtrain.runs.ask.questions import in_rows, kind_of, read_some, tiles_of
from mmtrain.runs.ask.scores import ScoreLine
from mmtrain.vision.contrastive_model import ContrastiveModel
from mmtrain.vision.images import tile_rules

_TILES = 64  # looked at together


@dataclass(frozen=True)
class CaptionChoice:
    """An image and the captions that it may have.

    Attributes:
        kind: that it is counted by; "all" where the record has none.
        image: the place of its file.
        choices: captions, by their numbers among all of a file, two or more.
        right: the number of its own.
    """

    kind: str
    image: FoundImage
    choices: tuple[int, ...]
    right: int


@dataclass(frozen=True)
class CaptionFile:
    """Images and captions of a file.

    Attributes:
        images: in its order.
        captions: all that it names, each once, in tokens, the end of a document last.
    """

    images: tuple[CaptionChoice, ...]
    captions: tuple[list[int], ...]


def read_captions(
    file: Path, tokenizer: Tokenizer, rules: TileRules, image_id: int, limit: int | None = None
) -> CaptionFile:
    """Read records of `image`, `caption`, and maybe `choices` and `kind`.

    The choices are captions, of which the record's own is one; a record without them has all captions of the file.

    Args:
        file: .jsonl, with images beside it.
        tokenizer: of the model.
        rules: by which an image is one tile.
        image_id: its token for images.
        limit: how many images to keep, spread evenly over the file; None keeps all.

    Raises:
        DataError: the file is not there, a record is no image with a caption among two or more, or an image cannot be
            read.
    """
    encoder = SampleEncoder(tokenizer, Template(), rules, image_id)
    numbers: dict[str, int] = {}
    captions: list[list[int]] = []

    def number_of(caption: str, record: Record) -> int:
        if caption not in numbers:
            numbers[caption] = len(captions)
            document = _whole(encoder.encode(Record(record.where, {"caption": caption}, record.folder)))
            captions.append(document.tokens.tolist())
        return numbers[caption]

    records = read_some(file, ("caption",), "caption", None)
    own = [number_of(record.value["caption"], record) for record in records]
    everyone = tuple(sorted(set(own)))
    kept = range(len(records)) if limit is None else sorted({i * len(records) // limit for i in range(limit)})
    found = []
    for i in kept:
        value, where = records[i].value, records[i].where
        document = _whole(encoder.encode(records[i]))
        if len(document.images) != 1:
            raise DataError(f"{where} has {len(document.images)} images: one is to find its caption")
        choices = everyone
        if "choices" in value:
            choices = tuple(dict.fromkeys(number_of(one, records[i]) for one in _texts(value["choices"], where)))
        if own[i] not in choices or len(choices) < 2:
            raise DataError(f"{where} has no two captions to choose from, its own among them: give it choices, or the "
                            "file more captions")  # fmt: skip
        found.append(CaptionChoice(kind_of(value), document.images[0][0], choices, own[i]))
    return CaptionFile(tuple(found), tuple(captions))


def chosen_captions(model: ContrastiveModel, rules: TileRules, read: CaptionFile) -> list[int]:
    """Return the caption nearest to each image, of its choices; of equally near ones the first.

    Args:
        model: whole, on one device, in evaluation mode.
        rules: by which an image is one tile.
        read: the images and captions.
    """
    with torch.no_grad():
        image_NE = torch.cat(list(_image_vectors(model, rules, [one.image for one in read.images])))
        caption_PE = torch.cat(list(_caption_vectors(model, read.captions)))
    cosine_NP = image_NE @ caption_PE.t()
    found = []
    for cosine_P, one in zip(cosine_NP, read.images, strict=True):
        found.append(one.choices[int(cosine_P[list(one.choices)].argmax())])
    return found


def caption_lines(model: HybridLM, tokenizer: Tokenizer, title: str, file: Path, limit: int | None) -> list[ScoreLine]:
    """Return, for each kind of image, how many found their own caption, beside what chance finds.

    Args:
        model: whole, on one device, in evaluation mode.
        tokenizer: that it was trained with.
        title: of the run, for messages.
        file: as :func:`read_captions` reads it.
        limit: how many images; None takes all.

    Raises:
        ConfigError: the model was not trained by a contrastive loss.
        DataError: as :func:`read_captions` raises it.
    """
    if not isinstance(model, ContrastiveModel):
        raise ConfigError("--captions", file, f"images of {title} know no captions: its model has no contrastive loss",
                          "give a run with model.vision.contrastive, as of stage=vit")  # fmt: skip
    vision = model.config.vision
    assert vision is not None
    whole = tile_rules(vision)
    rules = TileRules(whole.tile, whole.patch, (), whole.class_token)  # an image is its thumbnail, as in training
    read = read_captions(file, tokenizer, rules, vision.image_token, limit)
    right: dict[str, list[bool]] = {}
    chance: dict[str, float] = {}
    for one, chosen in zip(read.images, chosen_captions(model, rules, read), strict=True):
        right.setdefault(one.kind, []).append(chosen == one.right)
        chance[one.kind] = chance.get(one.kind, 0.0) + 1 / len(one.choices)
    return [
        ScoreLine(kind, sum(found) / len(found), len(found), chance[kind] / len(found), "chance")
        for kind, found in sorted(right.items())
    ]


def _image_vectors(model: ContrastiveModel, rules: TileRules, images: Sequence[FoundImage]) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for first in range(0, len(images), _TILES):
        yield model.embed_images(torch.from_numpy(tiles_of(images[first : first + _TILES], rules)).to(device))


def _caption_vectors(model: ContrastiveModel, captions: Sequence[list[int]]) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for row in in_rows(captions, len):
        tokens_C = torch.tensor([token for caption in row for token in caption], device=device)
        yield model.embed_captions(tokens_C, [len(caption) for caption in row])


def _whole(document: EncodedDocument | Skip) -> EncodedDocument:
    if isinstance(document, Skip):
        raise DataError(f"{document.where}: {document.reason}")
    return document


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise DataError(f"{where} has choices that are no list of texts")
    return value
