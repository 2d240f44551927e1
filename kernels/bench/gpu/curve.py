"""Forward and backward against length, for the plot: ours, flash-linear-attention, softmax attention."""

from __future__ import annotations

from bench.gpu import peers
from bench.gpu.harness import Bench, with_backward
from bench.gpu.inputs import Attention
from bench.gpu.softmax import draw_dense
from bench.gpu.table import Cell, Label, Peer, Row
from mmkernels import lightning_attention

HEADS = 64
LENGTHS = tuple(1024 << step for step in range(9))
LONGEST_FLA, LONGEST_SOFTMAX = 131072, 65536


def curve(bench: Bench) -> None:
    """1K to 256K tokens."""
    for tokens in bench.lengths(LENGTHS):
        bench.case(Label("curve", "forward+backward", f"T={tokens} H={HEADS}"), point, tokens)


def point(bench: Bench, tokens: int) -> None:
    """One length, lightning first; its tensors are gone before softmax attention runs."""
    row = lightning(bench, tokens)
    row.extra.update(tokens=tokens, softmax_ms=softmax_ms(bench, tokens) if tokens <= LONGEST_SOFTMAX else None)


def lightning(bench: Bench, tokens: int) -> Row:
    """Ours and, up to its longest, FLA."""
    x = Attention.draw(bench.device, 1, tokens, HEADS)
    peer = peers.simple_gla(*x.leaves, x.slopes)
    call = with_backward(peer.call, x.leaves, x.do) if peer.call and tokens <= LONGEST_FLA else None
    ours = with_backward(lambda: lightning_attention(*x.leaves, x.slopes)[0], x.leaves, x.do)
    return bench.add(Label("curve", "forward+backward", x.shape), ours, Peer(peer.name, call))


def softmax_ms(bench: Bench, tokens: int) -> Cell:
    """Causal softmax attention of the whole row."""
    leaves, do = draw_dense(bench, tokens)
    call = with_backward(peers.dense_softmax(*leaves).call, leaves, do)
    return bench.attempt(f"curve T={tokens}: cuDNN", call)
