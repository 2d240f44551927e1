"""Retrieval: RULER's eight needle tasks (Hsieh et al. 2024, table 5), and the paper's needle.

The definitions are RULER's: what surrounds needles (sentences that repeat, held-out text, or other needles), of what
type keys and values are, and how many there are and are asked for. Wording and words are ours, so figures are to be
compared among models that were evaluated here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.evals import tasks
from mmtrain.evals.insert import insert
from mmtrain.evals.ruler import made_words
from mmtrain.evals.ruler.pieces import Pieces
from mmtrain.evals.ruler.prompt import Kit, Prompt, check_room

NOISE = " The rain falls on the hills. The river runs to the sea. The wind turns at night. Day follows day.\n"
ANSWER_TOKENS = 128
_POOL = 1024  # words of other needles' keys, and their values: a million keys, where 4Mi tokens hold 160,000 needles
_DRAW: dict[str, Callable[[np.random.Generator, int], list[str]]] = {
    "words": made_words.keys,
    "numbers": made_words.numbers,
    "uuids": made_words.uuids,
}
_SINGULAR = {"words": "word", "numbers": "number", "uuids": "uuid"}


@dataclass(frozen=True)
class Needles:
    """A needle task.

    Attributes:
        haystack: "noise", "text" (held-out) or "needles" (others that are not asked for).
        key, value: their type: "words", "numbers" or "uuids".
        keys: needles with keys of their own; of them `queries` are asked for.
        values: of each key.
        queries: keys that are asked for.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def needs_text(self) -> bool:
        """Whether needles lie in held-out text."""
        return self.haystack == "text"

    def __call__(self, kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Prompt:
        """Make a prompt. The first value asked for lies at `depth`, other needles anywhere."""
        keys = _DRAW[self.key](rng, self.keys)
        values = _DRAW[self.value](rng, self.keys * self.values)
        of_key = [values[i * self.values : (i + 1) * self.values] for i in range(self.keys)]
        depths = [depth, *rng.random(self.keys * self.values - 1).tolist()]
        told = [(key, value) for key, own in zip(keys, of_key, strict=True) for value in own]
        needles = [(at, self._needle(kit, *pair)) for at, pair in zip(depths, told, strict=True)]
        answers = tuple(value for own in of_key[: self.queries] for value in own)
        opening, ending = self._question(keys[: self.queries], len(answers))
        max_tokens, begin, end = kit.answer_room(ANSWER_TOKENS, answers), kit.ids(opening), kit.ids(*ending)
        taken = len(begin) + len(end) + max_tokens + sum(len(ids) for _, ids in needles)
        room = check_room(length - taken, length, least=len(kit.ids(NOISE)))
        if self.haystack == "needles":
            body, laps = self._among_others(kit, needles, room, rng), 0.0
        else:
            is_text = self.haystack == "text"
            text = kit.haystack.read(room, rng) if is_text else np.resize(kit.ids(NOISE), room)
            body, laps = insert(text, needles, kit.breaks)[0], kit.haystack.laps(room) if is_text else 0.0
        return Prompt(np.concatenate([begin, body, end]), answers, max_tokens, depth, laps)

    def _needle(self, kit: Kit, key: str, value: str) -> np.ndarray:
        head, middle, tail = self._around()
        first, dash, second = key.partition("-") if self.key == "words" else (key, "", "")
        return kit.ids(head, f" {first}", dash + second, middle, f" {value}", tail)

    def _question(self, keys: Sequence[str], answers: int) -> tuple[str, tuple[str, str]]:
        many, named = answers > 1, " and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]]))
        what = self.value if many else _SINGULAR[self.value]
        opening = f"A text follows, in which special magic {self.value} are hidden. Remember them.\n\n"
        asked = f"\n\nWhat {'are all the' if many else 'is the'} special magic {what} of {named} in the text above?\n"
        begun = f"The special magic {what} of {named} in the text above {'are' if many else 'is'}:"
        return opening, (asked, begun)

    def _among_others(
        self, kit: Kit, needles: Sequence[tuple[float, np.ndarray]], room: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Needles between as many others as there is room for; what is over of it is noise before them."""
        texts: list[np.ndarray] = []
        ends, size = np.zeros(1, dtype=np.int64), len(needles[0][1])
        while (count := int((room - ends[-1]) / size)) > 0:
            pieces, order = self._others(kit, count, rng)
            lengths = pieces.lengths_N[order].sum(1)
            fitting = int(np.searchsorted(np.cumsum(lengths), room - ends[-1], side="right"))
            texts.append(pieces.joined(order[:fitting].ravel()))
            ends = np.append(ends, ends[-1] + np.cumsum(lengths[:fitting]))
            if fitting < count:
                break
        text = np.concatenate([np.empty(0, dtype=np.int64), *texts])
        parts, before = [np.resize(kit.ids(NOISE), room - len(text))], 0
        for depth, ids in sorted(needles, key=lambda needle: needle[0]):
            place = int(ends[round(depth * (len(ends) - 1))])
            parts, before = [*parts, text[before:place], ids], place
        return np.concatenate([*parts, text[before:]])

    def _others(self, kit: Kit, count: int, rng: np.random.Generator) -> tuple[Pieces, np.ndarray]:
        """Needles that are not asked for: pieces, and which of them each needle is, int64 [count, pieces of a needle].

        Their keys differ. Words of keys and values come out of a pool, which is turned to tokens once.
        """
        head, middle, tail = (np.full((count, 1), i) for i in range(3))
        around = kit.many([*self._around()])
        if self.key == "words":
            pool = made_words.words(rng, _POOL)
            keys = kit.many([*(f" {word}" for word in pool), *(f"-{word}" for word in pool)])
            pairs = rng.choice(_POOL**2, count, replace=False)
            key = np.stack([pairs // _POOL, _POOL + pairs % _POOL], axis=1)
        else:
            keys, key = kit.many([f" {one}" for one in _DRAW[self.key](rng, count)]), np.arange(count)[:, None]
        values = kit.many([f" {one}" for one in _DRAW[self.value](rng, min(count, _POOL))])
        value = rng.integers(len(values), size=(count, 1))
        order = [head, 3 + key, middle, 3 + len(keys) + value, tail]
        return around.then(keys, values), np.concatenate(order, axis=1)

    def _around(self) -> tuple[str, str, str]:
        """What stands before, between and after key and value."""
        return f"\nThe special magic {_SINGULAR[self.value]} of", " is:", ".\n"


def paper_needle(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Prompt:
    """Make a prompt with MiniMax-01's needle (section 5.7), "The special magic {city} number is: {number}", in text."""
    task = tasks.single(depth, rng)
    needles = [(needle.depth, kit.ids(*needle.pieces)) for needle in task.needles]
    *question, (answer, _) = task.ending
    ending, answers = kit.ids(*(piece for piece, _ in question)), (answer.strip(),)
    max_tokens = kit.answer_room(16, answers)
    room = check_room(length - max_tokens - len(ending) - sum(len(ids) for _, ids in needles), length)
    text = kit.haystack.read(room, rng)
    body = insert(text, needles, kit.breaks)[0]
    return Prompt(np.concatenate([body, ending]), answers, max_tokens, depth, kit.haystack.laps(room))


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", value="uuids"),
    "niah_multikey_1": Needles("text", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("text", values=4),
    "niah_multiquery": Needles("text", keys=4, queries=4),
}
"""RULER's needle tasks by their names there."""
