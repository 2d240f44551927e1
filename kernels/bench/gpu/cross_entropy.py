"""Cross-entropy of a chunk of logits beside torch's own operations.

Floors count 16-bit tensors of [C, V]: the statistics read one, the gradient reads one and writes one.
"""

from __future__ import annotations

import torch

from bench.gpu.harness import Bench
from bench.gpu.inputs import normal
from bench.gpu.table import Label, Peer
from mmkernels.cross_entropy import logits_to_gradient_, row_statistics

VOCAB = 200_064


def cross_entropy(bench: Bench) -> None:
    """Chunks of the model's vocabulary."""
    for tokens in (1024, 4096):
        bench.case(Label("loss", "statistics and gradient", f"{tokens} x {VOCAB}"), chunk, bench.cap(tokens))


def chunk(bench: Bench, tokens: int) -> None:
    """Both passes, as the loss runs them."""
    torch.manual_seed(0)
    logits, labels = normal(bench.device, tokens, VOCAB), torch.randint(VOCAB, (tokens,), device=bench.device)
    wide = torch.empty_like(logits, dtype=torch.float32)

    def ours() -> None:
        top, total, label = row_statistics(logits, labels)
        logits_to_gradient_(logits, labels, top, total, (label - top - total.log()).expm1())

    def plain() -> None:
        torch.log_softmax(logits, -1, dtype=torch.float32, out=wide)
        wide.gather(1, labels[:, None]).sum()
        logits.copy_(wide.exp_().scatter_add_(1, labels[:, None], wide.new_full((tokens, 1), -1.0)))

    label = Label("loss", "statistics and gradient", f"{tokens} x {VOCAB}")
    bench.add(label, ours, Peer("torch", plain), floor=3 * logits.nbytes)
