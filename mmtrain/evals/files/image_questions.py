"""Questions on images out of a JSON lines file. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.evals.files.read_choices import answer_number
from mmtrain.evals.files.records import damaged, read_jsonl, text_of

OTHER = "other"


@dataclass(frozen=True)
class ImageQuestion:
    """A question on images.

    Attributes:
        name: its place in the file.
        question: what is asked; a placeholder stands for each image, or none does.
        images: paths from the file's folder.
        answers: right ones, of which any will do; of a question with choices the right choice.
        kind: by which accuracies are told apart.
        choices: texts to choose from; empty: the answer is free.
        right: number of the right choice.
    """

    name: str
    question: str
    images: tuple[str, ...]
    answers: tuple[str, ...]
    kind: str
    choices: tuple[str, ...] = ()
    right: int = 0


def read_image_questions(path: Path, option: str) -> list[ImageQuestion]:
    """Read a file with a line of JSON for each question.

    "question"; "answer", or "answers", a list of which any is right; "image" or "images", paths from the file's folder;
    "kind", if there are several; and "choices", of which "answer" is one, by number from 0 on, by letter, or as text.

    Raises:
        ConfigError: the file cannot be read or holds no question, or a line is damaged; it is named.
    """
    found = [_question(record, path, place, option) for place, record in read_jsonl(path, option)]
    if not found:
        raise ConfigError(option, path, "holds no question", "give a file with a JSON object in each line")
    return found


def _question(record: Mapping[str, Any], path: Path, place: str, option: str) -> ImageQuestion:
    question = text_of(record, "question", option, path, place)
    images = record.get("images", record.get("image"))
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images or not all(isinstance(one, str) and one for one in images):
        raise damaged(option, path, place, 'has no "image", nor a list "images" of paths')
    for image in images:
        if not (path.parent / image).is_file():
            raise damaged(option, path, place, f"has the image {image!r}, and no such file is there")
    kind = record.get("kind", OTHER)
    if not isinstance(kind, str) or not kind:
        raise damaged(option, path, place, 'has a "kind" that is no text')
    choices = record.get("choices")
    if choices is not None:
        right = _right_choice(record.get("answer"), choices)
        if right is None:
            raise damaged(
                option, path, place, 'has no list "choices" of two texts or more with its "answer" among them'
            )
        return ImageQuestion(place, question, tuple(images), (choices[right],), kind, tuple(choices), right)
    answers = record.get("answers", record.get("answer"))
    answers = [answers] if isinstance(answers, str | int | float) and not isinstance(answers, bool) else answers
    if not isinstance(answers, list) or not answers or not all(_is_answer(one) for one in answers):
        raise damaged(option, path, place, 'has no "answer", nor a list "answers" of texts')
    return ImageQuestion(place, question, tuple(images), tuple(str(one).strip() for one in answers), kind)


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and bool(str(value).strip())


def _right_choice(answer: Any, choices: Any) -> int | None:
    if not isinstance(choices, list) or len(choices) < 2:
        return None
    return answer_number(answer, choices) if all(isinstance(one, str) and one.strip() for one in choices) else None
