"""Which of two answers to a question about images a model prefers: the one to which it gives more probability.

Legend: T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdata.images.grid import ImageLayout, TileRules
from mmdata.prepare_images.encode import FoundImage, SampleEncoder
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import Tokenizer
from mmtrain.model.packed_seq import Packing, documents_of
from mmtrain.runs.ask.questions import images_of, in_rows, kind_of, read_documents, tiles_of
from mmtrain.vision.image_inputs import ImageInputs
from mmtrain.vision.images import Images
from mmtrain.vision.model import VisionLanguageModel


@dataclass(frozen=True)
class AnswerPair:
    """A right and a wrong answer to a question about images, as a document each.

    Attributes:
        kind: that it is counted by; "all" where the record has none.
        tokens: int32[n], the right answer's document, then the wrong one's.
        learned: bool[n], which of them are the answers.
        half: where the wrong answer's document begins.
        images: the places of all files, in the order of the tokens.
        layouts: of the images.
    """

    kind: str
    tokens: np.ndarray
    learned: np.ndarray
    half: int
    images: tuple[FoundImage, ...]
    layouts: tuple[ImageLayout, ...]


@dataclass(frozen=True)
class PreferenceScore:
    """How often the right answer is the more probable one.

    Attributes:
        kind: of the questions.
        preferred: pairs of which it is; of equal probabilities none is preferred.
        asked: all pairs.
    """

    kind: str
    preferred: int
    asked: int

    @property
    def share(self) -> float:
        """Share of the pairs."""
        return self.preferred / self.asked


def read_pairs(
    file: Path, tokenizer: Tokenizer, rules: TileRules, image_id: int, limit: int | None = None
) -> list[AnswerPair]:
    """Read records of `prompt`, `chosen`, `rejected`, `image(s)` and maybe `kind`, as a corpus of pairs has them.

    Args:
        file: .jsonl, with images beside it.
        tokenizer: of the model.
        rules: how its images become tiles.
        image_id: its token for images.
        limit: how many to keep, spread evenly over the file; None keeps all.

    Raises:
        DataError: the file is not there, a record is no pair, or an image cannot be read.
    """
    encoder = SampleEncoder(tokenizer, Template(), rules, image_id)
    found = []
    for value, one in read_documents(file, ("prompt", "chosen", "rejected"), "pair", encoder, limit):
        found.append(AnswerPair(kind_of(value), one.tokens, one.learned, one.half, *images_of(one, rules)))
    return found


def log_prob_margins(
    model: VisionLanguageModel, rules: TileRules, pairs: Sequence[AnswerPair], image_id: int
) -> list[float]:
    """Return log p(right answer) - log p(wrong answer) of each pair, in nats, summed over an answer's tokens.

    Args:
        model: whole, on one device.
        rules: by which the pairs' images were laid out.
        pairs: of any number.
        image_id: token of images.
    """
    found: list[float] = []
    with torch.no_grad():
        for row in in_rows(pairs, lambda pair: len(pair.tokens)):
            found += _margins(model, rules, row, image_id)
    return found


def preference_scores(pairs: Sequence[AnswerPair], margins: Sequence[float]) -> list[PreferenceScore]:
    """Return the scores by kind, in the order of their names."""
    found = []
    for kind in sorted({pair.kind for pair in pairs}):
        own = [margin for pair, margin in zip(pairs, margins, strict=True) if pair.kind == kind]
        found.append(PreferenceScore(kind, sum(margin > 0 for margin in own), len(own)))
    return found


def _margins(model: VisionLanguageModel, rules: TileRules, row: Sequence[AnswerPair], image_id: int) -> list[float]:
    device = next(model.parameters()).device
    tokens_T = torch.from_numpy(np.concatenate([pair.tokens for pair in row])).long()
    learned_T = torch.from_numpy(np.concatenate([pair.learned for pair in row]))
    tiles = np.concatenate([tiles_of(pair.images, rules) for pair in row])
    images = Images(torch.from_numpy(tiles).to(device), tuple(one for pair in row for one in pair.layouts))
    packing = Packing.from_lengths([n for pair in row for n in (pair.half, len(pair.tokens) - pair.half)], device)
    given = ImageInputs.whole(images, (tokens_T == image_id).nonzero().flatten())
    logits_TV = model(tokens_T.to(device), packing, given=given)
    assert isinstance(logits_TV, Tensor)
    # A token is predicted by the one before it; a document begins with its prompt, so no answer's is its first.
    scored_T = logits_TV[:-1].double().log_softmax(-1).gather(-1, tokens_T[1:, None].to(device))[:, 0]
    scored_T = torch.where(learned_T[1:].to(device), scored_T, 0)
    document_T = documents_of(packing.cu_seqlens, len(tokens_T))[1:]
    sums_N = scored_T.new_zeros(2 * len(row)).index_add_(0, document_T, scored_T)
    return (sums_N[0::2] - sums_N[1::2]).tolist()
