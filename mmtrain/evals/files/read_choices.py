"""Questions out of files: plain JSON lines, and LongBench v2's JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.evals.files.choices import Question
from mmtrain.evals.files.records import damaged, read_json, read_jsonl, text_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIFFICULTIES, SIZES = ("easy", "hard"), ("short", "medium", "long")


def read_choices(path: Path, option: str) -> list[Question]:
    """Read a file with a line of JSON for each question: "context", "question" or both, "choices" and "answer".

    "answer" is the number of the right choice from 0 on, its letter, or its text.

    Raises:
        ConfigError: the file cannot be read or holds no question, or a line is damaged; it is named.
    """
    found = []
    for place, record in read_jsonl(path, option):
        given = [record[name] for name in ("context", "question") if record.get(name)]
        if not given or not all(isinstance(text, str) for text in given):
            raise damaged(option, path, place, 'has no text "question" or "context"')
        choices = record.get("choices")
        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(one, str) and one.strip() for one in choices)
        ):
            raise damaged(option, path, place, 'has no list "choices" of two texts or more')
        answer = answer_number(record.get("answer"), choices)
        if answer is None:
            raise damaged(option, path, place, f'has no "answer" that is one of its {len(choices)} choices')
        found.append(Question(place, "\n".join(given), tuple(f" {choice}" for choice in choices), answer))
    if not found:
        raise ConfigError(option, path, "holds no question", "give a file with a JSON object in each line")
    return found


def answer_number(given: Any, choices: list[str]) -> int | None:
    """Number of the right choice; None if there is none."""
    if isinstance(given, int) and not isinstance(given, bool):
        return given if 0 <= given < len(choices) else None
    if given in choices:
        return choices.index(given)
    if isinstance(given, str) and len(given) == 1 and given in LETTERS[: len(choices)]:
        return LETTERS.index(given)
    return None


def read_longbench(path: Path, option: str) -> list[Question]:
    """Read LongBench v2's `data.json`, a list of objects, or the same as JSON lines.

    A model is asked for the letter, and its four letters are scored: nothing is generated, and no context is cut.

    Raises:
        ConfigError: the file cannot be read or holds no question, or a record is damaged; it is named.
    """
    found = []
    for place, record in _records(path, option):
        text = {name: text_of(record, name, option, path, place)
                for name in ("context", "question", *(f"choice_{letter}" for letter in "ABCD"))}  # fmt: skip
        answer = record.get("answer")
        if answer not in tuple("ABCD"):
            raise damaged(option, path, place, 'has no "answer" A, B, C or D')
        groups = tuple(str(record[name]) for name, known in (("difficulty", DIFFICULTIES), ("length", SIZES))
                       if record.get(name) in known)  # fmt: skip
        listed = "\n".join(f"({letter}) {text[f'choice_{letter}'].strip()}" for letter in "ABCD")
        context = (f"{text['context'].strip()}\n\nQuestion about the text above: {text['question'].strip()}\n{listed}\n"
                   "The right answer is (")  # fmt: skip
        name = str(record.get("_id", place))
        found.append(Question(name, context, tuple("ABCD"), "ABCD".index(answer), groups))
    if not found:
        raise ConfigError(option, path, "holds no question", "give LongBench v2's data.json")
    return found


def _records(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".jsonl":
        yield from read_jsonl(path, option)
        return
    made = read_json(path, option)
    if not isinstance(made, list):
        raise ConfigError(option, path, "is no list of questions", "give LongBench v2's data.json")
    for number, record in enumerate(made, 1):
        if not isinstance(record, dict):
            raise damaged(option, path, f"record {number}", "is no JSON object")
        yield f"record {number}", record
