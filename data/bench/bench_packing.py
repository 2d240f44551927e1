"""Packing efficiency of `best_fit`, its cut documents and its time, on documents of realistic lengths.

    python data/bench/bench_packing.py [--documents 1000000] [--out FILE]

Lengths are log-normal (median 600 tokens, sigma 1.3), as pages of the web are, and one document in 200 is of a tail:
Pareto from 16K tokens on with exponent 1.1, up to 4M, as books and repositories are. Packed are all documents alike
(`RowStream`'s packing, an epoch), mixtures by length of the shares of MiniMax-01 Table 6 (`TokenMixture`, 16 windows)
and, for comparison, the longest bucket of each such mixture in rows of its own. No token is read. A JSON line each:
rows, share of padding, and documents that are cut though a row holds them, beside those that `concat` cuts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mmdata.corpus.buckets import in_bucket
from mmdata.corpus.documents import Documents
from mmdata.rows.packing import BestFitPlan, ConcatPlan
from mmdata.rows.share_schedule import Segment
from mmdata.rows.token_mixture import Component, TokenMixture

SHARES = {"128Ki": (131072, (30, 70, 0)), "512Ki": (524288, (35, 35, 30)), "1Mi": (1048576, (30, 30, 40))}
LIMITS = [(0, 32768), (32768, 131072), (131072, None)]
_WINDOWS = 16


def lengths_of(count: int) -> np.ndarray:
    """Tokens of each of `count` documents, int64."""
    rng = np.random.default_rng(0)
    body = rng.lognormal(np.log(600), 1.3, count)
    tail = 16384 * (1 - rng.random(count)) ** (-1 / 1.1)
    return np.clip(np.where(rng.random(count) < 1 / 200, tail, body), 8, 4 << 20).astype(np.int64)


def plain(lengths: np.ndarray, row: int, packing: str, which: str = "all documents") -> dict[str, object]:
    """An epoch of all documents alike."""
    documents = Documents(None, lengths, int(lengths.sum()))
    start = time.perf_counter()
    plan = (BestFitPlan if packing == "best_fit" else ConcatPlan)(documents, row, 0)
    rows, padding, whole = plan.rows_per_epoch(0), 0, np.zeros(len(lengths), dtype=bool)
    for i in range(rows):
        pieces = plan.pieces(i)
        padding += row - int(pieces.lengths.sum())
        whole[pieces.documents[pieces.lengths == lengths[pieces.documents]]] = True
    fits = lengths <= row
    return told(f"{packing}, {which}", row, rows, padding, int((fits & ~whole).sum()), int(fits.sum()), start)


def alone(lengths: np.ndarray, row: int, shares: tuple[int, ...]) -> dict[str, object]:
    """An epoch of the longest bucket that has a share, in rows of its own."""
    low, below = [limits for limits, share in zip(LIMITS, shares, strict=True) if share][-1]
    own = lengths[(lengths >= low) & (lengths < (below or 1 << 62))]
    return plain(own, row, "best_fit", f"documents from {low} tokens on alone")


def mixed(lengths: np.ndarray, row: int, shares: tuple[int, ...], packing: str) -> dict[str, object]:
    """Windows of a mixture by length."""
    corpus = SimpleNamespace(prefix="lengths", doc_lengths=lengths)
    every = Documents(None, lengths, int(lengths.sum()))
    used = [(limits, share) for limits, share in zip(LIMITS, shares, strict=True) if share]
    parts = [Component(corpus, in_bucket(corpus, every, *limits)) for limits, _ in used]  # type: ignore[arg-type]
    exact = tuple(Fraction(share, 100) for _, share in used)
    start = time.perf_counter()
    mixture = TokenMixture(parts, [Segment(None, exact, exact)], seq_len=row, seed=0, packing=packing, eod_id=0)
    rows = padding = cut = met = 0
    for _ in range(_WINDOWS):
        window = mixture.window(rows)
        count = len(window.bounds) - 1
        rows, padding = rows + count, padding + count * row - int(window.lengths.sum())
        fits = lengths[window.documents] <= row
        parts_of = fits & (window.lengths < lengths[window.documents])
        cut += len(np.unique(window.documents[parts_of]))
        met += len(np.unique(window.documents[fits]))
    name = f"{packing}, shares {'/'.join(map(str, shares))}, windows of {mixture.schedule.window_rows} rows"
    return told(name, row, rows, padding, cut, met, start)


def told(name: str, row: int, rows: int, padding: int, cut: int, met: int, start: float) -> dict[str, object]:
    """One line of the result."""
    return {
        "bench": "packing",
        "case": name,
        "row": row,
        "rows": rows,
        "efficiency": round(1 - padding / (rows * row), 6),
        "padding_tokens": padding,
        "cut_documents": cut,
        "documents_that_fit_a_row": met,
        "share_cut": round(cut / met, 6),
        "seconds": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    """Measure every packing and length, a JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lengths = lengths_of(args.documents)
    by_bucket = [int(lengths[(lengths >= low) & (lengths < (below or 1 << 62))].sum()) for low, below in LIMITS]
    lines: list[dict[str, object]] = [{
        "bench": "packing", "documents": len(lengths), "tokens": int(lengths.sum()), "median": int(np.median(lengths)),
        "longest": int(lengths.max()), "tokens_by_bucket": by_bucket, "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(), "numpy": np.__version__,
    }]  # fmt: skip
    print(json.dumps(lines[0]), flush=True)
    cases = [(plain, (row, packing)) for row in (8192, 131072) for packing in ("best_fit", "concat")]
    cases += [(mixed, (*case, packing)) for case in SHARES.values() for packing in ("best_fit", "concat")]
    cases += [(alone, case) for case in SHARES.values()]
    for measure, options in cases:
        lines.append(measure(lengths, *options))  # type: ignore[operator]
        print(json.dumps(lines[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
