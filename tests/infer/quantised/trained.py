"""A small hybrid that is trained on text with a known source, and its predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from mmtrain.build import build_model
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing
from tests.model.small import small_config

VOCAB = 64


def markov_text(tokens: int, seed: int) -> Tensor:
    """Text of which two tokens say the next: one of three with chances 0.7, 0.2 and 0.1. Its entropy is 0.80 nats."""
    table = torch.randint(0, VOCAB, (2, VOCAB, 3), generator=torch.Generator().manual_seed(7)).tolist()
    draws = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).tolist()
    row = [1, 2]
    for draw in draws:
        row.append(table[row[-2] % 2][row[-1]][0 if draw < 0.7 else 1 if draw < 0.9 else 2])
    return torch.tensor(row[2:])


def trained_model(text_T: Tensor, steps: int, length: int = 256, rows: int = 4, **changes: object) -> HybridLM:
    """Train on rows drawn from a text, with AdamW and a falling rate; returns the model in evaluation mode."""
    sizes = dict(vocab_size=VOCAB, hidden_size=64, num_layers=3, layer_pattern="LLS", ffn_hidden_size=64)
    model = build_model(small_config(**(sizes | changes)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    packing = Packing.from_lengths([length] * rows)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        starts = torch.randint(0, len(text_T) - length - 1, (rows,), generator=generator).tolist()
        inputs_T = torch.cat([text_T[start : start + length] for start in starts])
        labels_T = torch.cat([text_T[start + 1 : start + length + 1] for start in starts])
        out = model(inputs_T, packing, labels_T)
        optimizer.zero_grad()
        (out.ce_sum / len(inputs_T) + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits_of(model: HybridLM, text_T: Tensor, length: int = 512) -> Tensor:
    """Logits [T, V] of a text, in documents of some length."""
    parts = text_T.split(length)
    return model(text_T, Packing.from_lengths([len(part) for part in parts]))
