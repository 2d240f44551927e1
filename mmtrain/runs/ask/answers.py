"""Greedy answers to questions about images, many questions packed in a row.

Every token of an answer runs its question again: no cache, which a few words of small models do not need.

Legend: T tokens of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmdata.images.grid import TileRules
from mmdata.tokenizer import Tokenizer
from mmtrain.model.packed_seq import Packing
from mmtrain.runs.ask.questions import ImageQuestion, in_rows
from mmtrain.vision.image_inputs import ImageInputs
from mmtrain.vision.images import Images
from mmtrain.vision.model import VisionLanguageModel


@dataclass(frozen=True)
class KindScore:
    """How many questions of a kind were answered right.

    Attributes:
        kind: of the questions.
        right: whose answer is the right one, letter for letter.
        asked: all of them.
        blind: how many the commonest right answer would have got right, given to all: what needs no eyes.
    """

    kind: str
    right: int
    asked: int
    blind: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.asked


def greedy_answers(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    rules: TileRules,
    questions: Sequence[ImageQuestion],
    image_id: int,
    most_tokens: int = 16,
) -> list[str]:
    """Return the model's answer to each question: up to the end of a line or document, or `most_tokens`.

    Args:
        model: whole, on one device.
        tokenizer: that it was trained with.
        rules: by which the questions' images were laid out.
        questions: of any number.
        image_id: token of images.
        most_tokens: of an answer.
    """
    found: list[str] = []
    with torch.no_grad():
        for batch in in_rows(questions, lambda question: len(question.prompt) + most_tokens):
            tiles = [question.tiles(rules) for question in batch]
            found += _answer(model, tokenizer, batch, tiles, image_id, most_tokens)
    return found


def score(questions: Sequence[ImageQuestion], answers: Sequence[str]) -> list[KindScore]:
    """Return the scores by kind, in the order of their names."""
    found = []
    for kind in sorted({question.kind for question in questions}):
        pairs = [(q.answer, a) for q, a in zip(questions, answers, strict=True) if q.kind == kind]
        blind = Counter(right for right, _ in pairs).most_common(1)[0][1]
        found.append(KindScore(kind, sum(right == given for right, given in pairs), len(pairs), blind))
    return found


def _answer(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    batch: Sequence[ImageQuestion],
    tiles: Sequence[np.ndarray],
    image_id: int,
    most_tokens: int,
) -> list[str]:
    answers: list[list[int]] = [[] for _ in batch]
    left = list(range(len(batch)))
    for _ in range(most_tokens):
        documents = [[*batch[i].prompt.tolist(), *answers[i]] for i in left]
        layouts = tuple(layout for i in left for layout in batch[i].layouts)
        shown = Images(torch.from_numpy(np.concatenate([tiles[i] for i in left])), layouts)
        for i, token in zip(left, _next_tokens(model, documents, shown, image_id), strict=True):
            answers[i].append(token)
        left = [i for i in left if answers[i][-1] != tokenizer.eod_id and "\n" not in tokenizer.decode(answers[i])]
        if not left:
            break
    return [tokenizer.decode([one for one in answer if one != tokenizer.eod_id]).strip() for answer in answers]


def _next_tokens(
    model: VisionLanguageModel, documents: Sequence[list[int]], images: Images, image_id: int
) -> list[int]:
    """Return the most probable next token of each document; images are on the host."""
    device = next(model.parameters()).device
    tokens_T = torch.tensor([token for document in documents for token in document])
    lengths = [len(document) for document in documents]
    given = ImageInputs.whole(
        Images(images.tiles_N3SS.to(device), images.layouts), (tokens_T == image_id).nonzero().flatten()
    )
    logits_TV = model(tokens_T.to(device), Packing.from_lengths(lengths, device), given=given)
    last = torch.tensor(lengths).cumsum(0) - 1
    return logits_TV[last.to(device)].argmax(-1).tolist()
