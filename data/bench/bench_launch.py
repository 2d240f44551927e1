"""Time of a launch over a large corpus until its first row, with an empty cache and with a warm one.

    python data/bench/bench_launch.py [--documents 200000] [--folder DIR]

Makes a corpus of random documents of 1 to 99 tokens (2.8 GB for 20 million documents) as a prepared folder and as a
plain Megatron pair, then measures each case in a process of its own, as a rank would be: `open_s` finds, checks and
splits the corpus, `stream_s` makes a row stream, `first_row_s` gives its first row; `peak_gb` is the process's memory
and `anonymous_gb` the part of it that ranks of a host do not share. `without` keeps nothing (as before there was a
cache), `cold` fills the cache, `warm` finds it. Prints one JSON line a case.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.indexed import MAGIC
from mmdata.corpus.manifest import Manifest, SplitInfo
from mmdata.corpus.open import open_corpus
from mmdata.rows.stream import RowStream

VOCAB = 4096
_CHUNK = 1 << 24


def synthetic(folder: Path, documents: int) -> None:
    """Write `folder/prepared` (with a manifest) and `folder/pair/train.bin/.idx`, one corpus."""
    prepared, pair = folder / "prepared", folder / "pair"
    prepared.mkdir(parents=True)
    pair.mkdir()
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, documents).astype("<i4")
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = int(ends[-1])
    with open(prepared / "train.idx", "wb") as stream:
        stream.write(struct.pack("<9sQBQQ", MAGIC, 1, 8, documents, documents + 1))
        for array in (lengths, ((ends - lengths) * 2).astype("<i8"), np.arange(documents + 1, dtype="<i8")):
            array.tofile(stream)
    with open(prepared / "train.bin", "wb") as stream:
        for start in range(0, tokens, _CHUNK):
            rng.integers(0, VOCAB, min(_CHUNK, tokens - start)).astype("<u2").tofile(stream)
    files = {}
    for path in (prepared / "train.bin", prepared / "train.idx"):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": "0" * 64}
        (pair / path.name).hardlink_to(path)
    split = SplitInfo(documents, tokens, tokens, VOCAB - 1, files)
    facts = {"kind": "bytes", "sha256": ""}
    Manifest("", facts, VOCAB, 0, "uint16", {"train": split}, {}, {}).write(prepared / "manifest.json")


def measure(source: str, packing: str, cache_dir: str) -> dict[str, object]:
    """Open a corpus and read its first row; an empty `cache_dir` keeps nothing."""
    cache = ArrayCache([Path(cache_dir)]) if cache_dir else None
    times = [time.perf_counter()]
    train, _ = open_corpus(source, vocab_size=VOCAB, valid_fraction=0.01, seed=1234, cache=cache)
    times.append(time.perf_counter())
    documents = train.documents if train.kept is None else train.kept
    stream = RowStream(
        train.corpus, seq_len=1024, seed=7, packing=packing, eod_id=0, documents=documents, vocab_size=VOCAB,
        cache=cache,
    )  # fmt: skip
    times.append(time.perf_counter())
    row = stream[0]
    times.append(time.perf_counter())
    open_s, stream_s, first_row_s = (round(float(t), 4) for t in np.diff(times))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, anonymous = (round(int(status[name].split()[0]) / 1e6, 3) for name in ("VmHWM", "RssAnon"))
    return {
        "open_s": open_s, "stream_s": stream_s, "first_row_s": first_row_s, "peak_gb": peak,
        "anonymous_gb": anonymous, "row": int(row.tokens.sum()),
    }  # fmt: skip


def main() -> None:
    """Measure both formats, both packings, without a cache, with an empty and with a warm one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="where the corpus goes, or lies from an earlier call")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder and args.folder.parent) as scratch:
        folder = args.folder or Path(scratch, "corpus")
        if not (folder / "pair").exists():
            synthetic(folder, args.documents)
        for source in ("prepared", "pair/train"):
            for packing in ("concat", "best_fit"):
                cache = str(Path(scratch, f"{source[:4]}-{packing}"))
                rows = set()
                for state, cache_dir in (("without", ""), ("cold", cache), ("warm", cache)):
                    one = [sys.executable, __file__, "--one", str(folder / source), packing, cache_dir]
                    found = json.loads(subprocess.run(one, check=True, capture_output=True, text=True).stdout)
                    rows.add(found.pop("row"))
                    case = {"documents": args.documents, "corpus": source, "packing": packing, "cache": state}
                    print(json.dumps(case | found), flush=True)
                assert len(rows) == 1


if __name__ == "__main__":
    main()
