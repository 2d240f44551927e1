"""Rounds in which nodes measure the way between them, two and two: every node is in one pair a round."""

from __future__ import annotations

from collections.abc import Sequence

MAX_ROUNDS = 8  # a round takes two or three seconds; each node then meets eight others, whatever their number


def pair_rounds(nodes: Sequence[str]) -> list[dict[str, str]]:
    """Return, for each round, the partner of every node that has one: all pairs, or the first MAX_ROUNDS rounds.

    The circle method: one node stays, the others move on by a place.

    Args:
        nodes: names, in an order that all agree on.
    """
    places: list[str | None] = [*nodes]
    if len(places) % 2:
        places.append(None)
    rounds = []
    for _ in range(min(len(places) - 1, MAX_ROUNDS)):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append({one: other for a, b in pairs if a and b for one, other in ((a, b), (b, a))})
        places = [places[0], places[-1], *places[1:-1]]
    return rounds
