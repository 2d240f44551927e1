"""Training steps of other code, of models with the shape of ours: softmax attention alone, dense, a row a document."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.config import ModelConfig


class LlamaStep:
    """A step of transformers' Llama: SDPA, torch.compile, bf16 autocast over fp32 weights, torch's fused AdamW.

    Args:
        config: of our model, whose layers are all of softmax attention and dense.
        seq_len: tokens of a row, one a micro-batch.
        micro_batches: of a step.
        graphs: compile with CUDA graphs (`mode="reduce-overhead"`).
    """

    def __init__(self, config: ModelConfig, seq_len: int, micro_batches: int, graphs: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_float32_matmul_precision("high")
        shape = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.ffn_hidden_size,
            max_position_embeddings=seq_len,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
        with torch.device("cuda"):
            self.model = LlamaForCausalLM(shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        mode = "reduce-overhead" if graphs else "default"
        self.hidden = torch.compile(self.model.model, mode=mode)
        self.loss = torch.compile(self._loss, mode=mode)
        self.rows = torch.randint(config.vocab_size, (micro_batches, 1, seq_len + 1), device="cuda")

    def _loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        return F.cross_entropy(self.model.lm_head(hidden_BTD).float().flatten(0, 1), labels_BT.flatten())

    def __call__(self) -> float:
        """Train one step and return its last loss."""
        for row in self.rows:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast("cuda", torch.bfloat16):
                hidden_BTD = self.hidden(input_ids=row[:, :-1]).last_hidden_state
                loss = self.loss(hidden_BTD, row[:, 1:])
            (loss / len(self.rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def measure_llama(
    config: ModelConfig, seq_len: int, micro_batches: int, steps: int, graphs: bool = False
) -> dict[str, Any]:
    """Median seconds, tokens/s and peak memory of steps of transformers' Llama."""
    torch.cuda.reset_peak_memory_stats()
    step = LlamaStep(config, seq_len, micro_batches, graphs)
    for _ in range(3):
        step()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        loss = step()  # reading the loss waits for the device
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    return {
        "peer": f"transformers Llama, SDPA, compiled{' with CUDA graphs' if graphs else ''}",
        "step_s": round(median, 4),
        "tokens_s": round(seq_len * micro_batches / median),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": loss,
    }
