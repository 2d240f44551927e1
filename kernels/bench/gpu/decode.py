"""One token of a decode loop: the floor reads and writes the fp32 state once."""

from __future__ import annotations

import torch

from bench.gpu import peers
from bench.gpu.harness import Bench, without_gradient
from bench.gpu.inputs import WIDTH, normal, slopes_of
from bench.gpu.table import Label, floor_goal
from mmkernels import lightning_decode_step

HEADS = 64


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
