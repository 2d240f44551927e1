"""From a record to a sample: texts, each learned or not, and images, in their order. One function a shape of record.

| shape | fields |
|---|---|
| conversation | `conversations` (`from`, `value`) or `messages` (`role`, `content`), `image` or `images` |
| question | `question`, `answer`, `image(s)` |
| preference | `prompt`, `chosen`, `rejected`, `image(s)` |
| parts | `parts`: `{"text": ...}` (`"learn": false` leaves it out of the loss) or `{"image": ...}` |
| lists | `texts` and `images`, of one length, `null` in one where the other holds something |
| caption | `caption`, `image(s)` |
| text | `text` with a placeholder for each of `images`, or without images |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from mmdata.prepare_images.template import ImageRef, Part, Sample, Template, Text

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRecord(Exception):
    """A record that makes no sample; its text is the reason, one of few."""


def sample_of(record: dict[str, Any], template: Template) -> Sample:
    """Sample that a record spells.

    Raises:
        BadRecord: it is of no shape that is known, a placeholder lacks an image, or an image a placeholder.
    """
    for fields, shape in _SHAPES:
        if all(field in record for field in fields):
            return shape(record, template)
    raise BadRecord("no shape of record that is known")


def prompt_parts(text: str, images: list[str], template: Template, turn: bool) -> tuple[Part, ...]:
    """Parts of what a model is asked, with its images.

    Args:
        text: with a placeholder for each image, or without any: then images come first.
        images: names of them.
        template: of turns.
        turn: the text is the user's turn, and the assistant's begins after it, as in a question of a corpus.

    Raises:
        BadRecord: a placeholder lacks an image, or an image a placeholder.
    """
    texts: list[Text | str] = [text]
    if turn:
        texts = [*template.turn("user", text), template.turn("assistant", "")[0]]
    return _parts(texts, {"images": images}, template)


def _conversation(record: dict[str, Any], template: Template) -> Sample:
    turns = record["conversations"] if "conversations" in record else record["messages"]
    return Sample(_parts(_turns(turns, template, _images(record)), record, template, needed=True))


def _question(record: dict[str, Any], template: Template) -> Sample:
    texts = [*template.turn("user", _text(record["question"])), *template.turn("assistant", _text(record["answer"]))]
    return Sample(_parts(texts, record, template))


def _preference(record: dict[str, Any], template: Template) -> Sample:
    images = _images(record)
    prompt = record["prompt"]
    asked = template.turn("user", prompt) if isinstance(prompt, str) else list(_turns(prompt, template, images))

    def with_answer(answer: Any) -> tuple[Part, ...]:
        if not isinstance(answer, str):
            turns = list(_turns(answer, template, images))
            return _parts([*asked, *turns], record, template)
        return _parts([*asked, *template.turn("assistant", answer)], record, template)

    if record["chosen"] == record["rejected"]:
        raise BadRecord("chosen and rejected are the same")
    return Sample(with_answer(record["chosen"]), with_answer(record["rejected"]))


def _listed_parts(record: dict[str, Any], template: Template) -> Sample:
    parts: list[Part] = []
    for part in _list(record["parts"]):
        if isinstance(part, str):
            parts.append(Text(part, True))
        elif isinstance(part, dict) and isinstance(part.get("image"), str):
            parts.append(ImageRef(part["image"]))
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            parts.append(Text(part["text"], part.get("learn", True) is not False))
        else:
            raise BadRecord("part is neither text nor image")
    return Sample(tuple(parts))


def _parallel_lists(record: dict[str, Any], template: Template) -> Sample:
    texts, images = _list(record["texts"]), _list(record["images"])
    if len(texts) != len(images):
        raise BadRecord("texts and images of different lengths")
    parts: list[Part] = []
    for text, image in zip(texts, images, strict=True):
        if (text is None) == (image is None):
            raise BadRecord("text and image in one place, or neither")
        parts.append(Text(_text(text), True) if image is None else ImageRef(_name(image)))
    return Sample(tuple(parts))


def _caption(record: dict[str, Any], template: Template) -> Sample:
    return Sample(_parts([Text(_text(record["caption"]), True)], record, template), is_caption=True)


def _plain(record: dict[str, Any], template: Template) -> Sample:
    found = _cut(_text(record["text"]), True, iter(_images(record)), template)
    return Sample(tuple(found))


_SHAPES: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], Template], Sample]], ...] = (
    (("conversations",), _conversation),
    (("messages",), _conversation),
    (("prompt", "chosen", "rejected"), _preference),
    (("question", "answer"), _question),
    (("parts",), _listed_parts),
    (("texts", "images"), _parallel_lists),
    (("caption",), _caption),
    (("text",), _plain),
)


def _turns(turns: Any, template: Template, images: list[str]) -> Iterator[Text | str | ImageRef]:
    """Texts and images of turns; plain strs are still to be cut at placeholders."""
    for turn in _list(turns):
        if not isinstance(turn, dict):
            raise BadRecord("turn is not an object")
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        if role is None:
            raise BadRecord("turn of an unknown role")
        said = turn.get("value", turn.get("content"))
        if isinstance(said, str):
            yield from template.turn(role, said)
            continue
        before, nothing, after = template.turn(role, "")
        yield before  # type: ignore[misc] (the first of a turn is a Text)
        if role == "assistant":
            yield nothing  # type: ignore[misc] (but for the spaces that it begins with)
        for part in _list(said):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                yield Text(_text(part.get("text")), role == "assistant")
            elif kind == "image":
                named = part.get("image", part.get("path"))
                yield ImageRef(_name(named)) if named is not None else template.placeholder
            else:
                raise BadRecord("part is neither text nor image")
        yield after  # type: ignore[misc]


def _parts(texts: Any, record: dict[str, Any], template: Template, needed: bool = False) -> tuple[Part, ...]:
    """Parts with the record's images put in.

    Each placeholder takes the next image. A record without any has its images first, unless they are `needed`.
    """
    images, texts = _images(record), list(texts)
    marks = sum(text.count(template.placeholder) for text in texts if isinstance(text, str))
    if not needed and marks == 0 and images:
        first = [ImageRef(name) for name in images]
        place = 1 if isinstance(texts[0], Text) and texts[0].template else 0  # within the user's turn
        return (*_as_parts(texts[:place]), *first, *_as_parts(texts[place:]))
    left = iter(images)
    parts: list[Part] = []
    for text in texts:
        parts += [*_cut(text, False, left, template, whole=False)] if isinstance(text, str) else [text]
    if next(left, None) is not None:
        raise BadRecord("image without a placeholder")
    return tuple(parts)


def _as_parts(texts: list[Any]) -> list[Part]:
    return [Text(text, False) if isinstance(text, str) else text for text in texts]


def _cut(text: str, learned: bool, left: Iterator[str], template: Template, whole: bool = True) -> Iterator[Part]:
    """Text cut at placeholders, each of which takes the next image; with `whole`, all images must be taken."""
    pieces = re.split(re.escape(template.placeholder), text)
    for i, piece in enumerate(pieces):
        if i:
            name = next(left, None)
            if name is None:
                raise BadRecord("placeholder without an image")
            yield ImageRef(name)
        if piece:
            yield Text(piece, learned)
    if whole and next(left, None) is not None:
        raise BadRecord("image without a placeholder")


def _images(record: dict[str, Any]) -> list[str]:
    """Names of a record's images, of `image` or `images`, each of which may be one or a list."""
    given = record.get("images", record.get("image"))
    if given is None:
        return []
    return [_name(name) for name in (given if isinstance(given, list) else [given])]


def _name(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("path", value.get("image"))
    if not isinstance(value, str) or not value:
        raise BadRecord("image is not a path")
    if re.match(r"[a-z]+://|data:", value):
        raise BadRecord("image is a URL")
    if "\0" in value:
        raise BadRecord("image is not a path")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRecord("text is not a string")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadRecord("list expected")
    return value
