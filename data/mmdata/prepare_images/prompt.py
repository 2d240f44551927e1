"""`PromptEncoder`: a question with images to the tokens that a model is asked with, the same as in a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmdata.errors import DataError
from mmdata.images.grid import TileRules
from mmdata.images.header import BadImage, reason_of
from mmdata.images.pixels import decode_tiles
from mmdata.images.place import need_pillow, open_section
from mmdata.prepare_images.encode import BadImageFile, FoundImage, SampleEncoder
from mmdata.prepare_images.records import Record
from mmdata.prepare_images.shapes import BadRecord, prompt_parts
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import SpeltSpecialToken, Tokenizer


class EncodedPrompt(NamedTuple):
    """Prompt in tokens.

    Attributes:
        tokens: ids, with the token of images as often as an image has tokens.
        images: each, looked at but not decoded, with the place of its first token.
    """

    tokens: tuple[int, ...]
    images: tuple[tuple[FoundImage, int], ...]


class PromptEncoder:
    """Encoder of prompts with images.

    Args:
        tokenizer: of texts.
        template: of turns, and the placeholder.
        rules: how images become tiles.
        image_id: token of images.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, rules: TileRules, image_id: int) -> None:
        self.template, self.rules = template, rules
        self._encoder = SampleEncoder(tokenizer, template, rules, image_id)

    def encode(self, text: str, images: Sequence[str], folder: Path, turn: bool = False) -> EncodedPrompt:
        """Encode a text in which a placeholder stands for each image; without any, images come first.

        Args:
            text: of the prompt, or what the user says.
            images: paths, from `folder` on.
            folder: see there.
            turn: write the text as the user's turn, and begin the assistant's.

        Raises:
            DataError: an image cannot be used, or there are fewer or more than placeholders; the image is named.
        """
        if images:
            need_pillow()
        try:
            parts = prompt_parts(text, list(images), self.template, turn)
            made = self._encoder.encode_prompt(parts, Record("prompt", {}, str(folder)))
        except BadRecord as error:
            counts = f"{text.count(self.template.placeholder)} placeholders and {len(images)} images"
            raise DataError(f"{error} ({counts})") from None
        except BadImageFile as error:
            raise DataError(f"image {error.name}: {error.reason}") from None
        except SpeltSpecialToken:
            raise DataError("only a special token can say the text") from None
        return EncodedPrompt(tuple(made.tokens[:-1].tolist()), tuple(made.images))

    def tiles(self, prompt: EncodedPrompt) -> np.ndarray:
        """Decode the images of a prompt, uint8 [T, 3, H, W], those of all one after the other.

        Raises:
            DataError: one cannot be decoded; it is named.
        """
        made = []
        for image, _ in prompt.images:
            try:
                with open_section(*image.place) as stream:
                    made.append(decode_tiles(stream, image.header.width, image.header.height, self.rules))
            except (OSError, BadImage) as error:
                raise DataError(f"image {image.place.path}: {reason_of(error, 'unreadable')}") from None
        return np.concatenate(made)
