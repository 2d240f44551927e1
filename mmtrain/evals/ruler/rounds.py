"""Needles over many rounds (MiniMax-01's MR-NIAH): an answer at 25, 50 or 75% of a conversation is asked for again.

The paper names the depths and lengths (2K to 1M tokens). The conversation here is made: rounds of held-out text between
three that list made words, one of which is to be repeated; counted are the words that come back.
"""

from __future__ import annotations

import numpy as np

from mmtrain.evals.ruler import made_words
from mmtrain.evals.ruler.prompt import Kit, Prompt, check_room

DEPTHS = (0.25, 0.5, 0.75)
ROUND = 512  # tokens of text in a round, about
ITEMS = 5
ANSWER_TOKENS = 64


def many_rounds(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Prompt:
    """Make a prompt whose rounds at `DEPTHS` list words; those of the round at `depth` are asked for."""
    topics = made_words.keys(rng, len(DEPTHS))
    lists = [made_words.words(rng, ITEMS) for _ in DEPTHS]
    asked = DEPTHS.index(depth)
    needles = [
        kit.ids(_asked_for(topic), f" {', '.join(items)}.\n") for topic, items in zip(topics, lists, strict=True)
    ]
    end = kit.ids(f"\nUser: Repeat, word for word, your list about {topics[asked]}.\nAssistant: My list about "
                  f"{topics[asked]} was:")  # fmt: skip
    max_tokens = kit.answer_room(ANSWER_TOKENS, lists[asked])
    room = check_room(length - max_tokens - len(end) - sum(map(len, needles)), length, least=4 * ROUND)
    count = room // ROUND // 4 * 4
    heads = [kit.ids(f"\nUser: Go on with part {i + 1}.\nAssistant:") for i in range(count)]
    left = check_room(room - sum(map(len, heads)), length)
    texts = np.array_split(kit.haystack.read(left, rng), count)
    parts: list[np.ndarray] = []
    for i, (head, text) in enumerate(zip(heads, texts, strict=True)):
        if i and i % (count // 4) == 0:
            parts.append(needles[i // (count // 4) - 1])
        parts += [head, text]
    return Prompt(np.concatenate([*parts, end]), tuple(lists[asked]), max_tokens, depth, kit.haystack.laps(left))


def _asked_for(topic: str) -> str:
    return f"\nUser: Make a list of {ITEMS} words about {topic}.\nAssistant: My list about {topic}:"
