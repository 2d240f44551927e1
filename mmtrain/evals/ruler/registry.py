"""The tasks that are made, by name; what each needs, and the names of groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mmtrain.evals.ruler.needles import NEEDLES, paper_needle
from mmtrain.evals.ruler.prompt import Kit, Prompt, generator
from mmtrain.evals.ruler.rounds import DEPTHS, many_rounds
from mmtrain.evals.ruler.tracking import variable_tracking
from mmtrain.evals.ruler.word_lists import common_words, frequent_words

Maker = Callable[[Kit, int, float, np.random.Generator], Prompt]


class MadeTask(NamedTuple):
    """A task that is made.

    Attributes:
        make: (kit, tokens, depth, random numbers) -> prompt.
        needs_text: it takes held-out text.
        has_depth: what is asked for lies at a depth.
        depths: the only depths that it has; empty: any.
    """

    make: Maker
    needs_text: bool = False
    has_depth: bool = True
    depths: tuple[float, ...] = ()


TASKS: dict[str, MadeTask] = {
    **{name: MadeTask(task, task.needs_text) for name, task in NEEDLES.items()},
    "vt": MadeTask(variable_tracking),
    "cwe": MadeTask(common_words, has_depth=False),
    "fwe": MadeTask(frequent_words, has_depth=False),
    "needle": MadeTask(paper_needle, needs_text=True),
    "mr_niah": MadeTask(many_rounds, needs_text=True, depths=DEPTHS),
}
"""RULER's names, and `needle` and `mr_niah` of MiniMax-01's section 5.7."""

GROUPS: dict[str, tuple[str, ...]] = {
    "niah_single": ("niah_single_1", "niah_single_2", "niah_single_3"),
    "niah_multikey": ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    "niah": tuple(NEEDLES),
    "ruler": (*NEEDLES, "vt", "cwe", "fwe"),
}
"""Names that stand for several tasks. `ruler` is RULER's thirteen but for its two of questions, which need files."""


def depth_of(task: str, depths: tuple[float, ...], index: int) -> float | None:
    """Return where what sample `index` asks for lies: samples take the depths in turn; None where there is none."""
    made = TASKS[task]
    chosen = made.depths or depths
    return chosen[index % len(chosen)] if made.has_depth else None


def make_prompt(kit: Kit, seed: int, task: str, length: int, depth: float | None, index: int) -> Prompt:
    """Return a prompt that, with its answer, has exactly `length` tokens: a function of the arguments alone.

    Raises:
        ShortLength: `length` is too short for the task.
        ConfigError: the task takes held-out text and there is none.
    """
    rng = generator(seed, task, length, repr(depth), index)
    prompt = TASKS[task].make(kit, length, 0.0 if depth is None else depth, rng)
    assert len(prompt.tokens_T) + prompt.max_tokens == length, (task, length, len(prompt.tokens_T))
    return prompt
