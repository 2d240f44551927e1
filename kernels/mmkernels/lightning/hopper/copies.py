"""Copies of chunks to shared memory, and what is done to them there, for the kernels in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from mmkernels.lightning.device.tile import silu

# Triton 3.9 renamed it, and left a stub under the old name.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def copy_rows(target, source, row, pad, wanted, MASKED: gl.constexpr):
    """Ask for a tile; rows before ``pad`` stay as they are."""
    if not MASKED:
        pad = 0
    copy_async(target, source, mask=((row >= pad) & wanted)[:, None])


@gluon.jit
def copy_chunk(a_s, b_s, c_s, a, b, c, row, c_row, pad, wanted, MASKED: gl.constexpr):
    """Ask for all tiles of a chunk, as one group."""
    copy_rows(a_s, a, row, pad, wanted, MASKED)
    copy_rows(b_s, b, row, pad, wanted, MASKED)
    copy_rows(c_s, c, c_row, pad, wanted, MASKED)
    async_copy.commit_group()


@gluon.jit
def activate(tile, LAYOUT: gl.constexpr):
    """SiLU of a tile in shared memory, in place."""
    tile.store(silu(tile.load(LAYOUT)))


@gluon.jit
def activate_chunk(a_s, b_s, c_s, AB_LAYOUT: gl.constexpr, C_LAYOUT: gl.constexpr):
    """SiLU of all tiles of a chunk."""
    activate(a_s, AB_LAYOUT)
    activate(b_s, AB_LAYOUT)
    activate(c_s, C_LAYOUT)
