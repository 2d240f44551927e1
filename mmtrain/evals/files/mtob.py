"""MTOB, translation between English and Kalamang from one grammar book (Tanzer et al. 2023), from its own files.

MiniMax-01 reports it without a book, with half of one (about 81K tokens) and with a whole one (about 133K); which of
MTOB's files these are it does not say, so the file is chosen by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mmtrain.errors import ConfigError
from mmtrain.evals.files.records import damaged, read_json, read_text, text_of

BOOKS = {"medium": "grammar_book_for_claude_medium.txt", "long": "grammar_book_for_claude_long.txt",
         "full": "grammar_book.txt"}  # fmt: skip
DIRECTIONS = {"mtob_ek": ("English", "Kalamang"), "mtob_ke": ("Kalamang", "English")}
ANSWER_TOKENS = 128


class Translation(NamedTuple):
    """A sentence to translate.

    Attributes:
        name: its place in the file.
        prompt: the book, if there is one, and the question.
        reference: the translation.
    """

    name: str
    prompt: str
    reference: str


def read_mtob(folder: Path, task: str, book: str, option: str) -> list[Translation]:
    """Read the sentences of a direction, and put the book before each.

    Args:
        folder: MTOB's, with `splits/test_examples_ek.json` (or beside each other, without folders) and the books.
        task: "mtob_ek", English to Kalamang, or "mtob_ke".
        book: "none", a name of `BOOKS`, or a text file.
        option: that named the folder, for messages.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    source, target = DIRECTIONS[task]
    text = "" if book == "none" else read_text(_find(folder, BOOKS[book], option) if book in BOOKS else Path(book),
                                               option if book in BOOKS else "--mtob-book").strip()  # fmt: skip
    path = _find(folder, f"test_examples_{task[-2:]}.json", option)
    made = read_json(path, option)
    if not isinstance(made, list):
        raise ConfigError(option, path, "is no list of sentences", "give the folder of MTOB's files")
    begun = f"{text}\n\n" if text else ""
    found = []
    for number, record in enumerate(made, 1):
        if not isinstance(record, dict):
            raise damaged(option, path, f"record {number}", "is no JSON object")
        if "canary" in record or ("original" not in record and number == 1):
            continue  # the first record only tells that the data must not be trained on
        sentence, reference = (text_of(record, name, option, path, f"record {number}")
                               for name in ("original", "ground_truth"))  # fmt: skip
        question = f"Translate from {source} to {target}.\n{source}: {sentence.strip()}\n{target}:"
        found.append(Translation(f"record {number}", begun + question, reference.strip()))
    if not found:
        raise ConfigError(option, path, "holds no sentence", "give the folder of MTOB's files")
    return found


def _find(folder: Path, name: str, option: str) -> Path:
    for path in (folder / name, folder / "splits" / name, folder / "resources" / name):
        if path.is_file():
            return path
    raise ConfigError(option, folder, f"has no {name}, nor have its folders splits and resources",
                      "unpack MTOB's archive, and give its folder")  # fmt: skip


def first_line(text: str) -> str:
    """Return the translation out of a continuation: its first line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
