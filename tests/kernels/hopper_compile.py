"""Compile every Triton kernel for an H100 (sm_90) without a GPU, and print a JSON line for each.

A script for processes of its own, one a part, `hopper` and `rest`, that `test_compiles_for_hopper.py` starts: it puts a
driver without a device into Triton and turns every launch into a compilation, on CPU tensors. Nothing is computed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mmkernels.common import triton_support

TOKENS, HEADS, WIDTH = 2048, 2, 128
# Loads of 16 bytes, to registers or (cp.async.cg has no other size) to shared memory.
WIDE_LOAD = re.compile(r"ld\.global\S*\.(v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global")


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install() -> None:
    """From here on a launch compiles, prints what came out, and runs nothing."""
    driver.set_active(NoDevice())
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        made = {
            "kernel": f"{self.fn.__module__}.{self.fn.__name__}",
            "shared": kernel.metadata.shared,
            "hash": kernel.hash,
            "wide_loads": len(WIDE_LOAD.findall(kernel.asm["ptx"])),
            "serialised": ".hopper." in self.fn.__module__ and serialised(kernel.asm["ptx"]),
        }
        print(json.dumps(made), flush=True)
        return kernel

    JITFunction.run = compile_only
    triton_support.check_device = lambda name, x: None


def serialised(ptx: str) -> bool:
    """Whether the assembler makes each product wait for the one before: it says so, and does as it likes."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return "are serialized" in done.stdout + done.stderr


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point)


def attention(
    tokens: int, heads: int, width: int, slopes: Tensor, documents: Tensor, capability: tuple[int, int]
) -> Iterator[Tensor | tuple[Tensor, ...]]:
    """Lightning attention as a GPU of that compute capability gets it."""
    from mmkernels.lightning import (
        ChunkPlan,
        chunks_backward,
        chunks_forward,
        lightning_attention,
        lightning_segment_states,
        silu_lightning_attention,
        states_between,
    )
    from mmkernels.lightning.triton import autograd, choice

    autograd.processors = lambda device: 132  # rows are cut into segments as they are on an H100
    choice.capability = lambda device: capability
    triton = {"backend": "triton"}
    q, k, v = (tensor(1, tokens, heads, width) for _ in range(3))
    yield lightning_attention(q, k, v, slopes, **triton)[0]
    yield lightning_attention(q, k, v, slopes, cu_seqlens=documents, **triton)[0]
    states = tensor(2, heads, width, width, dtype=torch.float32)
    yield lightning_attention(
        q, k, v, slopes, cu_seqlens=documents, initial_state=states, output_final_state=True, **triton
    )
    for cu_seqlens in (None, documents):  # SiLU inside the forward scan, its derivative inside the others
        raw = tensor(1, tokens, heads, 3 * width)
        yield silu_lightning_attention(raw, slopes, cu_seqlens=cu_seqlens, recompute=True, **triton)
    given = (slopes, documents, states)
    chunks_forward(q, k, v, *given, check_values=False, **triton)
    saved = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in (
        ((2, 99), torch.int64), ((2, 98), torch.int64), ((3,), torch.int32)))  # fmt: skip
    for raw in (None, (q, k, v)):
        chunks_backward(q, k, v, v, *given, lambda: states, saved, (q, k, v), raw=raw, **triton)
    for reverse in (False, True):
        lightning_segment_states(k, v, slopes, segments=2, cu_seqlens=documents, reverse=reverse, **triton)
    states_between(states, slopes, ChunkPlan.of(1024, [True, False], [False, True], [0, 1], [0, 1]), **triton)


def hopper() -> Iterator[Tensor]:
    """Attention of both kinds by the kernels for Hopper: half of all the time."""
    softmax_on_hopper()
    slopes, documents = lightning_sizes()
    yield from attention(TOKENS, HEADS, WIDTH, slopes, documents, (9, 0))


def softmax_on_hopper() -> None:
    """Heads in pairs and alone, and rows of several lengths, for which nothing must be compiled again."""
    from mmkernels.softmax.hopper import launch
    from mmkernels.softmax.hopper.tiles import Documents

    launch._processors = lambda device: 132
    for heads, kv_heads, width in ((8, 2, 128), (3, 1, 64)):
        for lengths in ((2048, 1), (1,), (96,), (160_000, 40_000)):
            documents = Documents(lengths, lengths, True, torch.device("cpu"))
            q, k = (torch.zeros(sum(lengths), n, width, dtype=torch.bfloat16) for n in (heads, kv_heads))
            o, lse = launch.forward(q, k, k, documents, 0.1)
            launch.backward(q, q, k, k, o, lse, documents, 0.1)


def lightning_sizes() -> tuple[Tensor, Tensor]:
    """Slopes and documents."""
    return torch.rand(HEADS), torch.tensor([0, 5, TOKENS], dtype=torch.int32)


