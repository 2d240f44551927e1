"""Loss by the position in a row, in buckets that grow with it: whether text far back still helps, to the last token.

Legend: T tokens of a row, P predicted positions (T - 1), B buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmtrain.errors import ConfigError
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.ruler.prompt import generator

PER_OCTAVE = 2  # buckets for each doubling of the position


def bucket_edges(length: int) -> np.ndarray:
    """Return the first position of each bucket and, last, `length`: int64 [B + 1], from 1 on, ascending.

    Position i is that of the token before which i tokens of the row stand; the first token is predicted from nothing
    and is not counted.
    """
    powers = np.arange(0, PER_OCTAVE * int(np.ceil(np.log2(length))))
    edges = np.unique(np.floor(2.0 ** (powers / PER_OCTAVE)).astype(np.int64))
    return np.append(edges[edges < length], length)


def bucket_nats(log_probs_P: np.ndarray) -> np.ndarray:
    """Return the sum of losses in each bucket of a row, float64 [B], in nats.

    Args:
        log_probs_P: of the row's second to its last token.
    """
    edges = bucket_edges(len(log_probs_P) + 1)
    return np.add.reduceat(-log_probs_P.astype(np.float64), edges[:-1] - 1)


def loss_by_position(length: int, nats_of_rows: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """Return for each bucket its first and last position, its tokens over all rows, and their mean loss in nats.

    Args:
        length: T.
        nats_of_rows: of each row what :func:`bucket_nats` returned.
    """
    edges, nats = bucket_edges(length), np.sum(np.asarray(nats_of_rows, dtype=np.float64), axis=0)
    tokens = np.diff(edges) * len(nats_of_rows)
    return [
        {"first": int(first), "last": int(end) - 1, "tokens": int(count), "loss": float(total / count)}
        for first, end, count, total in zip(edges[:-1], edges[1:], tokens, nats, strict=True)
    ]


def text_row(haystack: Haystack, length: int, seed: int, index: int) -> tuple[np.ndarray, bool]:
    """Return row `index` of held-out text, int64 [T], and whether it is the beginning of one document.

    Documents that are long enough are taken first, in an order that is drawn, as only in them the text far back is of
    the same matter. Where there are none, documents are laid end to end, as one.

    Raises:
        ConfigError: there is less held-out text than a row: it would repeat, and its loss would fall for that alone.
    """
    if length > haystack.num_tokens:
        problem = (
            f"the held-out text has {haystack.num_tokens:,} tokens: repeated, it would flatter a model that copies"
        )
        raise ConfigError("--lengths", f"{length:,}", problem, "give shorter ones, or more text")
    fitting = haystack.documents_of(length)
    if len(fitting):
        order = generator(seed, "perplexity", length).permutation(fitting)
        return haystack.beginning_of(int(order[index % len(order)]), length), True
    return haystack.read(length, generator(seed, "perplexity", length, index)), False
