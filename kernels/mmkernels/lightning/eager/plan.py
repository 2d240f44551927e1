"""How the chunked backend cuts a call: tokens into chunks, chunks into segments, heads into groups.

A segment of n chunks and a group of g heads is one unit of work, small enough that its score matrices stay in the
cache between the product that writes them, the decay and the product that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Measured on a 2-core EPYC (Zen 5, 1 MiB L2 a core): 128 to 512 KiB of scores a thread are within 5% of each other.
SCORE_BYTES_PER_THREAD = 256 * 1024
# The scan over the chunks of a segment is one triangular product: its cost a token grows with this.
MAX_CHUNKS = 32


@dataclass(frozen=True)
class Segment:
    """``chunks`` consecutive chunks of ``length`` tokens, from token ``start``, worked on ``heads`` heads at a time.

    ``first`` is the index of its first chunk.
    """

    start: int
    length: int
    chunks: int
    first: int
    heads: int

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.length * self.chunks

    def groups(self, total_heads: int) -> list[slice]:
        """Groups of heads, in order."""
        return [slice(h, min(h + self.heads, total_heads)) for h in range(0, total_heads, self.heads)]


@dataclass(frozen=True)
class Plan:
    """Chunk length, segments in token order, and the number of chunks of the row (a shorter last one included)."""

    chunk: int
    segments: tuple[Segment, ...]

    @property
    def chunks(self) -> int:
        """Number of chunks of the row."""
        return sum(segment.chunks for segment in self.segments)

    @property
    def widest(self) -> int:
        """Largest number of chunks in a segment."""
        return max((segment.chunks for segment in self.segments), default=0)


def chunk_length(tokens: int, width: int) -> int:
    """Tokens of a chunk for heads of ``width``.

    Work a token is about 4 C (D+E)/2 inside chunks and 4 D E for states: the sum falls as C falls to D and is flat
    near it, and short products run below the matrix rate. Measured best: 32 up to width 32, 64 up to 64, 128 above.
    """
    best = 32 if width <= 32 else 64 if width <= 64 else 128
    return max(1, min(tokens, best))


def make_plan(batch: int, tokens: int, heads: int, width: int, itemsize: int) -> Plan:
    """Cut a call of ``batch`` rows of ``tokens`` tokens and ``heads`` heads of ``width`` (the larger of D and E)."""
    chunk = chunk_length(tokens, width)
    budget = SCORE_BYTES_PER_THREAD * torch.get_num_threads()

    def fitting(length: int, chunks: int) -> int:
        return max(1, budget // max(1, batch * chunks * length * length * itemsize))

    whole = tokens // chunk
    most = min(MAX_CHUNKS, fitting(chunk, 1))
    pieces = -(-whole // most)
    segments, done = [], 0
    for piece in range(pieces):
        # Even pieces: 33 chunks become 17 and 16, not 32 and 1.
        count = (whole - done) // (pieces - piece)
        segments.append(Segment(done * chunk, chunk, count, done, fitting(chunk, count)))
        done += count
    rest = tokens - whole * chunk
    if rest:
        segments.append(Segment(whole * chunk, rest, 1, whole, fitting(rest, 1)))
    return Plan(chunk, tuple(segments))
