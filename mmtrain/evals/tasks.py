"""Tasks of retrieval and variable tracking: what is hidden in a text, what is asked, and the answer.

The kinds are RULER's (Hsieh et al. 2024), the wording of a needle MiniMax-01's section 5.7 ("The special magic {city}
number is: {number}"); counts of needles, chains and assignments are chosen here. Each answer is spelt as a piece of its
own, the same in the text, so that a model answers by copying tokens that it has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CITIES = (
    "Accra", "Algiers", "Amman", "Athens", "Baku", "Bamako", "Beirut", "Berlin", "Bogota", "Brussels", "Budapest",
    "Cairo", "Caracas", "Dakar", "Damascus", "Delhi", "Dublin", "Hanoi", "Harare", "Havana", "Helsinki", "Istanbul",
    "Jakarta", "Kabul", "Kampala", "Kyoto", "Lima", "Lisbon", "London", "Luanda", "Madrid", "Manila", "Minsk", "Moscow",
    "Nairobi", "Oslo", "Ottawa", "Paris", "Prague", "Quito", "Rabat", "Riga", "Rome", "Seoul", "Sofia", "Sydney",
    "Tallinn", "Tehran", "Tokyo", "Tunis", "Vienna", "Vilnius", "Warsaw", "Zagreb",
)  # fmt: skip
NEEDLES = 4  # of the kinds that have several
CHAINS, ASSIGNMENTS = 2, 5  # RULER's chain has four hops; a second chain makes tracking necessary


class Needle(NamedTuple):
    """A statement in the text.

    Attributes:
        depth: where it lies in the text around it, from 0 to 1.
        pieces: its spelling, each piece turned to tokens on its own.
    """

    depth: float
    pieces: tuple[str, ...]


class Task(NamedTuple):
    """Needles, and the end of the text: a question with its answers.

    Attributes:
        needles: in any order; those of one depth lie in the order given.
        ending: pieces of the end, each with whether it is an answer.
    """

    needles: list[Needle]
    ending: list[tuple[str, bool]]


def single(depth: float, rng: np.random.Generator) -> Task:
    """One needle, asked for."""
    (city,), (number,) = _cities(rng, 1), _numbers(rng, 1)
    return Task([_special_number(depth, city, number)], _ask([city], [number]))


def multi(depth: float, rng: np.random.Generator) -> Task:
    """Several needles from a depth to the end of the text, all asked for."""
    cities, numbers = _cities(rng, NEEDLES), _numbers(rng, NEEDLES)
    needles = map(_special_number, spread(depth, NEEDLES), cities, numbers)
    return Task(list(needles), _ask(cities, numbers))


def multi_key(depth: float, rng: np.random.Generator) -> Task:
    """A needle that is asked for, among others anywhere that are not."""
    cities, numbers = _cities(rng, NEEDLES), _numbers(rng, NEEDLES)
    needles = map(_special_number, [depth, *rng.random(NEEDLES - 1).tolist()], cities, numbers)
    return Task(list(needles), _ask(cities[:1], numbers[:1]))


def variable_tracking(depth: float, rng: np.random.Generator) -> Task:
    """A chain of assignments from a depth to the end of the text, asked for by its value, and another one anywhere."""
    names, values = _names(rng, CHAINS * ASSIGNMENTS), _numbers(rng, CHAINS)
    elsewhere = sorted(rng.random(ASSIGNMENTS).tolist())
    asked = _chain(spread(depth, ASSIGNMENTS), names[:ASSIGNMENTS], values[0])
    other = _chain(elsewhere, names[ASSIGNMENTS:], values[1])
    value = f" {values[0]}"
    question = ("\nWhich variables hold the value", value, ", in the order of the text?\nHolders of", value, ":")
    answers = [(f" {name}", True) for name in names[:ASSIGNMENTS]]
    return Task([*asked, *other], [*((piece, False) for piece in question), *answers])


TASKS: dict[str, Callable[[float, np.random.Generator], Task]] = {
    "single": single,
    "multi": multi,
    "multi_key": multi_key,
    "variable_tracking": variable_tracking,
}
"""The kinds of `evals.needles.kinds`, each a function (depth, generator) -> task."""


def spread(depth: float, count: int) -> list[float]:
    """Depths of several needles: evenly from `depth` towards the end."""
    return [depth + (1.0 - depth) * i / count for i in range(count)]


def _special_number(depth: float, city: str, number: str) -> Needle:
    return Needle(depth, (f"\nThe special magic {city} number is:", f" {number}", "\n"))


def _ask(cities: list[str], numbers: list[str]) -> list[tuple[str, bool]]:
    """A question for the numbers of these cities, and each answered in a line of its own."""
    asked = f"What is the special magic number of {', '.join(cities)} in the text above?"
    ending = [(f"\n{asked}", False)]
    for city, number in zip(cities, numbers, strict=True):
        ending += [(f"\nThe special magic {city} number is:", False), (f" {number}", True)]
    return ending


def _chain(depths: list[float], names: list[str], value: str) -> list[Needle]:
    """Assignments of a value to the first name, and of each name to the next."""
    first = Needle(depths[0], ("\nVAR", f" {names[0]}", " =", f" {value}", "\n"))
    pairs = zip(depths[1:], names, names[1:], strict=False)
    return [first, *(Needle(at, ("\nVAR", f" {name}", " = VAR", f" {source}", "\n")) for at, source, name in pairs)]


def _cities(rng: np.random.Generator, count: int) -> list[str]:
    return [CITIES[i] for i in rng.choice(len(CITIES), count, replace=False)]


def _numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(1_000_000 + i) for i in rng.choice(9_000_000, count, replace=False)]


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of five capital letters."""
    numbers = rng.choice(26**5, count, replace=False).tolist()
    return ["".join(chr(65 + number // 26**place % 26) for place in range(5)) for number in numbers]
