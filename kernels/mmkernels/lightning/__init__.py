"""Lightning attention: linear attention with one exponential decay per head. README.md has the mathematics."""

from mmkernels.lightning.api import lightning_attention, silu_lightning_attention
from mmkernels.lightning.chunk_plan import ChunkPlan
from mmkernels.lightning.chunks import chunks_backward, chunks_forward, states_between
from mmkernels.lightning.decode import lightning_decode_step
from mmkernels.lightning.segments import lightning_segment_states

__all__ = [
    "ChunkPlan",
    "chunks_backward",
    "chunks_forward",
    "lightning_attention",
    "lightning_decode_step",
    "lightning_segment_states",
    "silu_lightning_attention",
    "states_between",
]
