"""The list of the common words: as many words as fit, found without turning many more to tokens."""

from __future__ import annotations

import numpy as np
import pytest

from mmtrain.evals.ruler import made_words, prompt
from mmtrain.evals.ruler.prompt import Kit, ShortLength
from mmtrain.evals.ruler.registry import make_prompt
from mmtrain.evals.ruler.word_lists import COMMON, _fitting
from tests.evals.text import TOKENIZER

REPEATS = (3, 2)


def tokens_of(words: list[str], count: int) -> int:
    """Tokens of a list, entry by entry; those of a word are its bytes and the space before it."""
    entries = [word for word in words[:COMMON] for _ in range(3)] + [w for w in words[COMMON:count] for _ in range(2)]
    return sum(len(f" {number}. {word}") for number, word in enumerate(entries, 1))


@pytest.mark.parametrize("spread", [1, 40])
def test_as_many_words_as_fit(spread: int) -> None:
    """Of any room, one token less or more too, and where a few words are much longer than others."""
    words = made_words.words(np.random.default_rng(0), 150)
    words = [word * (spread if i % 7 == 0 else 1) for i, word in enumerate(words)]
    totals = [tokens_of(words, count) for count in range(COMMON + 1, len(words) + 1)]
    for count, total in enumerate(totals, COMMON + 1):
        for room in (total, total + 1, total - 1):
            fits = sum(one <= room for one in totals)
            if fits:
                spelt, found = _fitting(Kit(TOKENIZER, None), words, REPEATS, room, 10**6)
                assert found == COMMON + fits and len(spelt) >= found, (count, room)
    with pytest.raises(ShortLength) as error:
        _fitting(Kit(TOKENIZER, None), words, REPEATS, totals[0] - 5, 1000)
    assert error.value.least == 1005


def test_few_more_words_and_numbers_are_turned_to_tokens_than_a_list_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    encode = TOKENIZER.encode_batch
    monkeypatch.setattr(TOKENIZER, "encode_batch", lambda batch: texts.extend(batch) or encode(batch))
    made = make_prompt(Kit(TOKENIZER, None), 0, "cwe", 200_000, None, 0)
    listed = TOKENIZER.decode(made.tokens_T.tolist()).rpartition("A numbered list")[2]
    entries, words = listed.count(". "), len({word for word in listed.split() if word.isalpha()})
    assert 10_000 < entries < sum(text[-1] == "." for text in texts) < 1.05 * entries
    assert words < sum(text[-1] != "." for text in texts) < 1.05 * words


def test_a_long_list_has_the_hash_that_it_had_when_all_words_were_turned_to_tokens() -> None:
    assert make_prompt(Kit(TOKENIZER, None), 0, "cwe", 200_000, None, 1).digest[:16] == "402fd5667c81d773"


def test_texts_are_turned_to_tokens_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f" {i}" for i in range(10)]
    whole = Kit(TOKENIZER, None).many(texts)
    monkeypatch.setattr(prompt, "BATCH", 3)
    found = Kit(TOKENIZER, None).many(texts)
    assert found.lengths_N.tolist() == whole.lengths_N.tolist() == [2] * 10
    order = np.arange(10)[::-1]
    assert found.joined(order).tolist() == whole.joined(order).tolist()
    assert len(Kit(TOKENIZER, None).many([])) == 0
