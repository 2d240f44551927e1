"""RULER's aggregation: the most common words of a numbered list, and the most frequent words of a coded text.

Legend: N words that a list holds once or more often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mmtrain.evals.ruler import made_words
from mmtrain.evals.ruler.needles import NOISE
from mmtrain.evals.ruler.pieces import Pieces
from mmtrain.evals.ruler.prompt import Kit, Prompt, ShortLength

COMMON = 10
REPEATS = ((30, 3, (10, 3, 40)), (6, 1, (3, 1, 20)))
"""How often a common word stands in a list, how often another, and in the worked example the same two and its words.

RULER takes the second below 4,096 tokens; here it is for lengths that do not hold the first.
"""
COMMON_TOKENS, FREQUENT_TOKENS = 120, 50
FREQUENT = 3
_NEAR = 1000  # words whose tokens say what those after them have
_SURELY = 0.85  # an entry of a long list has no fewer tokens than this share of one of the worked example
_DOTS = " ..."
_LIST = "A numbered list of words follows. Some stand in it more often than others. Remember those.\n"
_CODED = "A text of coded words follows. Count how often each of them is there.\n\n"


def common_words(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Prompt:
    """Make a prompt with the ten common words of a list; `depth` does not matter."""
    short = 0
    for common, other, example in REPEATS:
        try:
            return _common_words(kit, length, (common, other), example, rng)
        except ShortLength as error:
            short = error.least
    raise ShortLength(short)


def _common_words(
    kit: Kit, length: int, repeats: tuple[int, int], example: tuple[int, int, int], rng: np.random.Generator
) -> Prompt:
    common, other, count = example
    shown = made_words.words(rng, count)
    worked = _entries(kit, _spelt(kit, shown), (common, other), count, rng)
    asked = f"\nQuestion: which {COMMON} words are the most common ones of the list?\n"
    question = kit.ids(asked, f"Answer: the {COMMON} most common words of the list are:")
    begin = np.concatenate([kit.ids(_LIST), worked, question, kit.ids(f" {', '.join(shown[:COMMON])}\n\n", _LIST)])
    entry = _SURELY * len(worked) / (COMMON * common + (count - COMMON) * other)
    words = made_words.words(rng, min(COMMON + 1 + int(length / entry / repeats[1]), made_words.MOST_WORDS))
    answers = tuple(words[:COMMON])
    max_tokens = kit.answer_room(COMMON_TOKENS, answers)
    room = length - len(begin) - len(question) - max_tokens
    spelt, count = _fitting(kit, words, repeats, room, length)
    listed = _entries(kit, spelt, repeats, count, rng)
    spare = np.resize(kit.ids(NOISE), room - len(listed))
    return Prompt(np.concatenate([begin, spare, listed, question]), answers, max_tokens)


def _fitting(kit: Kit, words: Sequence[str], repeats: tuple[int, int], room: int, length: int) -> tuple[Pieces, int]:
    """The first words as pieces, and the number N of them whose list fits into `room`.

    The tokens of a list do not depend on its order. Turning words and numbers to tokens is what a sample takes its time
    for, so it is done for a half of what may be there at first, and then for as many more as the rest has room for.
    """
    most = len(words) - COMMON
    spelt, tried = _spelt(kit, words[:COMMON]), -(-most // 2)
    while True:
        spelt = spelt.then(_spelt(kit, words[len(spelt) : COMMON + tried]))
        tokens_N = _list_tokens(kit, spelt, repeats)
        if tokens_N[-1] > room or tried == most:
            break
        near = min(_NEAR, tried)  # entries are no shorter further on
        each = int(tokens_N[-1] - tokens_N[-near]) / (near - 1) if near > 1 else 1.0
        tried = min(most, tried + 1 + int((room - int(tokens_N[-1])) / max(each, 1.0)))
    fitting = int(np.searchsorted(tokens_N, room, side="right"))
    if not fitting:
        raise ShortLength(length - room + int(tokens_N[0]))
    return spelt, COMMON + fitting


def _list_tokens(kit: Kit, spelt: Pieces, repeats: tuple[int, int]) -> np.ndarray:
    """Tokens of the list of the common words and the first one of the others, the first two, and so on."""
    common, other = repeats
    word_tokens_N = spelt.lengths_N
    entries_N = COMMON * common + other * np.arange(1, len(spelt) - COMMON + 1)
    marks = np.cumsum(kit.marks(int(entries_N[-1])).lengths_N)
    return marks[entries_N - 1] + common * word_tokens_N[:COMMON].sum() + other * np.cumsum(word_tokens_N[COMMON:])


def _spelt(kit: Kit, words: Sequence[str]) -> Pieces:
    return kit.many([f" {word}" for word in words])


def _entries(kit: Kit, spelt: Pieces, repeats: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Ids of a list in an order that is drawn: each word after its number, both turned to tokens on their own.

    Args:
        kit: with the numbers' marks.
        spelt: words, the common ones first.
        repeats: of a common word and of another.
        count: words of the list.
        rng: draws the order.
    """
    common, other = repeats
    words = np.concatenate([np.tile(np.arange(COMMON), common), np.tile(np.arange(COMMON, count), other)])
    marks = kit.marks(len(words))
    pairs = np.stack([np.arange(len(words)), len(words) + words[rng.permutation(len(words))]], axis=1)
    return marks.then(spelt).joined(pairs.ravel())


def frequent_words(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Prompt:
    """Make a prompt with the three most frequent words of a coded text; `depth` does not matter.

    Counts fall as rank^-2; the first rank is dots, which are told to be left out.
    """
    asked = "\nQuestion: leave out the dots '...'. Which three words are the most frequent ones of the coded text?\n"
    begin = kit.ids(_CODED)
    end = kit.ids(asked, "Answer: the three most frequent words of the coded text are:")
    # RULER has a word for 50 tokens; those beyond rank 4,000 would not stand in 16 million tokens once.
    words = made_words.coded_words(rng, min(max(length // 50, 8), 4000))
    answers = tuple(words[1 : 1 + FREQUENT])
    max_tokens = kit.answer_room(FREQUENT_TOKENS, answers)
    room = length - len(begin) - len(end) - max_tokens
    spelt = kit.many([_DOTS, *(f" {word}" for word in words[1:])])
    sizes = spelt.lengths_N
    least = next(total for total in range(1, 10**6) if _apart(_counts(total, len(words))))
    needed = int(_counts(least, len(words)) @ sizes)
    if needed > room:
        raise ShortLength(length - room + needed)
    low, high = least, room * 4
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _counts(middle, len(words)) @ sizes <= room else (low, middle)
    while not _apart(_counts(low, len(words))):  # a longer text, of few words, may have them level again
        low -= 1
    order = rng.permutation(np.repeat(np.arange(len(words)), _counts(low, len(words))))
    text = spelt.joined(order)
    spare = np.resize(kit.ids(_DOTS), room - len(text))
    return Prompt(np.concatenate([begin, spare, text, end]), answers, max_tokens)


def _counts(total: int, words: int) -> np.ndarray:
    """How often each rank stands among so many words, int64: the density is rank^-2 / zeta(2)."""
    return (total / np.arange(1, words + 1, dtype=np.float64) ** 2 / (math.pi**2 / 6)).astype(np.int64)


def _apart(counts: np.ndarray) -> bool:
    """Whether the asked words are more frequent than the one after them."""
    return bool(counts[FREQUENT] > counts[FREQUENT + 1])
