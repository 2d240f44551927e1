"""Answerers of the tests: one that reads the prompt and copies, one that draws at random, and a table of bigrams."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmdata.tokenizer import Tokenizer
from tests.evals.text import TOKENIZER, answers


def read_answer(text: str) -> str:
    """The answer to a prompt of any task that is made, found by reading it."""
    if found := re.search(r"\nWhat (?:is|are all) the special magic \w+ of (\S.*) in the text above\?\n", text):
        if found[1][0].isupper():
            return answers(TOKENIZER.encode(text))[0]
        told: dict[str, list[str]] = {}
        for key, value in re.findall(r"\nThe special magic \w+ of (\S+) is: (\S+)\.\n", text):
            told.setdefault(key, []).append(value)
        return " ".join(value for key in re.split(", | and ", found[1]) for value in told[key])
    if text.startswith("A text follows, in which variables"):
        body = text.rpartition("A text follows, in which variables")[2]
        (value,) = re.findall(r"hold the value (\d+)\?", body)
        holders: list[str] = []
        for name, source in re.findall(r"\nVAR (\w+) = (?:VAR )?(\w+)\n", body):
            holders += [name] if source == value or source in holders else []
        return " ".join(holders)
    if text.startswith("A numbered list"):
        counts = Counter(re.findall(r" \d+\. (\w+)", text.rpartition("A numbered list")[2]))
        return " ".join(word for word, _ in counts.most_common(10))
    if text.startswith("A text of coded words"):
        body = text.partition("\n\n")[2].partition("\nQuestion:")[0]
        return " ".join(word for word, _ in Counter(re.findall(r" ([a-z]{6})\b", body)).most_common(3))
    if text.startswith("\nUser:"):
        (topic,) = re.findall(r"your list about (\S+)\.", text)
        return re.findall(rf"My list about {topic}: (.*)\.\n", text)[0]
    (name,) = re.findall(r"Question: who keeps the (\w+)\?", text)
    return re.findall(rf"The (?:\w+) who keeps the {name} is (\w+)\.", text)[0]


class Score(NamedTuple):
    """Scores of a row's last tokens."""

    log_probs_N: np.ndarray
    likeliest_N: np.ndarray


class Copier:
    """Reads and copies."""

    def __init__(self, tokenizer: Tokenizer = TOKENIZER) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: Sequence[int]) -> list[list[int]]:
        self.calls += len(prompts)
        texts = (read_answer(self.tokenizer.decode(prompt.tolist())) for prompt in prompts)
        return [self.tokenizer.encode(f" {text}")[:most] for text, most in zip(texts, max_tokens, strict=True)]

    def score(self, rows: Sequence[np.ndarray], starts: Sequence[int]) -> list[Score]:
        """All tokens alike, but those that stand where a question of training's is answered: these it has read."""
        self.calls += len(rows)
        return [self._score(row, start) for row, start in zip(rows, starts, strict=True)]

    def _score(self, row: np.ndarray, start: int) -> Score:
        log_probs_N = np.full(len(row) - start, -np.log(257.0), dtype=np.float32)
        text = self.tokenizer.decode(row.tolist())
        if start == 1 or not re.search("\nWh(at is the special magic number of|ich variables hold)", text):
            return Score(log_probs_N, np.zeros(len(row) - start, dtype=bool))
        told = answers(self.tokenizer.encode(text))
        rest, likeliest_N = self.tokenizer.decode(row[start:].tolist()), np.zeros(len(row) - start, dtype=bool)
        at = 0
        for answer in told:
            at = rest.index(answer, at)
            likeliest_N[at : at + len(answer)] = True
        return Score(np.where(likeliest_N, 0, log_probs_N), likeliest_N)


class Guesser:
    """Draws tokens and log-probabilities at random."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: Sequence[int]) -> list[list[int]]:
        return [
            self.rng.choice(list(b" 0123456789abcdefghijklmnopqrstuvwxyzAEI"), most).tolist() for most in max_tokens
        ]

    def score(self, rows: Sequence[np.ndarray], starts: Sequence[int]) -> list[Score]:
        counts = [len(row) - start for row, start in zip(rows, starts, strict=True)]
        return [Score(-self.rng.exponential(3.0, count).astype(np.float32), self.rng.random(count) < 1 / 30)
                for count in counts]  # fmt: skip


class Bigrams:
    """A model whose next token depends on the last one alone, by a table that is drawn."""

    def __init__(self, seed: int = 0, vocab: int = 257) -> None:
        logits_VV = np.random.default_rng(seed).normal(0, 2, (vocab, vocab))
        self.log_probs_VV = logits_VV - np.log(np.exp(logits_VV).sum(1, keepdims=True))

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: Sequence[int]) -> list[list[int]]:
        found = []
        for prompt, most in zip(prompts, max_tokens, strict=True):
            last, made = int(prompt[-1]), []
            while len(made) < most and (last := int(self.log_probs_VV[last].argmax())) != TOKENIZER.eod_id:
                made.append(last)
            found.append(made)
        return found

    def score(self, rows: Sequence[np.ndarray], starts: Sequence[int]) -> list[Score]:
        return [self._score(row[start - 1 :]) for row, start in zip(rows, starts, strict=True)]

    def _score(self, row: np.ndarray) -> Score:
        found_N = self.log_probs_VV[row[:-1], row[1:]].astype(np.float32)
        return Score(found_N, self.log_probs_VV[row[:-1]].argmax(1) == row[1:])
