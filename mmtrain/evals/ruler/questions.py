"""RULER's question answering: the documents that answer a question, among others, from SQuAD's or HotpotQA's own file.

RULER downloads both; here the user has the file (`--squad-file`, `--hotpotqa-file`), or there is no such task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.errors import ConfigError
from mmtrain.evals.files.records import read_json
from mmtrain.evals.ruler.prompt import Kit, Prompt, check_room

ANSWER_TOKENS = 32
_TOLD = "Answer the question from the documents. Give the answer alone.\n"


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        text: what is asked.
        answers: any of which is right.
        documents: numbers of those that answer it.
        near: numbers of others that are about the same: they are the first to surround it.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions and all documents of a file, and the option that named it."""

    questions: list[Asked]
    documents: list[str]
    option: str = ""


def answer_from_documents(
    kit: Kit, length: int, depth: float, rng: np.random.Generator, questions: QuestionSet
) -> Prompt:
    """Make a prompt: documents in an order that is drawn, as many as there is room for, and a question.

    The last document that does not answer it is cut where the room ends; documents repeat where the file has too few.
    """
    asked = questions.questions[int(rng.integers(len(questions.questions)))]
    begin = kit.ids(f"{_TOLD}\n")
    end = kit.ids(f"\n\n{_TOLD}Question: {asked.text.strip()}\n", "Answer:")
    max_tokens = kit.answer_room(ANSWER_TOKENS, [max(asked.answers, key=len)])
    needed = [_document(kit, questions.documents[i]) for i in asked.documents]
    room = check_room(length - len(begin) - len(end) - max_tokens - sum(map(len, needed)), length, least=0)
    kept = set(asked.documents)
    near = [i for i in rng.permutation(np.array(asked.near, dtype=np.int64)).tolist() if i not in kept]
    kept |= set(near)
    others = near + [i for i in rng.permutation(len(questions.documents)).tolist() if i not in kept]
    around, taken, laps = [], 0, 0
    while taken < room:
        if not others:
            raise ConfigError(questions.option, len(kept), "documents are all there are: none surrounds the answer's",
                              "give the whole file")  # fmt: skip
        for i in others:
            around.append(_document(kit, questions.documents[i])[: room - taken])
            taken += len(around[-1])
            if taken >= room:
                break
        laps += 1
    parts = [*needed, *around]
    order = rng.permutation(len(parts)).tolist()
    body = np.concatenate([parts[i] for i in order])
    return Prompt(np.concatenate([begin, body, end]), asked.answers, max_tokens, None, float(laps), one_suffices=True)


def _document(kit: Kit, text: str) -> np.ndarray:
    return kit.ids(f"\nDocument:\n{text.strip()}\n")


def read_squad(path: Path, option: str) -> QuestionSet:
    """Read SQuAD's JSON (version 1 or 2; questions without an answer are passed over).

    Raises:
        ConfigError: the file cannot be read, or is not SQuAD's.
    """
    return _read(path, option, "SQuAD", _squad)


def read_hotpotqa(path: Path, option: str) -> QuestionSet:
    """Read HotpotQA's JSON with its distracting paragraphs.

    Raises:
        ConfigError: the file cannot be read, or is not HotpotQA's.
    """
    return _read(path, option, "HotpotQA", _hotpotqa)


def _read(path: Path, option: str, name: str, taken_apart: Callable[[Any], QuestionSet]) -> QuestionSet:
    made = read_json(path, option)
    try:
        found = taken_apart(made)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(option, path, f"is not laid out as {name}'s file", f"give {name}'s JSON") from None
    if not found.questions:
        raise ConfigError(option, path, "holds no question with an answer", f"give {name}'s JSON")
    return replace(found, option=option)


def _squad(made: Any) -> QuestionSet:
    documents: dict[str, int] = {}
    questions = []
    for article in made["data"]:
        own = [documents.setdefault(_text(one["context"]), len(documents)) for one in article["paragraphs"]]
        for paragraph, number in zip(article["paragraphs"], own, strict=True):
            for one in paragraph["qas"]:
                if answers := _answers(answer["text"] for answer in one["answers"]):
                    questions.append(Asked(_text(one["question"]), answers, (number,), tuple(own)))
    return QuestionSet(questions, list(documents))


def _hotpotqa(made: Any) -> QuestionSet:
    documents: dict[str, int] = {}
    questions = []
    for one in made:
        texts = (f"{title}\n{''.join(sentences)}" for title, sentences in one["context"])
        own = tuple(dict.fromkeys(documents.setdefault(text, len(documents)) for text in texts))
        if answers := _answers([one["answer"]]):
            questions.append(Asked(_text(one["question"]), answers, own))
    return QuestionSet(questions, list(documents))


def _answers(given: Iterable[Any]) -> tuple[str, ...]:
    """Right answers, each once. One without a character would be found in whatever a model says."""
    return tuple(dict.fromkeys(answer for answer in map(_text, given) if answer.strip()))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("is no text")
    return value