def paged_decode(triton: dict[str, str]) -> None:
    """The decode step over keys in pages, with one run of them and with many."""
    from mmkernels.softmax import softmax_paged_step

    for dtype in (torch.bfloat16, torch.float32):
        q, k, pages = (torch.zeros(shape, dtype=dtype) for shape in ((2, 64, 128), (2, 8, 128), (9, 64, 8, 128)))
        for most in (1, 16384):
            table, keys = torch.zeros(2, most, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
            softmax_paged_step(q, k, k, pages, pages.clone(), table, keys, **triton)


def rest() -> Iterator[Tensor | tuple[Tensor, ...]]:
    """The results of every operation at the model's widths, in bfloat16; their backward compiles the rest."""
    from mmkernels.cross_entropy import logits_to_gradient_, row_statistics
    from mmkernels.embedding import add_embedding_grad
    from mmkernels.int8_weights import empty_int8, grouped_int8_mlp, int8_linear, launch
    from mmkernels.largest import largest_logits
    from mmkernels.largest import launch as largest_launch
    from mmkernels.lightning import lightning_decode_step
    from mmkernels.moe import permute, route, sort_received, take_rows, to_slots, unpermute
    from mmkernels.norm import add_rms_norm, rms_norm
    from mmkernels.norm_gate import norm_gate
    from mmkernels.peers import PeerMemory, meet, take_from_peers
    from mmkernels.rope import partial_rope
    from mmkernels.router import balance_stats, router_logits
    from mmkernels.softmax import softmax_merge
    from mmkernels.swiglu import swiglu, swiglu_grad

    tokens, heads, width, eps = TOKENS, HEADS, WIDTH, 1e-5
    triton = {"backend": "triton"}
    slopes, documents = lightning_sizes()
    yield from attention(tokens, heads, width, slopes, documents, (0, 0))
    states = tensor(2, heads, width, width, dtype=torch.float32)
    with torch.no_grad():
        q, k, v = (tensor(2, heads, width) for _ in range(3))
        lightning_decode_step(q, k, v, slopes, states, **triton)
        lightning_decode_step(q, k, v, slopes, states, inplace=True, slots_B=torch.arange(2), silu=True, **triton)
    paged_decode(triton)

    for wide in (torch.bfloat16, torch.float32):
        lse, part_lse = torch.zeros(64, tokens), torch.zeros(64, tokens)
        o, part = torch.zeros(tokens, 64, 128, dtype=wide), torch.zeros(tokens, 64, 128, dtype=torch.bfloat16)
        softmax_merge(o, lse, part, part_lse, **triton)

    rows = 8
    o, gate, weight = tensor(rows, 8192), tensor(rows, 8192), tensor(8192)
    yield norm_gate(o, gate, weight, eps, **triton)
    yield norm_gate(o, gate, weight, eps, width=2 * 8192, reduce=lambda x_T: x_T, **triton)
    x, y, weight = tensor(rows, 6144), tensor(rows, 6144), tensor(6144)
    yield rms_norm(x, weight, eps, **triton)
    yield add_rms_norm(x, y, 3.5, weight, eps, **triton)
    yield partial_rope(tensor(rows, 64, 128), torch.zeros(rows, 32), torch.zeros(rows, 32), **triton)
    yield swiglu(tensor(rows, 2 * 9216), **triton)
    yield swiglu(tensor(rows, 2 * 9216), torch.tensor([rows], dtype=torch.int32), **triton)

    swiglu_grad(tensor(rows, 2 * 9216), tensor(rows, 9216), **triton)

    launch._processors = lambda x: 132
    with torch.no_grad():
        for grouped in (False, True):
            for many in (1, 17, 64, tokens):
                int8_linear(tensor(many, 6144), empty_int8((4096, 6144), grouped), **triton)
            int8_linear(tensor(tokens, 6144), empty_int8((4096, 6144), grouped), backend="dequantise")
            experts = empty_int8((4, 2, 512, 6144), grouped), empty_int8((4, 6144, 512), grouped)
            grouped_int8_mlp(tensor(rows, 6144), *experts, torch.zeros(4, dtype=torch.int32), **triton)

    with torch.no_grad():
        logits, labels = tensor(rows, 200_064), torch.zeros(rows, dtype=torch.int64)
        logits_to_gradient_(logits, labels, *row_statistics(logits, labels, **triton), **triton)
        largest_launch._processors = lambda x: 132
        for many in (1, 64):
            largest_logits(tensor(many, 200_064), 200_000, **triton)
        add_embedding_grad(torch.zeros(512, 2048), labels, tensor(rows, 2048), **triton)
    for dtype, experts in ((torch.bfloat16, 32), (torch.bfloat16, 200), (torch.float32, 64)):
        x, weight = tensor(tokens, 6144, dtype=dtype), tensor(experts, 6144, dtype=torch.float32)
        yield router_logits(x, weight, **triton)
    logits = tensor(tokens, 32, dtype=torch.float32)
    yield balance_stats(logits, **triton)[0]
    for capacity in (None, 256):
        found = route(logits, 2, capacity, **triton)
        yield found.weight_TK
    start, first, last = (torch.zeros(size, dtype=torch.int32) for size in (32, 8, 8))
    placed = to_slots(found, start, 0, 256, **triton)
    sort_received(placed.count_E.view(4, 1, 8), first, last, 256, **triton)
    take_rows(tensor(tokens, 2048), torch.zeros(tokens, dtype=torch.int32), **triton)
    memory = PeerMemory([torch.zeros(2 * tokens * 6144, dtype=torch.uint8) for _ in range(4)], 1)
    for way in ("source_M", "used_M"):
        into = torch.zeros(tokens, 6144, dtype=torch.bfloat16)
        take_from_peers(memory, into, **{way: torch.zeros(tokens, dtype=torch.int32)}, **triton)
    meet(memory, 1)
    yield permute(tensor(tokens, 2048), placed, clear=False, **triton)
    x_RD = permute(tensor(tokens, 2048), found, **triton)
    yield x_RD
    yield unpermute(tensor(*x_RD.shape), tensor(tokens, 2, dtype=torch.float32), found, **triton)


def main() -> None:
    install()
    for made in {"hopper": hopper, "rest": rest}[sys.argv[1]]():
        results = made if isinstance(made, tuple) else (made,)
        torch.autograd.backward(results, [torch.zeros_like(result) for result in results])


if __name__ == "__main__":
    main()
