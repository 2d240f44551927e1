"""Steps of transformers' Llama: softmax attention alone, dense, a row a document, one GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.bench.step_peers import PeerJob


class LlamaStep:
    """SDPA, torch.compile, bf16 autocast over fp32 weights, torch's fused AdamW.

    With CUDA graphs it is compiled in `mode="reduce-overhead"`.
    """

    def __init__(self, job: PeerJob) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_float32_matmul_precision("high")
        config, self.rows, self.device = job.config, job.on_device, job.device
        shape = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.ffn_hidden_size,
            max_position_embeddings=self.rows[0].tokens_BS.shape[1],
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
        with torch.device(job.device):
            self.model = LlamaForCausalLM(shape)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.settings = f"transformers Llama, SDPA, compiled{' with CUDA graphs' if job.graphs else ''}"
        mode = "reduce-overhead" if job.graphs else "default"
        self.hidden = torch.compile(self.model.model, mode=mode)
        self.loss = torch.compile(self._loss, mode=mode)

    def _loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        return F.cross_entropy(self.model.lm_head(hidden_BTD).float().flatten(0, 1), labels_BT.flatten())

    def __call__(self) -> float:
        """Train one step and return its last loss."""
        for row in self.rows:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(self.device.type, torch.bfloat16):
                hidden_BTD = self.hidden(input_ids=row.tokens_BS).last_hidden_state
                loss = self.loss(hidden_BTD, row.labels_BS)
            (loss / len(self.rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def close(self) -> None:
        """Nothing is held elsewhere."""
