"""chrF, the F-score of character n-grams (Popović 2015): n from 1 to 6, beta 2, no spaces, as sacrebleu has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

ORDER, BETA = 6, 2.0


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """Return the chrF of translations over a whole set, from 0 to 100.

    Counts of n-grams are summed over the set; precision and recall are means over the orders that occur in it.

    Args:
        texts: translations.
        references: one for each.
    """
    totals = [[0, 0, 0] for _ in range(ORDER)]  # of each order: n-grams of texts, of references, of both
    for text, reference in zip(texts, references, strict=True):
        ours, theirs = "".join(text.split()), "".join(reference.split())
        for total, n in zip(totals, range(1, ORDER + 1), strict=True):
            found, wanted = _grams(ours, n), _grams(theirs, n)
            # As sacrebleu has it: where the reference has none of an order, those of the text do not count.
            total[0] += found.total() if wanted else 0
            total[1] += wanted.total()
            total[2] += (found & wanted).total()
    used = [total for total in totals if total[0] and total[1]]
    if not used:
        return 0.0
    precision = sum(both / ours for ours, _, both in used) / len(used)
    recall = sum(both / theirs for _, theirs, both in used) / len(used)
    if not precision + recall:
        return 0.0
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _grams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))
