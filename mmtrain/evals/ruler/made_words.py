"""Words, keys, numbers and identifiers that are drawn, so that no list of words is needed and no model knows them."""

from __future__ import annotations

import string

import numpy as np

_SYLLABLES = tuple(consonant + vowel for consonant in "bdfghjklmnprstvwxyzc" for vowel in "aeiou")
_WORD = 3  # syllables
MOST_WORDS = len(_SYLLABLES) ** _WORD
"""Different words that there are: a million."""


def words(rng: np.random.Generator, count: int) -> list[str]:
    """Return different words of three syllables, such as "tibamo"."""
    numbers, size, of = rng.choice(MOST_WORDS, count, replace=False), len(_SYLLABLES), _SYLLABLES
    places = ((numbers // size**place % size).tolist() for place in range(_WORD))
    return [f"{of[one]}{of[two]}{of[three]}" for one, two, three in zip(*places, strict=True)]


def keys(rng: np.random.Generator, count: int) -> list[str]:
    """Return different keys of two words, such as "tibamo-lusera"."""
    found = words(rng, 2 * count)
    return [f"{one}-{other}" for one, other in zip(found[::2], found[1::2], strict=True)]


def numbers(rng: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    """Return different numbers of so many digits."""
    least = 10 ** (digits - 1)
    return [str(least + i) for i in rng.choice(9 * least, count, replace=False).tolist()]


def uuids(rng: np.random.Generator, count: int) -> list[str]:
    """Return identifiers of 32 hexadecimal digits, grouped as those of RFC 9562."""
    drawn = rng.bytes(16 * count).hex()
    texts = (drawn[first : first + 32] for first in range(0, len(drawn), 32))
    return ["-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])) for text in texts]


def coded_words(rng: np.random.Generator, count: int) -> list[str]:
    """Return different words of six letters."""
    chosen = rng.choice(26**6, count, replace=False).tolist()
    return ["".join(string.ascii_lowercase[number // 26**place % 26] for place in range(6)) for number in chosen]


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Return different names of five capital letters."""
    chosen = rng.choice(26**5, count, replace=False).tolist()
    return ["".join(string.ascii_uppercase[number // 26**place % 26] for place in range(5)) for number in chosen]
