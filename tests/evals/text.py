"""Held-out text of the tests, and models that answer: an oracle that reads, and one that draws at random."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from mmdata.corpus.split import Split
from mmdata.tokenizer import ByteTokenizer
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.sample import SampleBuilder
from mmtrain.model.label_score import LabelScore, score_labels
from mmtrain.model.loss import IGNORE
from mmtrain.model.model import ModelInputs
from tests.data.corpus.toy import ToyCorpus, write_toy

TOKENIZER, VOCAB = ByteTokenizer(), 257


def split(folder: Path, documents: int = 40) -> Split:
    """Documents of lower-case sentences, each with its end-of-document token."""
    rng, texts = np.random.default_rng(0), []
    for _ in range(documents):
        words = rng.choice(["sun", "sea", "stone", "tree"], int(rng.integers(1, 60)))
        texts.append([*" ".join(words).encode(), *b".", TOKENIZER.eod_id])
    return Split(ToyCorpus(write_toy(folder / "held.toy", texts)))


def builder(folder: Path, seed: int = 0, documents: int = 40) -> SampleBuilder:
    haystack = Haystack(split(folder, documents), "held.toy", TOKENIZER, VOCAB)
    return SampleBuilder(haystack, TOKENIZER, seed)


def answers(tokens: list[int], tokenizer: object = TOKENIZER) -> list[str]:
    """The answers to the last question of a text, found by reading it; the text itself holds none of them yet."""
    text = tokenizer.decode(tokens)
    if found := list(re.finditer(r"\nWhat is the special magic number of (.*) in the text above\?", text)):
        told = dict(re.findall(r"\nThe special magic (\w+) number is: (\d{7})\n", text[: found[-1].start()]))
        return [f" {told[city]}" for city in found[-1][1].split(", ")]
    question = list(re.finditer(r"\nWhich variables hold the value (\d+), in the order of the text\?", text))[-1]
    value = question[1]
    holders = []
    for name, source in re.findall(r"\nVAR (\w+) = (?:VAR )?(\w+)\n", text[: question.start()]):
        if source == value or source in holders:
            holders.append(name)
    return [f" {name}" for name in holders]


class Model:
    """A scorer of one process whose hidden states are its predictions, one-hot, and whose head is the identity."""

    def __init__(self) -> None:
        self.context = SimpleNamespace(dp_rank=0, dp_size=1, device=torch.device("cpu"))
        self.scored: list[int] = []

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        return x

    def score_labels(self, batch: ModelInputs) -> LabelScore:
        self.scored.append(len(batch.tokens_T))
        predicted_T = torch.zeros_like(batch.tokens_T)
        for at in (batch.labels_T != IGNORE).nonzero()[:, 0].tolist():
            predicted_T[at] = self.predict(batch.tokens_T[: at + 1].tolist())
        x_TV = torch.nn.functional.one_hot(predicted_T, VOCAB).double()
        return score_labels(x_TV, torch.eye(VOCAB, dtype=torch.float64), batch.labels_T, 7)

    def predict(self, tokens: list[int]) -> int:
        raise NotImplementedError


class Oracle(Model):
    """Reads the text before a token, finds the answers in it and copies the one that comes next."""

    def predict(self, tokens: list[int]) -> int:
        text, found = TOKENIZER.decode(tokens), answers(tokens)
        ending = text[max(text.rfind("\nWhat is the"), text.rfind("\nWhich variables")) :]
        if ending.startswith("\nWhich"):
            written = ending.rpartition(":")[2]
            return TOKENIZER.encode("".join(found))[len(written)]
        line = ending.rpartition("\n")[2]
        told = ending.count("\nThe special magic") - 1
        return TOKENIZER.encode(found[told])[len(line.partition(":")[2])]


class Guesser(Model):
    """Draws digits, capital letters and spaces at random."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def predict(self, tokens: list[int]) -> int:
        return int(self.rng.choice(list(b" 0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")))
