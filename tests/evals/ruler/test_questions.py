"""Questions over documents: exact lengths, the answer's document whole among others, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from mmtrain.errors import ConfigError
from mmtrain.evals.ruler.match import one_found
from mmtrain.evals.ruler.prompt import Kit, ShortLength, generator
from mmtrain.evals.ruler.questions import Asked, QuestionSet, answer_from_documents
from tests.evals.answerers import Copier, Guesser
from tests.evals.text import TOKENIZER

KIT = Kit(TOKENIZER, None)
KEEPERS = ["lamp", "boat", "mill", "gate"]
DOCUMENTS = [f"The man who keeps the {name} is Ann{name}. He is old, and this text is long." for name in KEEPERS]
ASKED = [Asked(f"who keeps the {name}?", (f"Ann{name}", "nobody"), (i,), (0, 1)) for i, name in enumerate(KEEPERS)]
SET = QuestionSet(ASKED, [*DOCUMENTS, *(f"Filler {i} says nothing." for i in range(40))], "--s")


@pytest.mark.parametrize("length", [600, 1501, 4096])
def test_a_copier_answers_and_a_guesser_does_not(length: int) -> None:
    for index in range(4):
        prompt = answer_from_documents(KIT, length, 0.0, generator(0, index), SET)
        assert len(prompt.tokens_T) + prompt.max_tokens == length and prompt.one_suffices
        text = TOKENIZER.decode(prompt.tokens_T.tolist())
        assert f"is {prompt.answers[0]}. He is old, and this text is long." in text
        scores = [one_found(TOKENIZER.decode(answerer.generate([prompt.tokens_T], [32])[0]), prompt.answers)
                  for answerer in (Copier(), Guesser())]  # fmt: skip
        assert scores == [100, 0]


def test_near_documents_come_first_and_all_repeat_where_they_are_too_few() -> None:
    small = answer_from_documents(KIT, 480, 0.0, generator(0, 5), SET)
    text = TOKENIZER.decode(small.tokens_T.tolist())
    assert text.count("Filler") <= 3 and sum(f"keeps the {name} is" in text for name in ("lamp", "boat")) >= 1
    assert small.laps == 1
    large = answer_from_documents(KIT, 8192, 0.0, generator(0, 5), SET)
    assert large.laps >= 3 and len({large.digest, small.digest}) == 2


def test_what_does_not_fit_or_has_no_surroundings_is_refused() -> None:
    with pytest.raises(ShortLength):
        answer_from_documents(KIT, 200, 0.0, generator(0), SET)
    alone = QuestionSet([Asked("who?", ("Ann",), (0,), (0,))], DOCUMENTS[:1], "--s")
    with pytest.raises(ConfigError, match="--s=1: documents are all there are"):
        answer_from_documents(KIT, 4096, 0.0, np.random.default_rng(0), alone)
