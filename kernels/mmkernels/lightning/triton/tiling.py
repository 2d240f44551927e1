"""Block shapes of the Triton kernels, and how many segments a row is cut into.

Figures are from an H100: with 64 heads of 128 and 32K tokens in bfloat16 the scan takes 0.71 ms with chunks of 64, 64
columns, 4 warps and 4 stages; 0.80 with 3 stages; 1.20 with 128 columns and 8 warps; 1.07 with 32 columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmkernels.lightning.device.padded_chunks import PaddedChunks

MIN_SEGMENT = 256


@dataclass(frozen=True)
class Tile:
    """Block shape of a launch: tokens of a chunk, columns of the state a program holds, warps, pipeline stages."""

    chunk: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Partition:
    """How the programs of a launch share the tokens out.

    Attributes:
        segments: number of segments of a row; or of documents, each scanned on its own with its own state.
        chunks_per_segment: chunks of a segment; the last may have fewer. Counted on the device if ``padded_chunks`` are
            given.
        padded_chunks: the chunks of a packed row, scanned across documents. If they say where segments begin, these
            go on from states that are given (context parallelism), else from what earlier segments leave.
        cu_seqlens: int32 or int64 offsets of documents that are scanned on their own.
    """

    segments: int
    chunks_per_segment: int
    padded_chunks: PaddedChunks | None = None
    cu_seqlens: Tensor | None = None

    @property
    def per_document(self) -> bool:
        """Whether units of work are documents, each with a state of its own."""
        return self.cu_seqlens is not None

    def chunk_starts(self, reverse: bool) -> Tensor | None:
        """Where each padded chunk starts, int64 [N], in scan order."""
        return None if self.padded_chunks is None else self.padded_chunks.starts_2N[int(reverse)]

    def chunk_ends(self, reverse: bool) -> Tensor | None:
        """Number of padded chunks, then where the document of each ends, int64 [N+1], in scan order."""
        return None if self.padded_chunks is None else self.padded_chunks.ends_2N[int(reverse)]

    @property
    def segment_firsts(self) -> Tensor | None:
        """First padded chunk of each segment, where segments are given and have states of their own, int32 [N+1]."""
        return None if self.padded_chunks is None else self.padded_chunks.segment_firsts_S1

    def units(self, batch: int) -> int:
        """Units of work of a launch for one head."""
        return self.segments * (1 if self.per_document else batch)


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up. Triton's own takes 5 microseconds, which short rows feel."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def block_width(width: int) -> int:
    """Width of a tile that holds a head."""
    return max(16, power_of_two(width))


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 operands run: three tf32 products for fp32 inputs; float16 meets its states in tf32."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def scan_tile(dtype: torch.dtype, d: int, e: int, length: int) -> Tile:
    """Block shape for heads of widths D and E; ``length`` is the most tokens that a program scans.

    Short rows take shorter chunks, so that a prefix-cache remainder of 20 tokens is not padded to 64 (the paper's
    multi-level padding, MiniMax-01 section 3.3).
    """
    widest = max(block_width(d), block_width(e))
    if dtype == torch.float32:
        return Tile(_chunk(length, 64), min(32, block_width(e)), 4, 1)
    if widest > 128:
        return Tile(_chunk(length, 64), 32, 8, 2)
    return Tile(_chunk(length, 64), min(64, block_width(e)), 4, 2 if dtype == torch.float16 else 4)


def pair_tile(tile: Tile, silu: bool) -> Tile:
    """Block shape of the launch that writes both dk and dv, which has twice the programs of another.

    With SiLU's derivative to work out (``silu``), two programs a multiprocessor with few stages take 1.95 ms where one
    after the other with many took 2.42.
    """
    return replace(tile, stages=min(tile.stages, 2)) if silu else tile


def _chunk(length: int, most: int) -> int:
    return min(most, max(16, power_of_two(length)))


@functools.lru_cache(maxsize=1024)
def segments_for(programs: int, tokens: int, chunk: int, processors: int) -> tuple[int, int]:
    """Number and length of the segments that keep ``processors`` multiprocessors busy.

    Args:
        programs: programs a launch would have without segments.
        tokens: length of a row.
        chunk: tokens of a chunk.
        processors: multiprocessors of the device, one program each.

    Returns:
        ``(segments, length)``; every segment but the last has ``length`` tokens, a multiple of the chunk.
    """
    tokens = max(tokens, 1)
    best, best_cost, best_length = 1, None, ceil_div(tokens, chunk) * chunk
    for wanted in range(1, min(64, max(1, tokens // MIN_SEGMENT)) + 1):
        length = ceil_div(ceil_div(tokens, wanted), chunk) * chunk
        segments = ceil_div(tokens, length)
        rounds = ceil_div(programs * segments, processors)
        # In tokens scanned: a launch costs about 250 tokens of a scan, and the state of a segment is read from its last
        # tokens (a few thousand where heads decay slowly) at half the cost.
        cost = rounds * length + (0 if segments == 1 else 250 + rounds * min(length, 4096) // 2)
        if best_cost is None or cost < 0.97 * best_cost:
            best, best_cost, best_length = segments, cost, length
    return best, best_length


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; under the interpreter, few, so that rows are cut as they are on a GPU."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability of a device; (0, 0) for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
