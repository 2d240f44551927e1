"""One token of a decode loop. The floor of lightning attention reads and writes the fp32 state once, that of softmax
attention reads keys and values once.
"""

from __future__ import annotations

import torch

from bench.gpu import peers
from bench.gpu.harness import Bench, without_gradient
from bench.gpu.inputs import WIDTH, normal, slopes_of
from bench.gpu.table import Label, Peer, floor_goal
from mmkernels import lightning_decode_step
from mmkernels.softmax import Suffixes, softmax_paged_step, softmax_suffix_forward

HEADS, KV_HEADS, PAGE = 64, 8, 64


def decode(bench: Bench) -> None:
    """Batches of 1, 8 and 64 sequences; the goal is for the last."""
    for batch in (1, 8, bench.cap(64)):
        bench.case(Label("decode", "step", f"B={batch} H={HEADS}"), step, batch)


def step(bench: Bench, batch: int) -> None:
    """Ours writes the state in place; the peer writes a new one."""
    torch.manual_seed(0)
    q, k, v = (torch.nn.functional.silu(normal(bench.device, batch, HEADS, WIDTH)) for _ in range(3))
    state, slopes = torch.randn(batch, HEADS, WIDTH, WIDTH, device=bench.device), slopes_of(HEADS, 1.0, bench.device)
    peer = peers.recurrent_gla(q, k, v, slopes, state)
    bench.add(
        Label("decode", "step", f"B={batch} H={HEADS} D={WIDTH}"),
        without_gradient(lambda: lightning_decode_step(q, k, v, slopes, state, inplace=True)),
        peer._replace(call=peer.call and without_gradient(peer.call)),
        floor=2 * state.nbytes,
        goal=floor_goal(0.90) if batch == 64 else None,
    )


def paged(bench: Bench) -> None:
    """One long document, and many shorter ones; the goals are those of the engine's decode steps."""
    for documents, keys in ((1, 2**13), (1, 2**17), (1, 2**20), (64, 2**13), (64, 2**15)):
        bench.case(Label("paged", "step", f"B={documents} S={keys}"), paged_step, bench.cap(documents), bench.cap(keys))


def paged_step(bench: Bench, documents: int, keys: int) -> None:
    """Ours reads pages where they lie; the peer is FlashAttention-2 over keys that lie end to end already."""
    torch.manual_seed(0)
    pages = -(-keys // PAGE)
    q, k, v = (normal(bench.device, documents, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    k_pages, v_pages = (normal(bench.device, documents * pages, PAGE, KV_HEADS, WIDTH) for _ in range(2))
    table = torch.randperm(documents * pages, device=bench.device).view(documents, pages)
    counts = torch.full((documents,), keys, device=bench.device)
    each, whole = (1,) * documents, (pages * PAGE,) * documents
    offsets = [torch.arange(documents + 1, dtype=torch.int32, device=bench.device) * n for n in (1, pages * PAGE)]
    suffixes = Suffixes(each, whole, *offsets)
    k_end_to_end, v_end_to_end = k_pages.flatten(0, 1), v_pages.flatten(0, 1)
    bench.add(
        Label("paged", "step", f"B={documents} S={keys} H={HEADS}/{KV_HEADS} D={WIDTH}"),
        lambda: softmax_paged_step(q, k, v, k_pages, v_pages, table, counts),
        Peer("FlashAttention-2", lambda: softmax_suffix_forward(q, k_end_to_end, v_end_to_end, suffixes)),
        floor=2 * documents * keys * KV_HEADS * WIDTH * k.element_size(),
        goal=floor_goal(0.80),
    )
