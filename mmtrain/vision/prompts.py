"""Prompts with images for a trained model: the same tokens and tiles as in its training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmdata.corpus.manifest import read_manifest
from mmdata.errors import DataError
from mmdata.images.grid import TileRules, lay_image
from mmdata.prepare_images.prompt import EncodedPrompt, PromptEncoder
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import Tokenizer
from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.vision.images import tile_rules
from mmtrain.vision.prompt_images import PromptImages


@dataclass(frozen=True)
class SeenPrompt:
    """Prompt whose images are known by their headers: its tokens are certain, its pixels wait in their files.

    Attributes:
        tokens: ids, one at the least.
        prompts: that made it.
        encoded: see there.
        option: that it came from, for messages.
    """

    tokens: tuple[int, ...]
    prompts: ImagePrompts
    encoded: EncodedPrompt
    option: str

    @property
    def files(self) -> list[tuple[str, int]]:
        """Path of each image, and a hash of its size and first bytes."""
        return [(image.place.path, image.known_by) for image, _ in self.encoded.images]

    def images(self) -> PromptImages | None:
        """Decode the images; None where there are none.

        Raises:
            ConfigError: one cannot be decoded; it is named.
        """
        found = self.encoded.images
        if not found:
            return None
        encoder = self.prompts.encoder
        layouts = tuple(lay_image(image.header.width, image.header.height, encoder.rules) for image, _ in found)
        try:
            tiles_N3SS = encoder.tiles(self.encoded)
        except DataError as error:
            raise ConfigError(self.option, found[0][0].place.path, str(error), "give files of whole images") from None
        return PromptImages(tiles_N3SS, layouts, tuple(first for _, first in found))


class ImagePrompts:
    """Maker of prompts.

    Args:
        tokenizer: of the model.
        model: with eyes, or of text alone, which takes no image.
        template: of turns; None: as `launch/prepare_images.py` writes them unless told otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig, template: Template | None = None) -> None:
        self.template = template or Template()
        self._vision, self._eod_id = model.vision, tokenizer.eod_id
        rules = TileRules() if model.vision is None else tile_rules(model.vision)
        image_id = -1 if model.vision is None else model.vision.image_token
        self.encoder = PromptEncoder(tokenizer, self.template, rules, image_id)

    @property
    def answer_end(self) -> str:
        """Text that ends an answer: what the template puts after it, and what begins the next turn if that is a space
        or a line's end alone, which may be part of an answer.
        """
        after = self.template.assistant.partition("{}")[2]
        return after if after.strip() else after + self.template.user.partition("{}")[0].rstrip()

    def asks_for_images(self, text: str) -> bool:
        """Tell whether a text has a placeholder that a model with eyes wants an image for."""
        return self._vision is not None and self.template.placeholder in text

    def answer_of(self, text: str) -> str:
        """Return the answer in a continuation: what comes before the text that the template puts after one."""
        after = self.template.assistant.partition("{}")[2]
        text = text.lstrip()
        return (text.partition(after)[0] if after else text).strip()

    def prompt(
        self, text: str, images: Sequence[str], option: str, folder: Path | None = None, turn: bool = False
    ) -> SeenPrompt:
        """Encode a prompt: placeholders in the text take the images in turn; without any, images come first.

        Args:
            text: to continue, or the user's turn; an empty one without images starts a document.
            images: paths.
            option: that named them, for messages.
            folder: that relative paths are taken from; None is the current one.
            turn: write the text as the user's turn, and begin the assistant's.

        Raises:
            ConfigError: the model has no eyes, an image cannot be used, or images and placeholders are not as many.
        """
        if images and self._vision is None:
            raise ConfigError(
                option, images[0], "the model has no eyes", "leave images out, or give another checkpoint"
            )
        try:
            made = self.encoder.encode(text, images, folder or Path.cwd(), turn)
        except DataError as error:
            value = images[0] if images else repr(text)[:60]
            fix = f"give an image for each {self.template.placeholder} of the prompt, or a file that is whole"
            raise ConfigError(option, value, str(error), fix) from None
        return SeenPrompt(made.tokens or (self._eod_id,), self, made, option)


def template_of_run(meta: Mapping[str, Any]) -> Template | None:
    """Return how the corpora of a run write turns: that of the first with images; None where none is found.

    Args:
        meta: the record of a checkpoint.
    """
    corpora = meta.get("corpora")
    sources = corpora.get("sources") if isinstance(corpora, Mapping) else None
    for source in sources if isinstance(sources, list) else ():
        for name in ("resolved", "path"):
            path = source.get(name) if isinstance(source, Mapping) else None
            if path and (found := _template_at(Path(path))):
                return found
    return None


def with_turns(template: Template | None, user: str | None, assistant: str | None) -> Template:
    """Return a template with the texts of turns that a command line gives in place of its own.

    Raises:
        ConfigError: a text does not say where what is said goes.
    """
    given = {name: text for name, text in (("user", user), ("assistant", assistant)) if text is not None}
    for name, text in given.items():
        if text.count("{}") != 1:
            raise ConfigError(f"--{name}", repr(text), "needs {} once, for what is said", r"for example $'User: {}\n'")
    return replace(template or Template(), **given)


def _template_at(folder: Path) -> Template | None:
    try:
        facts = read_manifest(folder).images
        return None if facts is None else Template(**facts["template"])
    except (DataError, KeyError, TypeError):
        return None
