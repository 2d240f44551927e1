"""RULER's variable tracking: a chain of assignments in noise, asked for by its value, after a worked example."""

from __future__ import annotations

import numpy as np

from mmtrain.evals.insert import insert
from mmtrain.evals.ruler import made_words
from mmtrain.evals.ruler.needles import NOISE
from mmtrain.evals.ruler.prompt import Kit, Prompt, check_room

HOPS = 4
ANSWER_TOKENS = 30
_OPENING = "A text follows, in which variables are assigned to each other. Keep track of their values.\n\n"
_SHORT = 5  # sentences of noise in the worked example


def variable_tracking(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Prompt:
    """Make a prompt. The chain begins at `depth`, and its other assignments lie anywhere after it, in order."""
    example, value, found = _chain(kit, 0.0, rng)
    shown = insert(np.resize(kit.ids(NOISE), _SHORT * len(kit.ids(NOISE))), example, kit.breaks)[0]
    begin = np.concatenate([kit.ids(_OPENING), shown, kit.ids(*_question(value), f" {', '.join(found)}", "\n\n")])
    chain, value, names = _chain(kit, depth, rng)
    max_tokens = kit.answer_room(ANSWER_TOKENS, names)
    begin, end = np.concatenate([begin, kit.ids(_OPENING)]), kit.ids(*_question(value))
    taken = len(begin) + len(end) + max_tokens + sum(len(ids) for _, ids in chain)
    room = check_room(length - taken, length, least=len(kit.ids(NOISE)))
    body = insert(np.resize(kit.ids(NOISE), room), chain, kit.breaks)[0]
    return Prompt(np.concatenate([begin, body, end]), tuple(names), max_tokens, depth)


def _chain(kit: Kit, depth: float, rng: np.random.Generator) -> tuple[list[tuple[float, np.ndarray]], str, list[str]]:
    """Assignments with their depths, the value, and the variables that hold it."""
    names, (value,) = made_words.names(rng, HOPS + 1), made_words.numbers(rng, 1, digits=5)
    depths = [depth, *sorted((depth + (1 - depth) * rng.random(HOPS)).tolist())]
    sources = [value, *(f"VAR {name}" for name in names)]
    told = (
        kit.ids("\nVAR", f" {name}", " =", f" {source}", "\n") for name, source in zip(names, sources, strict=False)
    )
    return list(zip(depths, told, strict=True)), value, names


def _question(value: str) -> tuple[str, str]:
    asked = f"\nQuestion: which variables in the text above hold the value {value}?\n"
    return asked, f"Answer: there are {HOPS + 1} variables that hold the value {value}, namely"
