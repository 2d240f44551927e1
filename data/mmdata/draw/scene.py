"""What is in a drawn picture, what can be said of it, and its pixels: all a function of a seed and a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from mmdata.draw.font import word_mask
from mmdata.hashing import content_hash, mix_int, salt_of

COLOURS = {
    "red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 210), "yellow": (235, 200, 30),
    "purple": (130, 50, 160), "orange": (240, 130, 20), "black": (20, 20, 20), "pink": (240, 130, 180),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
NUMBERS = ("one", "two", "three", "four", "five")
NONE = "none"
"""The answer to what is asked of a thing that is not there; only preference pairs have it."""
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
WORDS = """CAT DOG SUN MAP KEY BOX CUP HAT PEN JAM FOX OWL BEE ANT LEG ICE SKY TOY VAN WEB"""
WORD_LIST = tuple(WORDS.split())
_PAPER = ((250, 250, 250), (235, 240, 245), (245, 240, 228), (225, 225, 225))
_T = TypeVar("_T")


class Draws:
    """Random choices that are a function of a seed and a number, whatever the versions of libraries."""

    def __init__(self, seed: int, number: int) -> None:
        self._state = salt_of(seed, number)

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        self._state = mix_int(self._state)
        return (self._state >> 16) % n

    def of(self, items: Sequence[_T]) -> _T:
        """One of the items."""
        return items[self.below(len(items))]


@dataclass(frozen=True)
class Question:
    """A question with its answer, a wrong answer of the same kind, and what it is about."""

    kind: str
    question: str
    answer: str
    wrong: str


@dataclass(frozen=True)
class Scene:
    """What is in a picture.

    Attributes:
        colour: of what is drawn.
        shape: of the things; None in a picture of a word.
        places: where they are, numbers of `PLACES`, in order.
        word: that is written, in a picture of one.
        width, height: pixels.
        paper: colour of the background.
        jitter: a number that moves and sizes things a little.
    """

    colour: str
    shape: str | None
    places: tuple[int, ...]
    word: str | None
    width: int
    height: int
    paper: tuple[int, int, int]
    jitter: int

    @property
    def key(self) -> str:
        """What the picture shows, apart from its size, background and small moves: equal ones are of one split."""
        if self.word is not None:
            return f"{self.word} {self.colour}"
        where = self.places[0] if len(self.places) == 1 else f"x{len(self.places)}"
        return f"{self.shape} {self.colour} {where}"

    def is_held_out(self, seed: int, one_in: int) -> bool:
        """Whether the picture is of the held-out split: one key in `one_in` is."""
        return mix_int(content_hash(self.key.encode()) ^ mix_int(seed)) % one_in == 0

    def caption(self) -> str:
        """One sentence that says what is in the picture."""
        if self.word is not None:
            return f"The word {spelt(self.word)} in {self.colour}."
        if len(self.places) == 1:
            return f"{_article(self.colour)} {self.colour} {self.shape} at the {PLACES[self.places[0]]}."
        return f"{NUMBERS[len(self.places) - 1].capitalize()} {self.colour} {_plural(self.shape)}."

    def questions(self) -> list[Question]:
        """All questions about the picture."""
        draw = Draws(self.jitter, 1)

        def wrong(right: str, others: Sequence[str]) -> str:
            return draw.of([other for other in others if other != right])

        colours = tuple(COLOURS)
        if self.word is not None:
            asked = [("word", "How is the word spelt?", spelt(self.word), tuple(map(spelt, WORD_LIST)))]
            asked.append(("colour", "What colour is the word?", self.colour, colours))
        else:
            many = len(self.places) > 1
            asked = [("colour", f"What colour {'are the shapes' if many else 'is the shape'}?", self.colour, colours)]
            asked.append(("shape", f"What shape {'are they' if many else 'is it'}?", str(self.shape), SHAPES))
            asked.append(("count", "How many shapes are there?", NUMBERS[len(self.places) - 1], NUMBERS))
            if not many:
                asked.append(("position", "Where is the shape?", PLACES[self.places[0]], PLACES))
        return [Question(kind, question, answer, wrong(answer, all_of)) for kind, question, answer, all_of in asked]

    def preference(self) -> Question:
        """A question whose two answers are a preference pair.

        One in five to nine is about what the picture does not show: its wrong answer makes something up. Where there is
        a word or a number to tell, half of the wrong answers deny it, so that "none" is not the better one always.
        """
        draw, questions = Draws(self.jitter, 3), self.questions()
        asked = draw.below(2 * len(questions) + 1)
        if asked == 2 * len(questions):
            if self.word is not None:
                return Question("absent", "How many shapes are there?", NONE, draw.of(NUMBERS))
            return Question("absent", "How is the word spelt?", NONE, spelt(draw.of(WORD_LIST)))
        one = questions[asked // 2]
        return replace(one, wrong=NONE) if one.kind in ("word", "count") and asked % 2 else one


def scene_of(seed: int, number: int, sizes: Sequence[tuple[int, int]]) -> Scene:
    """Picture `number` of a data set: a third of one thing, a third of several, a third of a word.

    Args:
        seed: of the data set.
        number: of the picture.
        sizes: (width, height) in pixels to choose from.
    """
    draw = Draws(seed, number)
    kind, colour, (width, height) = draw.below(3), draw.of(tuple(COLOURS)), draw.of(sizes)
    paper, jitter = draw.of(_PAPER), draw.below(1 << 40)
    if kind == 2:
        return Scene(colour, None, (), draw.of(WORD_LIST), width, height, paper, jitter)
    count = 1 if kind == 0 else 2 + draw.below(4)
    left = list(range(9))
    places = tuple(sorted(left.pop(draw.below(len(left))) for _ in range(count)))
    return Scene(colour, draw.of(SHAPES), places, None, width, height, paper, jitter)


def pixels_of(scene: Scene) -> np.ndarray:
    """The picture, uint8 [height, width, 3]."""
    canvas = np.empty((scene.height, scene.width, 3), dtype=np.uint8)
    canvas[:] = scene.paper
    colour, draw = COLOURS[scene.colour], Draws(scene.jitter, 0)
    if scene.word is not None:
        canvas[word_mask(scene.word, scene.width, scene.height)] = colour
        return canvas
    for place in scene.places:
        top, left = place // 3 * scene.height // 3, place % 3 * scene.width // 3
        high, wide = scene.height // 3, scene.width // 3
        side = min(high, wide) * (7 + draw.below(3)) // 10
        y, x = top + (high - side) // 2 + draw.below(3) - 1, left + (wide - side) // 2 + draw.below(3) - 1
        y, x = max(0, min(y, scene.height - side)), max(0, min(x, scene.width - side))
        canvas[y : y + side, x : x + side][shape_mask(str(scene.shape), side)] = colour
    return canvas


def shape_mask(shape: str, side: int) -> np.ndarray:
    """A shape that fills a square: bool[side, side]."""
    y, x = np.mgrid[0:side, 0:side]
    u, v = (x + 0.5) / side * 2 - 1, (y + 0.5) / side * 2 - 1  # -1 to 1
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "triangle":
        return np.abs(u) <= (v + 1) / 2
    if shape == "cross":
        return (np.abs(u) <= 0.34) | (np.abs(v) <= 0.34)
    if shape == "diamond":
        return np.abs(u) + np.abs(v) <= 1
    return np.ones((side, side), dtype=np.bool_)


def spelt(word: str) -> str:
    """A word letter by letter, so that every letter is a token: a reader has to see them all, not to know the word."""
    return " ".join(word)


def _article(word: str) -> str:
    return "An" if word[0] in "aeiou" else "A"


def _plural(shape: str | None) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"
